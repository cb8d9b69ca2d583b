//! What the stop handlers cost: the monitor's own machine, stop, save, load and start, in one
//! process and without a wire. `cargo xtask bench its` runs it in the testbed, whose clock counts
//! instructions.
//!
//! Prints one JSON object a line for each size of the ITS. Times are in ns of `CLOCK_MONOTONIC`.

use std::collections::BTreeMap;
use std::ffi::CStr;
use std::io;
use std::mem::offset_of;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::str::FromStr;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use blackout_abi::guest::{self, SharedPage, command, state};
use clap::Parser;
use serde_json::{Value, json};
use vmm::control::{vm_start, vm_stop};
use vmm::machine::{Config, Machine, PciDevices};
use vmm::payload::Program;
use vmm::probes::Guarded;
use vmm::runstate::{EventSender, RunState};
use vmm::spanlog::{SpanLog, SpanRecord, monotonic_ns};

/// How long the guest may take for its setup or for one command.
const LIMIT: Duration = Duration::from_secs(300);
/// How long the guest runs between two stops, at least.
const PAUSE: Duration = Duration::from_millis(2);
/// The period of the timer's ticks in Debian's kernels, `CONFIG_HZ=250`.
const TICK: Duration = Duration::from_millis(4);

/// Measures what the ITS and GIC handlers add to their ioctls.
#[derive(Parser)]
#[command(name = "bench-its")]
struct Arguments {
    /// Sizes to measure, each DEVICESxEVENTS.
    #[arg(required = true)]
    sizes: Vec<Size>,
    /// Stops of each guest.
    #[arg(long, default_value_t = 9)]
    stops: usize,
    /// Machines into which each guest is restored.
    #[arg(long, default_value_t = 3)]
    restores: usize,
    /// vCPUs.
    #[arg(long, default_value_t = 1)]
    cpus: u32,
    /// Have each machine save and load its own devices before a guest is restored into it, as the
    /// destination of a migration does.
    #[arg(long)]
    rehearse: bool,
    /// Guest RAM, MiB.
    #[arg(long, default_value_t = 32)]
    memory: u64,
    /// Also raise an LPI before the last stop, and every event after each restore.
    #[arg(long)]
    check: bool,
    /// Let the ITS's handler spend so many ns more, to see whether that is found.
    #[arg(long, value_name = "NS")]
    slower: Option<u64>,
}

/// Devices and events of each.
#[derive(Clone, Copy, Debug)]
struct Size {
    devices: u64,
    events: u64,
}

impl FromStr for Size {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parse = |number: &str| number.parse::<u64>().map_err(|e| e.to_string());
        let (devices, events) = text.split_once('x').ok_or("want DEVICESxEVENTS")?;
        Ok(Size {
            devices: parse(devices)?,
            events: parse(events)?,
        })
    }
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    if let Some(ns) = arguments.slower {
        harness::slow::down("its_save_tables", ns);
    }
    let measure = || {
        for &size in &arguments.sizes {
            println!("{}", measure(&arguments, size)?);
        }
        Ok(())
    };
    let result: Result<()> = measure();
    harness::exit(&result)
}

fn measure(arguments: &Arguments, size: Size) -> Result<Value> {
    let payload = harness::programs::guest()?;
    let mut source = Guest::boot(arguments, size, &payload)?;
    // As in a migration: marking pages dirty is part of what a save costs.
    let machine = &source.machine;
    machine.ram().set_dirty_log(machine.vm(), true)?;
    let mut stops = Stops::default();
    for stop in 1..arguments.stops {
        stops.stop(&mut source.machine)?;
        vm_start(&mut source.machine)?;
        let share = stop as f64 / arguments.stops as f64;
        thread::sleep(until_phase(monotonic_ns(), TICK.mul_f64(share)));
    }
    if arguments.check {
        source.command(command::RAISE_MASKED, size.devices * size.events / 2)?;
    }
    stops.stop(&mut source.machine)?;
    let mut loads = Loads::default();
    for _ in 0..arguments.restores {
        let mut destination = loads.load(arguments, &mut source)?;
        if arguments.check {
            destination.check(size)?;
        }
    }
    Ok(json!({
        "devices": size.devices,
        "events": size.events,
        "vcpus": arguments.cpus,
        "its": stops.its.summary(),
        "gicv3": stops.gic.summary(),
        "save": summaries(&loads.save),
        "its_restore_tables": summary(&loads.its),
        "gic_restore_pending_tables": summary(&loads.gic),
        "load": summaries(&loads.load),
    }))
}

/// How long to wait from `now`, [`PAUSE`] at least, until so much of a tick's period has passed.
///
/// Stops that follow each other at their own pace fall into step with the ticks: one that lies in a
/// handler would lie there in every stop. Spread over the period, some stops have none.
fn until_phase(now: u64, phase: Duration) -> Duration {
    let (pause, tick) = (PAUSE.as_nanos() as u64, TICK.as_nanos() as u64);
    let since = (now + pause) % tick;
    let more = (phase.as_nanos() as u64 + tick - since) % tick;
    Duration::from_nanos(pause + more)
}

/// A machine with the bare-metal guest in it.
struct Guest {
    machine: Machine,
}

impl Guest {
    /// A machine whose guest has set itself up and runs.
    fn boot(arguments: &Arguments, size: Size, payload: &Path) -> Result<Self> {
        let Size { devices, events } = size;
        let cmdline = format!("its_devices={devices} its_events={events}");
        let mut guest = Guest::build(arguments, Some(payload.to_owned()), cmdline)?;
        vm_start(&mut guest.machine)?;
        guest.wait(|guest| match guest.load(offset_of!(SharedPage, state))? {
            state::BOOTING => Ok(false),
            state::READY => Ok(true),
            _ => bail!(
                "setup failed: {}",
                guest.load(offset_of!(SharedPage, error))?
            ),
        })?;
        Ok(guest)
    }

    fn build(arguments: &Arguments, payload: Option<PathBuf>, cmdline: String) -> Result<Self> {
        let config = Config {
            ram_size: arguments.memory << 20,
            vcpus: arguments.cpus,
            dirty_ring_size: None,
            incoming: false,
            guest_clock: vmm::arch::GUEST_CLOCK,
            program: payload.map(Program::Payload),
            cmdline,
            console: Box::new(io::sink()),
            pci: PciDevices::default(),
        };
        let machine = Machine::new(config, EventSender::new(|_| {}), &mpsc::channel().0)?;
        Ok(Guest { machine })
    }

    /// Has the guest carry out a command.
    fn command(&self, command: u64, argument: u64) -> Result<[u64; 2]> {
        let sequence = self.load(offset_of!(SharedPage, command_seq))? + 1;
        self.store(offset_of!(SharedPage, argument), argument)?;
        self.store(offset_of!(SharedPage, command), command)?;
        self.store(offset_of!(SharedPage, command_seq), sequence)?;
        self.wait(|guest| Ok(guest.load(offset_of!(SharedPage, done_seq))? == sequence))?;
        let result = self.load(offset_of!(SharedPage, result))?;
        Ok([result, self.load(offset_of!(SharedPage, result2))?])
    }

    /// Runs the restored guest: the LPI that was pending comes, and so does every event.
    fn check(&mut self, size: Size) -> Result<()> {
        vm_start(&mut self.machine)?;
        let [lpi, count] = self.command(command::TAKE_PENDING, 0)?;
        ensure!(
            lpi != 0 && count == 1,
            "the pending LPI: {lpi}, {count} times"
        );
        let [right, wrong] = self.command(command::CHECK_EVENTS, 0)?;
        let all = size.devices * size.events;
        ensure!(
            right == all && wrong == 0,
            "{right} of {all} events came, {wrong} did not"
        );
        eprintln!("{size:?}: LPI {lpi} was pending and came, and so did {right} events");
        Ok(())
    }

    fn wait(&self, done: impl Fn(&Self) -> Result<bool>) -> Result<()> {
        let deadline = Instant::now() + LIMIT;
        while !done(self)? {
            ensure!(
                Instant::now() < deadline,
                "the guest took longer than {LIMIT:?}"
            );
            thread::sleep(PAUSE);
        }
        Ok(())
    }

    fn load(&self, offset: usize) -> Result<u64> {
        let mut value = [0; 8];
        self.machine.ram().read(shared(offset), &mut value)?;
        Ok(u64::from_le_bytes(value))
    }

    fn store(&self, offset: usize, value: u64) -> Result<()> {
        let bytes = value.to_le_bytes();
        Ok(self.machine.ram().write(shared(offset), &bytes)?)
    }
}

/// Guest-physical address of a byte of the shared page.
fn shared(offset: usize) -> u64 {
    guest::AARCH64_BOOT_PAGE + guest::SHARED_PAGE_OFFSET + offset as u64
}

/// What stops took.
#[derive(Default)]
struct Stops {
    its: Handler,
    gic: Handler,
}

impl Stops {
    /// Stops the machine as a migration would, then makes the handlers' ioctls again, alone.
    fn stop(&mut self, machine: &mut Machine) -> Result<()> {
        let dirty = machine.ram().dirty(machine.vm(), true)?;
        machine.ram().protect(machine.vm(), &dirty)?;
        let log = SpanLog::open();
        vm_stop(machine, RunState::Paused, false)?;
        let spans = log.finish();
        self.its.add(machine, &spans, c"its")?;
        self.gic.add(machine, &spans, c"gicv3")
    }
}

/// What one handler took in each stop.
#[derive(Default)]
struct Handler {
    /// Its callback: the span `vm_state_handler`.
    whole: Vec<u64>,
    /// Its ioctl, within that.
    ioctl: Vec<u64>,
    /// The difference.
    added: Vec<u64>,
    /// The same ioctl alone, afterwards.
    alone: Vec<u64>,
}

impl Handler {
    fn add(&mut self, machine: &Machine, spans: &[SpanRecord], name: &CStr) -> Result<()> {
        let is_whole = |span: &&SpanRecord| {
            span.name == "vm_state_handler" && span.detail.as_deref() == name.to_str().ok()
        };
        // Each handler has two callbacks; the second is the main one.
        let whole = spans.iter().filter(is_whole).nth(1);
        let whole = whole.with_context(|| format!("no handler {name:?}"))?;
        let end = whole.start_ns + whole.duration_ns;
        let ioctl = spans.iter().find(|span| {
            span.name == "kvm_device_access" && (whole.start_ns..end).contains(&span.start_ns)
        });
        let ioctl = ioctl.context("no ioctl in the handler")?.duration_ns;
        let ioctl = ioctl.saturating_sub(empty_span());
        self.whole.push(whole.duration_ns);
        self.ioctl.push(ioctl);
        self.added.push(whole.duration_ns.saturating_sub(ioctl));
        let (known, took) = timed(|| machine.irqchip().bare_stop(name));
        ensure!(known?, "no ioctl of {name:?}");
        self.alone.push(took);
        Ok(())
    }

    fn summary(&self) -> Value {
        json!({
            "handler": summary(&self.whole),
            "ioctl": summary(&self.ioctl),
            "added": summary(&self.added),
            "ioctl_alone": summary(&self.alone),
        })
    }
}

/// What a span around an ioctl that took no time would say: its probes and its clock.
fn empty_span() -> u64 {
    let log = SpanLog::open();
    for _ in 0..9 {
        let nothing: io::Result<()> = vmm::probes::kvm_device_access(0, 0, 0, 1).run(|_| Ok(()));
        drop(nothing);
    }
    let spans = log.finish();
    median(
        &spans
            .iter()
            .map(|span| span.duration_ns)
            .collect::<Vec<_>>(),
    )
}

/// Runs `call`, and how long that took without the reading of the clock.
fn timed<T>(call: impl FnOnce() -> T) -> (T, u64) {
    let clock = monotonic_ns();
    let start = monotonic_ns();
    let result = call();
    let end = monotonic_ns();
    (result, (end - start).saturating_sub(start - clock))
}

/// What saving and loading took.
#[derive(Default)]
struct Loads {
    its: Vec<u64>,
    gic: Vec<u64>,
    /// Per device.
    save: BTreeMap<String, Vec<u64>>,
    load: BTreeMap<String, Vec<u64>>,
}

impl Loads {
    /// Moves a stopped guest into a new machine.
    fn load(&mut self, arguments: &Arguments, source: &mut Guest) -> Result<Guest> {
        let mut destination = Guest::build(arguments, None, String::new())?;
        let ram = source.machine.ram().clone();
        let mut page = vec![0; 1 << 20];
        for (start, size) in ram.regions() {
            for gpa in (start..start + size).step_by(page.len()) {
                ram.read(gpa, &mut page)?;
                destination.machine.ram().write(gpa, &page)?;
            }
        }
        if arguments.rehearse {
            for device in destination.machine.devices_mut() {
                let state = device.save()?;
                device.load(device.version(), &state)?;
            }
        }
        let devices = source.machine.devices_mut();
        for (from, to) in devices.iter_mut().zip(destination.machine.devices_mut()) {
            let name = from.name().to_string_lossy().into_owned();
            let start = monotonic_ns();
            let state = from.save().with_context(|| format!("saving {name}"))?;
            let took = monotonic_ns() - start;
            self.save.entry(name.clone()).or_default().push(took);
            let log = SpanLog::open();
            let start = monotonic_ns();
            to.load(from.version(), &state)
                .with_context(|| format!("loading {name}"))?;
            let took = monotonic_ns() - start;
            self.load.entry(name).or_default().push(took);
            for span in log.finish() {
                match span.name.as_ref() {
                    "its_restore_tables" => self.its.push(span.duration_ns),
                    "gic_restore_pending_tables" => self.gic.push(span.duration_ns),
                    _ => {}
                }
            }
        }
        Ok(destination)
    }
}

fn summary(times: &[u64]) -> Value {
    json!({
        "first": times.first(),
        "min": times.iter().min(),
        "median": median(times),
        "max": times.iter().max(),
    })
}

fn summaries(times: &BTreeMap<String, Vec<u64>>) -> Value {
    let summaries = times
        .iter()
        .map(|(name, times)| (name.clone(), summary(times)));
    Value::Object(summaries.collect())
}

fn median(times: &[u64]) -> u64 {
    let mut sorted = times.to_vec();
    sorted.sort_unstable();
    sorted.get(sorted.len() / 2).copied().unwrap_or_default()
}
