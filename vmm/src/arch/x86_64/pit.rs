//! The interval timer: its state, and the handler that keeps it from ticking while the VM is
//! stopped.
//!
//! KVM's PIT goes on after the vCPUs are paused, counts the ticks that no vCPU takes, and delivers
//! them all once one runs. Setting its state again on a start drops them, as QEMU's
//! `hw/i386/kvm/i8254.c` does.

use std::ffi::CStr;
use std::sync::Arc;

use kvm_bindings::kvm_pit_state2;
use serde::{Deserialize, Serialize};

use super::at_stop::AtStop;
use crate::devices::{DeviceState, StateError, decode, encode};
use crate::kvm::Vm;
use crate::runstate::{CallbackError, RunState, StateHandler};

/// The interval timer. Clones share it: one is the handler, one the state that migrates.
#[derive(Clone, Debug)]
pub(super) struct Pit {
    vm: Arc<Vm>,
    stopped_at: AtStop<kvm_pit_state2>,
}

impl Pit {
    /// The PIT of `vm`.
    pub(super) fn new(vm: Arc<Vm>) -> Self {
        let stopped_at = AtStop::default();
        Pit { vm, stopped_at }
    }
}

impl StateHandler for Pit {
    fn name(&self) -> &'static CStr {
        c"pit"
    }

    fn priority(&self) -> i32 {
        0
    }

    fn prepare(&mut self, _running: bool, _state: RunState) -> Result<(), CallbackError> {
        Ok(())
    }

    fn change(&mut self, running: bool, _state: RunState) -> Result<(), CallbackError> {
        if !running {
            self.stopped_at.set(self.vm.pit()?);
        } else if let Some(pit) = self.stopped_at.get() {
            self.vm.set_pit(&pit)?;
        }
        Ok(())
    }
}

const STATE_VERSION: u32 = 1;

#[derive(Serialize, Deserialize)]
struct Saved {
    pit: kvm_pit_state2,
}

impl DeviceState for Pit {
    fn name(&self) -> &CStr {
        c"pit"
    }

    fn version(&self) -> u32 {
        STATE_VERSION
    }

    fn save(&mut self) -> Result<Vec<u8>, StateError> {
        let pit = match self.stopped_at.get() {
            Some(pit) => pit,
            None => self.vm.pit()?,
        };
        encode(&Saved { pit })
    }

    /// KVM gets the state at the start; here it only says whether it takes it.
    fn load(&mut self, version: u32, state: &[u8]) -> Result<(), StateError> {
        let Saved { pit } = decode(STATE_VERSION, version, state)?;
        self.vm.set_pit(&pit)?;
        self.stopped_at.set(pit);
        Ok(())
    }
}
