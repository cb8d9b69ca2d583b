//! PCI: one root bus behind an ECAM window, device functions with 64-bit memory BARs and MSI-X.
//!
//! There is no INTx, no I/O space and no bridge: nothing that this monitor models needs them. The
//! guest reaches configuration space and BARs by exits; the two things that happen for each request
//! do not exit: a queue's doorbell is an ioeventfd, an interrupt an irqfd. [`Backplane`] is where
//! both leave this module for KVM, so all of it is tested without.
//!
//! Locks: everything here is behind the one of [`Root`], which exits take and the stop path takes.
//! The data path takes none: a worker has its [`msix::Vector`]s.

mod backplane;
pub mod config;
pub mod msix;
mod root;
mod state;

use std::ffi::CStr;
use std::io;

use vmm_sys_util::eventfd::EventFd;

pub use backplane::KvmBackplane;
pub use root::{Ecam, Full, Root, SharedRoot, Slot, Window};
pub use state::{BusState, FunctionHandler, FunctionState};

use super::StateError;
use crate::kvm;
use crate::runstate::RunState;
use crate::runstate::notify::CallbackError;
use config::Config;

/// One device function on the root bus.
///
/// The guest is hostile: any offset inside configuration space or a BAR, and any width, must be
/// answered.
pub trait Function: Send {
    /// Its name in the stream, in probes and in reports.
    fn name(&self) -> &'static CStr;
    /// Its configuration space.
    fn config(&self) -> &Config;
    /// A load from configuration space.
    fn read_config(&mut self, offset: u16, data: &mut [u8]);
    /// A store to configuration space.
    fn write_config(&mut self, offset: u16, data: &[u8]);
    /// A load from the BAR with this index.
    fn read_bar(&mut self, bar: usize, offset: u64, data: &mut [u8]);
    /// A store to the BAR with this index.
    fn write_bar(&mut self, bar: usize, offset: u64, data: &[u8]);
    /// Places of a BAR where a store is nothing but a signal, and what it signals.
    fn doorbells(&self, bar: usize) -> Vec<(u64, &EventFd)>;
    /// Back to what it was at power-on.
    fn reset(&mut self);
    /// Takes what only one monitor may have at a time. Said again, it does nothing.
    ///
    /// # Errors
    /// When somebody else has it.
    fn claim(&mut self) -> io::Result<()>;
    /// Gives that up: the guest is the destination's.
    fn release(&mut self);
    /// Its part in [`StateHandler::prepare`](crate::runstate::StateHandler::prepare).
    ///
    /// # Errors
    /// What keeps the VM from running.
    fn prepare(&mut self, running: bool, state: RunState) -> Result<(), CallbackError>;
    /// Its part in [`StateHandler::change`](crate::runstate::StateHandler::change).
    ///
    /// # Errors
    /// What makes the state that it has now unfit to be saved.
    fn change(&mut self, running: bool, state: RunState) -> Result<(), CallbackError>;
    /// The version of what [`Function::save`] writes.
    fn version(&self) -> u32;
    /// The state, encoded. No vCPU runs.
    fn save(&mut self) -> Result<Vec<u8>, StateError>;
    /// Puts a saved state into this function; hostile input.
    fn load(&mut self, version: u32, state: &[u8]) -> Result<(), StateError>;
}

/// The message of a message-signalled interrupt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Msi {
    /// The address that is written to.
    pub address: u64,
    /// What is written.
    pub data: u32,
    /// Who writes: the requester id.
    pub device: u32,
}

/// What KVM does for PCI functions. A test puts a recorder in its place.
pub trait Backplane: Send + Sync {
    /// Connects `irqfd` to an interrupt of its own, which has no message yet; returns its number.
    ///
    /// # Errors
    /// What KVM says.
    fn connect(&self, irqfd: &EventFd) -> Result<u32, kvm::Error>;
    /// Gives the interrupt `gsi` a message, with the next [`Backplane::commit`].
    fn route(&self, gsi: u32, msi: Msi);
    /// Makes all routes what [`Backplane::route`] said.
    ///
    /// # Errors
    /// What KVM says; the routes are as they were then.
    fn commit(&self) -> Result<(), kvm::Error>;
    /// Signals `bell` when the guest stores to `address`, with no exit.
    ///
    /// # Errors
    /// What KVM says; stores to `address` exit then.
    fn attach(&self, address: u64, bell: &EventFd) -> Result<(), kvm::Error>;
    /// Undoes [`Backplane::attach`].
    fn detach(&self, address: u64, bell: &EventFd);
}
