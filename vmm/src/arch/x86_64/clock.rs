//! `[7]` The kvmclock handler: the guest's clock stands still while the guest does.
//!
//! QEMU's `hw/i386/kvm/clock.c` does the same: read the clock on a stop, set it back on a start,
//! and tell each vCPU that it was stopped. x86-64 has no ITS; this is what its hop 7 is.
//!
//! A guest that comes from another host may be given the time that its way took
//! ([`GuestClock::Advance`]): kvmclock from the stop on, and the TSC, which runs on while a VM is
//! stopped, from when the vCPUs were saved. Which of the two a guest tells the time by is its choice.

use std::ffi::CStr;
use std::sync::{Arc, Mutex, PoisonError};

use serde::{Deserialize, Serialize};

use super::at_stop::AtStop;
use crate::arch::{GuestClock, passed_since, realtime_ns};
use crate::devices::{DeviceState, StateError, decode, encode};
use crate::kvm::{self, Vcpu, Vm};
use crate::probes::{self, Guarded};
use crate::runstate::{CallbackError, RunState, StateHandler};

/// The guest's clock: what travels to the destination. Its [handler](Clock::handler) shares it.
#[derive(Clone, Debug)]
pub(super) struct Clock {
    vm: Arc<Vm>,
    stopped_at: AtStop<Stopped>,
    guest_clock: GuestClock,
}

/// The clock on a stop, or as it is to be on the next start.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
struct Stopped {
    /// kvmclock, ns.
    ns: u64,
    /// When that was: `CLOCK_REALTIME`, ns.
    at: u64,
    /// By how much the TSCs are late, ns.
    tsc_late: u64,
}

/// Reads the clock on a stop, sets it on a start.
#[derive(Debug)]
pub(super) struct ClockHandler {
    clock: Clock,
    vcpus: Vec<Arc<Mutex<Vcpu>>>,
}

impl Clock {
    /// The clock of `vm`.
    pub(super) fn new(vm: Arc<Vm>, guest_clock: GuestClock) -> Self {
        Clock {
            vm,
            stopped_at: AtStop::default(),
            guest_clock,
        }
    }

    fn read(&self) -> Result<Stopped, kvm::Error> {
        let ns = self.vm.clock()?;
        Ok(Stopped {
            ns,
            at: realtime_ns(),
            tsc_late: 0,
        })
    }

    /// What stops and starts it; `vcpus` are all that the VM has.
    pub(super) fn handler(&self, vcpus: &[Arc<Mutex<Vcpu>>]) -> ClockHandler {
        ClockHandler {
            clock: self.clone(),
            vcpus: vcpus.to_vec(),
        }
    }
}

impl ClockHandler {
    fn stop(&self) -> Result<(), kvm::Error> {
        let stopped = probes::kvm_get_clock().run(|_| self.clock.read())?;
        self.clock.stopped_at.set(stopped);
        Ok(())
    }

    fn start(&self) -> Result<(), kvm::Error> {
        let Some(stopped) = self.clock.stopped_at.get() else {
            return Ok(());
        };
        probes::kvm_set_clock().run(|_| {
            self.clock.vm.set_clock(stopped.ns)?;
            self.vcpus.iter().try_for_each(|vcpu| {
                let vcpu = vcpu.lock().unwrap_or_else(PoisonError::into_inner);
                if stopped.tsc_late > 0 {
                    vcpu.advance_tsc(stopped.tsc_late)?;
                }
                vcpu.kvmclock_ctrl()
            })
        })
    }
}

impl StateHandler for ClockHandler {
    fn name(&self) -> &'static CStr {
        c"kvmclock"
    }

    fn priority(&self) -> i32 {
        0
    }

    fn prepare(&mut self, _running: bool, _state: RunState) -> Result<(), CallbackError> {
        Ok(())
    }

    fn change(&mut self, running: bool, _state: RunState) -> Result<(), CallbackError> {
        Ok(if running { self.start() } else { self.stop() }?)
    }
}

const STATE_VERSION: u32 = 2;

#[derive(Serialize, Deserialize)]
struct Saved {
    ns: u64,
    /// When that was, and when the vCPUs' TSCs were read: `CLOCK_REALTIME`, ns.
    at: u64,
    saved_at: u64,
}

impl DeviceState for Clock {
    fn name(&self) -> &CStr {
        c"kvmclock"
    }

    fn version(&self) -> u32 {
        STATE_VERSION
    }

    fn save(&mut self) -> Result<Vec<u8>, StateError> {
        let Stopped { ns, at, .. } = match self.stopped_at.get() {
            Some(stopped) => stopped,
            None => self.read()?,
        };
        // The vCPUs have been saved a moment ago.
        let saved_at = realtime_ns();
        encode(&Saved { ns, at, saved_at })
    }

    /// The clock is set when the VM starts, not now; what time it has lost by now is added here.
    fn load(&mut self, version: u32, state: &[u8]) -> Result<(), StateError> {
        let Saved { ns, at, saved_at } = decode(STATE_VERSION, version, state)?;
        let (lost, tsc_late) = match self.guest_clock {
            GuestClock::Advance => (passed_since(at), passed_since(saved_at)),
            GuestClock::Freeze => (0, 0),
        };
        let ns = ns.saturating_add(lost);
        self.stopped_at.set(Stopped { ns, at, tsc_late });
        Ok(())
    }
}
