//! The virtual counter stands still while the guest does.
//!
//! Without this a guest that was stopped finds that its clock ran on, and timers that were far
//! away fire all at once. QEMU does the same (`kvm_adjvtime` in `target/arm/kvm.c`). One value
//! serves all vCPUs: KVM keeps one offset for the whole VM.

use std::ffi::CStr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::registers::TIMER_CNT;
use crate::devices::{DeviceState, StateError, decode, encode};
use crate::kvm::{self, Vcpu};
use crate::runstate::notify::CallbackError;
use crate::runstate::{RunState, StateHandler};

/// The counter, seen through the first vCPU; a handler and a device state at once.
#[derive(Clone)]
pub(super) struct Vtimer {
    vcpu: Arc<Mutex<Vcpu>>,
    /// What the counter said when the guest was stopped, until it runs again.
    frozen: Arc<Mutex<Option<u64>>>,
}

impl Vtimer {
    /// `vcpu` is the first vCPU.
    pub(super) fn new(vcpu: Arc<Mutex<Vcpu>>) -> Self {
        Vtimer {
            vcpu,
            frozen: Arc::default(),
        }
    }

    fn read(&self) -> Result<u64, kvm::Error> {
        let vcpu = self.vcpu.lock().unwrap_or_else(PoisonError::into_inner);
        vcpu.register64(TIMER_CNT)
    }

    fn frozen(&self) -> MutexGuard<'_, Option<u64>> {
        self.frozen.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl StateHandler for Vtimer {
    fn name(&self) -> &'static CStr {
        c"vtimer"
    }

    fn priority(&self) -> i32 {
        0
    }

    /// On a stop, reads the counter: here, before any handler's main callback, because what they
    /// do is time that the guest must not see.
    fn prepare(&mut self, running: bool, _: RunState) -> Result<(), CallbackError> {
        if !running {
            *self.frozen() = Some(self.read()?);
        }
        Ok(())
    }

    /// On a start, lets the counter go on from where it was.
    fn change(&mut self, running: bool, _: RunState) -> Result<(), CallbackError> {
        let mut frozen = self.frozen();
        if running && let Some(count) = *frozen {
            let vcpu = self.vcpu.lock().unwrap_or_else(PoisonError::into_inner);
            vcpu.set_register64(TIMER_CNT, count)?;
            *frozen = None;
        }
        Ok(())
    }
}

impl DeviceState for Vtimer {
    fn name(&self) -> &CStr {
        c"vtimer"
    }

    fn version(&self) -> u32 {
        1
    }

    fn save(&mut self) -> Result<Vec<u8>, StateError> {
        let frozen = *self.frozen();
        encode(&match frozen {
            Some(count) => count,
            // It never ran, or it would have been stopped.
            None => self.read()?,
        })
    }

    /// The counter is set when the VM starts, not now.
    fn load(&mut self, version: u32, state: &[u8]) -> Result<(), StateError> {
        let count = decode(DeviceState::version(self), version, state)?;
        *self.frozen() = Some(count);
        Ok(())
    }
}
