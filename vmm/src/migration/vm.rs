//! What a migration asks of the VM, on either side, and the machine's answers.
//!
//! The traits are small so that the whole protocol, with every way in which it can break, is tested
//! without KVM.

use std::ffi::CString;
use std::sync::{MutexGuard, PoisonError};
use std::time::Duration;

use super::stop;
use super::stream::header::Shape;
use super::stream::message::Rehearsal;
use crate::arch;
use crate::control;
use crate::costs::Costs;
use crate::devices::{DeviceState, StateError};
use crate::machine::{Machine, SharedMachine};
use crate::memory::{self, GuestRam, PageRun};
use crate::runstate::RunState;
use crate::spanlog::monotonic_ns;

/// How long a guest that was started may take to enter `KVM_RUN`. It is only waited for so that the
/// downtime is known; the guest has been started either way.
const FIRST_RUN_TIMEOUT: Duration = Duration::from_secs(5);

/// A device's state, read.
pub(super) struct SavedDevice {
    /// Its name in the stream.
    pub(super) name: CString,
    /// The version of the state.
    pub(super) version: u32,
    /// The state.
    pub(super) state: Vec<u8>,
}

/// What both sides ask. Each call takes the machine's lock for as long as it lasts.
pub(super) trait MigrationVm {
    /// What the other side must have too.
    fn shape(&self) -> Shape;
    /// Guest RAM.
    fn ram(&self) -> GuestRam;
    /// What stops of this guest have cost so far.
    fn costs(&self) -> Costs;
    /// Takes in what one more stop has cost.
    fn learn(&self, measured: &Costs);
}

/// The VM of an outgoing migration.
pub(super) trait SourceVm: MigrationVm {
    /// Whether the guest runs, so that a stop makes a downtime.
    fn is_running(&self) -> bool;
    /// Switches the dirty log.
    fn set_dirty_log(&self, on: bool) -> Result<(), memory::Error>;
    /// The pages written since they were protected last; see [`GuestRam::dirty`].
    fn dirty(&self) -> Result<Vec<PageRun>, memory::Error>;
    /// These pages, in address order, are about to be read and sent.
    fn protect(&self, runs: &[PageRun]) -> Result<(), memory::Error>;
    /// Lets the guest rest for a share of its time, per cent; 0 lets it run.
    fn cpu_throttle_set(&self, percentage: u8);
    /// `[3]` Stops the guest for the switchover; see [`stop::migration_stop_vm`].
    fn migration_stop_vm(&self, stop: &mut stop::Stop) -> Result<(), control::Error>;
    /// Saves the device with this place in machine order.
    fn save_device(&self, index: usize) -> Result<SavedDevice, StateError>;
    /// Calls `send` with the machine locked, if it still is in the state of a switchover. While the
    /// lock is held nobody can start the guest or end it, so what `send` tells the destination is
    /// true.
    ///
    /// # Errors
    /// The state that the machine is in instead; `send` was not called.
    fn commit(&self, send: &mut dyn FnMut()) -> Result<(), RunState>;
    /// Lets the guest go on in the state `old`, unless it left the state of a switchover by itself.
    ///
    /// # Errors
    /// When it can't be started; it is paused then, and a person may try.
    fn resume(&self, old: RunState) -> Result<(), control::Error>;
    /// The guest is the destination's, or may be: only a person can run it here again, and nobody if
    /// its RAM is `gone` with it.
    fn postmigrate(&self, gone: bool);
}

/// The VM of an incoming migration.
pub(super) trait TargetVm: MigrationVm {
    /// Saves each device and loads what it saved: the machine is as it was, but what a migration will
    /// do to it has been done once, in caches and page tables, and its time is known.
    fn rehearse(&self) -> Vec<Rehearsal>;
    /// Loads a state into the device with this place.
    fn load_device(&self, index: usize, version: u32, state: &[u8]) -> Result<(), StateError>;
    /// Lets the guest go on in the state `old`, its state at the source, unless a person wants it
    /// paused. Returns when its first vCPU entered the guest, ns of `CLOCK_MONOTONIC`, if it runs.
    fn go_on(&self, old: RunState) -> Result<Option<u64>, control::Error>;
    /// The guest has run here for a while, and the source knows: there is time for what is only of
    /// interest.
    fn settle(&self);
    /// Devices hold part of a state: this machine can't be used any more.
    fn spoil(&self);
}

impl MigrationVm for SharedMachine {
    fn shape(&self) -> Shape {
        let mut machine = lock(self);
        let ram = machine.ram().regions().collect();
        let vcpus = u32::try_from(machine.vcpus().len()).unwrap_or(u32::MAX);
        let devices = machine.devices_mut().iter();
        let devices = devices.map(|d| (d.name().to_string_lossy().into_owned(), d.version()));
        Shape {
            arch: arch::NAME.to_owned(),
            ram,
            vcpus,
            devices: devices.collect(),
        }
    }

    fn ram(&self) -> GuestRam {
        lock(self).ram().clone()
    }

    fn costs(&self) -> Costs {
        lock(self).costs().clone()
    }

    fn learn(&self, measured: &Costs) {
        lock(self).learn(measured);
    }
}

impl SourceVm for SharedMachine {
    fn is_running(&self) -> bool {
        lock(self).run_state().is_running()
    }

    fn set_dirty_log(&self, on: bool) -> Result<(), memory::Error> {
        let machine = lock(self);
        machine.ram().set_dirty_log(machine.vm(), on)
    }

    fn dirty(&self) -> Result<Vec<PageRun>, memory::Error> {
        let machine = lock(self);
        let stopped = !machine.run_state().is_running();
        machine.ram().dirty(machine.vm(), stopped)
    }

    fn protect(&self, runs: &[PageRun]) -> Result<(), memory::Error> {
        let machine = lock(self);
        machine.ram().protect(machine.vm(), runs)
    }

    fn cpu_throttle_set(&self, percentage: u8) {
        if let Err(error) = lock(self).vcpus().cpu_throttle_set(percentage) {
            // It converges later, or not at all, which is noticed then.
            tracing::warn!("the guest can't be slowed down: {error}");
        }
    }

    fn migration_stop_vm(&self, stop: &mut stop::Stop) -> Result<(), control::Error> {
        let mut machine = lock(self);
        let stopped = stop::migration_stop_vm(&mut machine, stop);
        if let (Err(control::Error::GuestEnds), Some(old)) = (&stopped, stop.vm_old_state) {
            // At once, so that the main loop finds the guest as it was when it asked.
            continue_in(&mut machine, old)?;
        }
        stopped
    }

    fn save_device(&self, index: usize) -> Result<SavedDevice, StateError> {
        let mut machine = lock(self);
        let device = machine.devices_mut().get_mut(index).ok_or_else(no_device)?;
        let state = device.save()?;
        Ok(SavedDevice {
            name: device.name().to_owned(),
            version: device.version(),
            state,
        })
    }

    fn commit(&self, send: &mut dyn FnMut()) -> Result<(), RunState> {
        let machine = lock(self);
        match machine.run_state() {
            RunState::FinishMigrate => {
                // The destination takes them before it runs the guest, after it has read `commit`.
                machine.release();
                send();
                Ok(())
            }
            other => Err(other),
        }
    }

    fn resume(&self, old: RunState) -> Result<(), control::Error> {
        let mut machine = lock(self);
        if machine.run_state() != RunState::FinishMigrate {
            return Ok(());
        }
        let claimed = machine.claim().map_err(control::Error::Claim);
        let resumed = claimed.and_then(|()| continue_in(&mut machine, old));
        if resumed.is_err() {
            // No way out leads from the state of a switchover but this one.
            machine.set_state(RunState::Paused)?;
        }
        resumed
    }

    fn postmigrate(&self, gone: bool) {
        let mut machine = lock(self);
        if gone {
            machine.give_ram_away();
        }
        // Whatever else the machine became meanwhile, such as shut down, does not run either.
        let _ = machine.set_state(RunState::Postmigrate);
        machine.count_mapped();
    }
}

impl TargetVm for SharedMachine {
    fn rehearse(&self) -> Vec<Rehearsal> {
        let mut machine = lock(self);
        let devices = machine.devices_mut().iter_mut();
        devices.map(|device| rehearse(&mut **device)).collect()
    }

    fn load_device(&self, index: usize, version: u32, state: &[u8]) -> Result<(), StateError> {
        let mut machine = lock(self);
        let device = machine.devices_mut().get_mut(index).ok_or_else(no_device)?;
        device.load(version, state)
    }

    fn go_on(&self, old: RunState) -> Result<Option<u64>, control::Error> {
        let mut machine = lock(self);
        let held = old.is_running() && !machine.autostart();
        let state = if held { RunState::Paused } else { old };
        machine.claim().map_err(control::Error::Claim)?;
        continue_in(&mut machine, state)?;
        let first_run = || machine.vcpus().wait_first_run(FIRST_RUN_TIMEOUT);
        Ok(state.is_running().then(first_run).flatten())
    }

    fn settle(&self) {
        lock(self).count_mapped();
    }

    fn spoil(&self) {
        // A machine that is not waiting for a migration any more has been dealt with by a person.
        let _ = lock(self).set_state(RunState::InternalError);
    }
}

/// Takes the machine's lock.
pub(super) fn lock(machine: &SharedMachine) -> MutexGuard<'_, Machine> {
    machine.lock().unwrap_or_else(PoisonError::into_inner)
}

fn continue_in(machine: &mut Machine, state: RunState) -> Result<(), control::Error> {
    if state.is_running() {
        control::vm_start(machine)
    } else {
        Ok(machine.set_state(state)?)
    }
}

fn rehearse(device: &mut dyn DeviceState) -> Rehearsal {
    let began_ns = monotonic_ns();
    let saved = device.save();
    let saved_ns = monotonic_ns();
    let loaded = saved.and_then(|state| device.load(device.version(), &state));
    let loaded_ns = monotonic_ns();
    if let Err(error) = loaded {
        // If it can't be loaded at all, the migration will say so.
        tracing::warn!(device = ?device.name(), "rehearsal: {error}");
    }
    Rehearsal {
        save_ns: saved_ns.saturating_sub(began_ns),
        load_ns: loaded_ns.saturating_sub(saved_ns),
    }
}

fn no_device() -> StateError {
    StateError::Invalid("there is no such device".to_owned())
}
