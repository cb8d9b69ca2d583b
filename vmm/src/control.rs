//! `[4]` `[5]` Stopping and starting the VM: `vm_stop` → `do_vm_stop`, and `vm_start`.
//!
//! The caller holds the machine's lock, QEMU's big lock. Functions keep QEMU's names
//! (`system/cpus.c`, `system/runstate.c`). What differs: an error of a handler is returned, not
//! printed, and reaches whoever asked for the stop.

use std::io;

use crate::machine::{Machine, ResetError};
use crate::probes::{self, Errno, Guarded};
use crate::runstate::{Event, HandlerError, IllegalTransition, RunState};

/// A stop or a start that failed. After a failed stop the vCPUs are paused all the same; after a
/// failed start they are paused still.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The run state does not allow it; nothing happened.
    #[error(transparent)]
    State(#[from] IllegalTransition),
    /// A state handler failed; all others have run.
    #[error(transparent)]
    Handler(#[from] HandlerError),
    /// Something that only one monitor may have, such as a disk's image, is somebody else's.
    #[error("another process uses a disk of this guest")]
    Claim(#[source] io::Error),
    /// A guest that was handed over with its RAM runs in another process, in the same RAM.
    #[error("the guest's RAM was handed over to another process, where the guest is")]
    RamGone,
    /// The machine can't boot again.
    #[error("reset")]
    Reset(#[from] ResetError),
    /// The guest is on its way out and can't be handed over.
    #[error(
        "the guest has asked to be switched off or reset, or failed, and has no future to migrate"
    )]
    GuestEnds,
    /// Output that was under way could not be finished.
    #[error("drain")]
    Drain(#[source] io::Error),
}

impl Errno for Error {
    fn errno(&self) -> i32 {
        match self {
            Error::State(_) => libc::EINVAL,
            Error::Handler(error) => error.errno(),
            Error::Reset(error) => error.errno(),
            Error::GuestEnds => libc::ECANCELED,
            Error::RamGone => libc::EBUSY,
            Error::Drain(error) | Error::Claim(error) => error.errno(),
        }
    }
}

/// `[4]` Stops the VM for `state`. `from_vcpu` says that a vCPU asked for it; the call itself must
/// come from another thread, since it waits for every vCPU's.
pub fn vm_stop(machine: &mut Machine, state: RunState, from_vcpu: bool) -> Result<(), Error> {
    probes::vm_stop(state.c_name(), u64::from(from_vcpu)).run(|_| do_vm_stop(machine, state))
}

/// Stops a VM that runs, and only sets the state of one that does not: with no vCPU running there
/// is nobody to tell, and the tables of the ITS are in guest RAM since the stop before.
pub fn vm_stop_force_state(machine: &mut Machine, state: RunState) -> Result<(), Error> {
    if machine.run_state().is_running() {
        vm_stop(machine, state, false)
    } else {
        Ok(machine.set_state(state)?)
    }
}

/// `[5]` Pauses the vCPUs, tells the handlers, drains what is under way.
pub fn do_vm_stop(machine: &mut Machine, state: RunState) -> Result<(), Error> {
    probes::do_vm_stop(state.c_name()).run(|_| {
        let was_running = machine.run_state().is_running();
        machine.set_state(state)?;
        if !was_running {
            return Ok(());
        }
        machine.vcpus.pause_all_vcpus();
        let notified = machine.handlers.vm_state_notify(false, state);
        if state == RunState::FinishMigrate {
            // Whoever watches can wait until the last byte is on its way: the switchover sees to it.
            machine.hold(Event::Stop);
        } else {
            machine.emit(Event::Stop);
        }
        let drained = drain(machine);
        notified?;
        drained
    })
}

/// Tells the handlers and lets the vCPUs run. A VM that runs already is left alone.
///
/// # Errors
/// When the state does not allow it or a handler fails; the VM stays as it was.
pub fn vm_start(machine: &mut Machine) -> Result<(), Error> {
    let state = RunState::Running;
    if machine.run_state() == state {
        return Ok(());
    }
    probes::vm_start(state.c_name()).run(|_| {
        if machine.has_given_ram_away() {
            return Err(Error::RamGone);
        }
        machine.run_state().change(state)?;
        machine.handlers.vm_state_notify(true, state)?;
        machine.set_state(state)?;
        machine.vcpus.resume_all_vcpus();
        machine.emit(Event::Resume);
        Ok(())
    })
}

/// Makes the machine boot again, from whatever state it is in but one in which the guest is, or may
/// be, another process's. A VM that ran goes on running, one that did not waits for `cont`.
///
/// # Errors
/// When the state does not allow it or there is nothing to boot: nothing happened. When something
/// fails on the way: the VM is [`RunState::InternalError`].
pub fn system_reset(machine: &mut Machine, guest: bool, reason: &'static str) -> Result<(), Error> {
    let (from, to) = (machine.run_state(), RunState::Prelaunch);
    let was_running = from.is_running();
    if matches!(from, RunState::FinishMigrate | RunState::Inmigrate) {
        // A failed switchover may go back there, and a guest that was never started arrive there; nobody
        // else. What has arrived of a guest would be lost.
        return Err(IllegalTransition { from, to }.into());
    }
    if !was_running {
        from.change(to)?;
    }
    if !machine.can_reset() {
        return Err(ResetError::NoProgram.into());
    }
    if was_running {
        machine.vcpus.pause_all_vcpus();
        let stopped = machine.handlers.vm_state_notify(false, RunState::Paused);
        if let Err(error) = stopped {
            // What a handler could not write down is about to be forgotten.
            tracing::warn!(%error, "on the way to a reset");
        }
    }
    machine.guest_requests().forget();
    let done = boot_again(machine, was_running);
    match &done {
        Ok(()) => machine.emit(Event::Reset { guest, reason }),
        Err(_) => {
            machine.set_state(RunState::InternalError)?;
            machine.emit(Event::Stop);
        }
    }
    done
}

fn boot_again(machine: &mut Machine, run: bool) -> Result<(), Error> {
    machine.reset()?;
    if run {
        let running = RunState::Running;
        machine.handlers.vm_state_notify(true, running)?;
        machine.vcpus.resume_all_vcpus();
        Ok(())
    } else {
        Ok(machine.set_state(RunState::Prelaunch)?)
    }
}

/// Waits for the I/O that the guest has started.
fn drain(machine: &Machine) -> Result<(), Error> {
    probes::drain().run(|_| machine.serial().flush().map_err(Error::Drain))
}
