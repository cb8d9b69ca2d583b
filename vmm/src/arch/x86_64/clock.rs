//! `[7]` The kvmclock handler: the guest's clock stands still while the guest does.
//!
//! QEMU's `hw/i386/kvm/clock.c` does the same: read the clock on a stop, set it back on a start,
//! and tell each vCPU that it was stopped. x86-64 has no ITS; this is what its hop 7 is.

use std::ffi::CStr;
use std::sync::{Arc, Mutex, PoisonError};

use serde::{Deserialize, Serialize};

use super::at_stop::AtStop;
use crate::devices::{DeviceState, StateError, decode, encode};
use crate::kvm::{self, Vcpu, Vm};
use crate::probes::{self, Guarded};
use crate::runstate::{CallbackError, RunState, StateHandler};

/// The guest's clock: what travels to the destination. Its [handler](Clock::handler) shares it.
#[derive(Clone, Debug)]
pub(super) struct Clock {
    vm: Arc<Vm>,
    /// ns.
    stopped_at: AtStop<u64>,
}

/// Reads the clock on a stop, sets it on a start.
#[derive(Debug)]
pub(super) struct ClockHandler {
    clock: Clock,
    vcpus: Vec<Arc<Mutex<Vcpu>>>,
}

impl Clock {
    /// The clock of `vm`.
    pub(super) fn new(vm: Arc<Vm>) -> Self {
        let stopped_at = AtStop::default();
        Clock { vm, stopped_at }
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
        let ns = probes::kvm_get_clock().run(|_| self.clock.vm.clock())?;
        self.clock.stopped_at.set(ns);
        Ok(())
    }

    fn start(&self) -> Result<(), kvm::Error> {
        let Some(ns) = self.clock.stopped_at.get() else {
            return Ok(());
        };
        probes::kvm_set_clock().run(|_| {
            self.clock.vm.set_clock(ns)?;
            self.vcpus.iter().try_for_each(|vcpu| {
                let vcpu = vcpu.lock().unwrap_or_else(PoisonError::into_inner);
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

const STATE_VERSION: u32 = 1;

#[derive(Serialize, Deserialize)]
struct Saved {
    ns: u64,
}

impl DeviceState for Clock {
    fn name(&self) -> &CStr {
        c"kvmclock"
    }

    fn version(&self) -> u32 {
        STATE_VERSION
    }

    fn save(&mut self) -> Result<Vec<u8>, StateError> {
        let ns = match self.stopped_at.get() {
            Some(ns) => ns,
            None => self.vm.clock()?,
        };
        encode(&Saved { ns })
    }

    fn load(&mut self, version: u32, state: &[u8]) -> Result<(), StateError> {
        let Saved { ns } = decode(STATE_VERSION, version, state)?;
        self.stopped_at.set(ns);
        Ok(())
    }
}
