//! The virtual counter stands still while the guest does.
//!
//! Without this a guest that was stopped finds that its clock ran on, and timers that were far
//! away fire all at once. QEMU does the same (`kvm_adjvtime` in `target/arm/kvm.c`). One value
//! serves all vCPUs: KVM keeps one offset for the whole VM.
//!
//! A guest that comes from another host may be given the time that its way took
//! ([`GuestClock::Advance`]).

use std::ffi::CStr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};

use super::registers::TIMER_CNT;
use crate::arch::{GuestClock, passed_since, realtime_ns};
use crate::devices::{DeviceState, StateError, decode, encode};
use crate::kvm::{self, Vcpu};
use crate::runstate::notify::CallbackError;
use crate::runstate::{RunState, StateHandler};

/// The counter, seen through the first vCPU; a handler and a device state at once.
#[derive(Clone)]
pub(super) struct Vtimer {
    vcpu: Arc<Mutex<Vcpu>>,
    /// What it was when the guest was stopped, until it runs again.
    frozen: Arc<Mutex<Option<Frozen>>>,
    guest_clock: GuestClock,
}

/// The counter on a stop.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
struct Frozen {
    count: u64,
    /// When that was: `CLOCK_REALTIME`, ns.
    at: u64,
}

impl Frozen {
    /// What the counter is now, had it gone on at `frequency` Hz for `ns`.
    fn advanced(self, ns: u64, frequency: u64) -> u64 {
        let ticks = u128::from(ns) * u128::from(frequency) / 1_000_000_000;
        self.count.wrapping_add(ticks as u64)
    }
}

impl Vtimer {
    /// `vcpu` is the first vCPU.
    pub(super) fn new(vcpu: Arc<Mutex<Vcpu>>, guest_clock: GuestClock) -> Self {
        Vtimer {
            vcpu,
            frozen: Arc::default(),
            guest_clock,
        }
    }

    fn read(&self) -> Result<Frozen, kvm::Error> {
        let vcpu = self.vcpu.lock().unwrap_or_else(PoisonError::into_inner);
        let count = vcpu.register64(TIMER_CNT)?;
        let at = realtime_ns();
        Ok(Frozen { count, at })
    }

    fn frozen(&self) -> MutexGuard<'_, Option<Frozen>> {
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
        if running && let Some(Frozen { count, .. }) = *frozen {
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
        2
    }

    fn save(&mut self) -> Result<Vec<u8>, StateError> {
        let frozen = *self.frozen();
        encode(&match frozen {
            Some(frozen) => frozen,
            // It never ran, or it would have been stopped.
            None => self.read()?,
        })
    }

    /// The counter is set when the VM starts, not now; what time it has lost by now is added here.
    fn load(&mut self, version: u32, state: &[u8]) -> Result<(), StateError> {
        let mut frozen: Frozen = decode(DeviceState::version(self), version, state)?;
        if self.guest_clock == GuestClock::Advance {
            frozen.count = frozen.advanced(passed_since(frozen.at), kvm::counter_frequency());
        }
        *self.frozen() = Some(frozen);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_counter_goes_on_at_its_frequency_and_never_overflows() {
        let frozen = Frozen { count: 100, at: 0 };
        assert_eq!(frozen.advanced(1_500_000_000, 1_000_000), 1_500_100);
        assert_eq!(frozen.advanced(0, u64::MAX), 100);
        frozen.advanced(u64::MAX, u64::MAX);
    }
}
