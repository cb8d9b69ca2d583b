//! Devices against states that no device was ever in: what a peer sends is not trusted.

use std::io;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use anyhow::{Result, ensure};
use harness::programs;
use vmm::control::{vm_start, vm_stop};
use vmm::devices::DeviceState;
use vmm::machine::{Config, Machine, PciDevices};
use vmm::payload::Program;
use vmm::runstate::{EventSender, RunState};

/// Damaged states that each device is given, of each kind.
const ROUNDS: usize = 64;

/// How long the guest runs before its state is taken.
const WARM_UP: Duration = Duration::from_millis(300);

#[test]
fn a_damaged_state_is_refused_or_loaded_but_never_a_panic() -> Result<()> {
    let mut source = machine(true)?;
    vm_start(&mut source)?;
    thread::sleep(WARM_UP);
    vm_stop(&mut source, RunState::Paused, false)?;

    let mut destination = machine(false)?;
    let mut random = Random(0x1234_5678_9abc_def1);
    let devices = source.devices_mut().iter_mut();
    for (device, target) in devices.zip(destination.devices_mut()) {
        let (name, version, state) = (device.name().to_owned(), device.version(), device.save()?);
        ensure!(target.name() == &*name);
        ensure!(
            target.load(version + 1, &state).is_err(),
            "{name:?} took a state of a version that it does not know"
        );
        for _ in 0..ROUNDS {
            let cut = random.below(state.len());
            ensure!(
                target.load(version, &state[..cut]).is_err(),
                "{name:?} took {cut} of {} bytes",
                state.len()
            );
        }
        let (refused, loaded) = damage(target.as_mut(), version, &state, &mut random);
        println!(
            "{name:?}: {} bytes, {refused} refused, {loaded} loaded",
            state.len()
        );
    }
    Ok(())
}

/// Loads `state` with a few wrong bytes, again and again; counts how often it was refused and how
/// often it was loaded. Which of the two is right depends on the byte.
fn damage(
    target: &mut dyn DeviceState,
    version: u32,
    state: &[u8],
    random: &mut Random,
) -> (usize, usize) {
    let mut refused = 0;
    for _ in 0..ROUNDS {
        let mut damaged = state.to_vec();
        for _ in 0..=random.below(4) {
            let at = random.below(damaged.len());
            damaged[at] = random.below(256) as u8;
        }
        refused += usize::from(target.load(version, &damaged).is_err());
    }
    (refused, ROUNDS - refused)
}

fn machine(boots: bool) -> Result<Machine> {
    let config = Config {
        ram_size: 32 << 20,
        vcpus: 2,
        dirty_ring_size: None,
        incoming: false,
        guest_clock: vmm::arch::GUEST_CLOCK,
        program: boots
            .then(programs::guest)
            .transpose()?
            .map(Program::Payload),
        cmdline: "its_devices=4 its_events=4 dirty=64K".into(),
        console: Box::new(io::sink()),
        pci: PciDevices::default(),
    };
    // Nobody waits for events or requests: the receiver goes away at once.
    let (requests, _) = mpsc::channel();
    Ok(Machine::new(config, EventSender::new(drop), &requests)?)
}

/// xorshift64: the same damage in every run.
struct Random(u64);

impl Random {
    /// A number less than `end`, which is not 0.
    fn below(&mut self, end: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % end as u64) as usize
    }
}
