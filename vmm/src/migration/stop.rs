//! `[3]` `migration_stop_vm`: the stop of a migration. The downtime starts at its entry.

use crate::control;
use crate::machine::Machine;
use crate::probes::{self, Guarded};
use crate::runstate::RunState;
use crate::spanlog::monotonic_ns;

/// What the stop of a migration leaves for later.
#[derive(Clone, Copy, Debug)]
pub(super) struct Stop {
    /// The migration's id, for the probe.
    pub(super) id: u64,
    /// What the VM was before: it goes on in this state, here or there. `None` before the stop.
    pub(super) vm_old_state: Option<RunState>,
    /// When the downtime started, ns of `CLOCK_MONOTONIC`.
    pub(super) downtime_start_ns: Option<u64>,
}

impl Stop {
    /// Nothing is stopped yet.
    pub(super) fn new(id: u64) -> Self {
        Stop {
            id,
            vm_old_state: None,
            downtime_start_ns: None,
        }
    }
}

/// `[3]` Starts the downtime's clock, notes what the VM is, and stops it for the switchover. The
/// caller is the migration's thread and holds the machine's lock.
///
/// # Errors
/// When a state handler fails, as when the ITS can't save its tables. Or when the guest has just asked
/// to be switched off: its vCPUs are off already, so a destination would have a guest that never runs,
/// and nobody there would know why. The vCPUs are paused then, and `stop` says how the VM is to go on.
pub(super) fn migration_stop_vm(
    machine: &mut Machine,
    stop: &mut Stop,
) -> Result<(), control::Error> {
    let state = RunState::FinishMigrate;
    probes::downtime_start(stop.id);
    probes::migration_stop_vm(state.c_name()).run(|_| {
        stop.downtime_start_ns = Some(monotonic_ns());
        let old = machine.run_state();
        stop.vm_old_state = Some(old);
        control::vm_stop_force_state(machine, state)?;
        if old.is_running() && machine.guest_requests().are_pending() {
            return Err(control::Error::GuestEnds);
        }
        Ok(())
    })
}
