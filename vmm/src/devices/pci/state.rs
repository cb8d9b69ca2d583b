//! What of the bus is told when the VM stops and starts, and what goes with the guest: each function
//! by itself, and the bus after them all.

use std::ffi::CStr;

use super::root::{SharedRoot, Slot, lock};
use crate::devices::{DeviceState, StateError};
use crate::runstate::notify::CallbackError;
use crate::runstate::{RunState, StateHandler};

/// One function's part in stops and starts. Above the interrupt controllers: it is done with its
/// last interrupt before they write down which are pending.
pub struct FunctionHandler {
    root: SharedRoot,
    slot: Slot,
    name: &'static CStr,
}

impl FunctionHandler {
    /// The part of the function at `slot`.
    pub fn new(root: &SharedRoot, slot: Slot) -> Self {
        FunctionHandler {
            root: SharedRoot::clone(root),
            slot,
            name: lock(root).function(slot).name(),
        }
    }
}

impl StateHandler for FunctionHandler {
    fn name(&self) -> &'static CStr {
        self.name
    }

    fn priority(&self) -> i32 {
        40
    }

    /// On a stop, asks its worker to finish; all devices' workers do at the same time. On a start,
    /// takes what only one monitor may have.
    fn prepare(&mut self, running: bool, state: RunState) -> Result<(), CallbackError> {
        lock(&self.root).function(self.slot).prepare(running, state)
    }

    /// On a stop, waits for that; on a start, lets the worker go on.
    fn change(&mut self, running: bool, state: RunState) -> Result<(), CallbackError> {
        lock(&self.root).function(self.slot).change(running, state)
    }
}

/// One function's state.
pub struct FunctionState {
    root: SharedRoot,
    slot: Slot,
    name: &'static CStr,
}

impl FunctionState {
    /// The state of the function at `slot`.
    pub fn new(root: &SharedRoot, slot: Slot) -> Self {
        FunctionState {
            root: SharedRoot::clone(root),
            slot,
            name: lock(root).function(slot).name(),
        }
    }
}

impl DeviceState for FunctionState {
    fn name(&self) -> &CStr {
        self.name
    }

    fn version(&self) -> u32 {
        lock(&self.root).function(self.slot).version()
    }

    fn save(&mut self) -> Result<Vec<u8>, StateError> {
        lock(&self.root).function(self.slot).save()
    }

    fn load(&mut self, version: u32, state: &[u8]) -> Result<(), StateError> {
        lock(&self.root).function(self.slot).load(version, state)
    }
}

/// The bus's state, to be loaded after every function's: then KVM gets all their routes in one
/// call, and their doorbells.
pub struct BusState(pub SharedRoot);

impl DeviceState for BusState {
    fn name(&self) -> &CStr {
        c"pci"
    }

    fn version(&self) -> u32 {
        lock(&self.0).bridge().version()
    }

    fn save(&mut self) -> Result<Vec<u8>, StateError> {
        lock(&self.0).bridge().save()
    }

    fn load(&mut self, version: u32, state: &[u8]) -> Result<(), StateError> {
        let mut root = lock(&self.0);
        root.bridge().load(version, state)?;
        root.connect()
    }
}
