//! virtio 1.2 devices on PCI.
//!
//! `transport/` is what the guest's driver sees of any device; `worker.rs` the thread that serves a
//! device's queues; `queue.rs` what a device does with a queue. Each device has a file or a folder.
//!
//! A device belongs to one thread at a time: to its worker while it serves queues, to the transport
//! while it does not. So no device has a lock, and stopping a worker gives back everything that is
//! to be saved. A chain of buffers that no driver would offer ends the service until the driver
//! resets the device ([`Fault`]); the monitor stays up.

pub mod blk;
pub mod console;
pub mod net;
pub mod queue;
pub mod rng;
#[cfg(test)]
pub(crate) mod testing;
mod transport;
pub mod vsock;
mod worker;

use std::io;
use std::os::fd::RawFd;

pub use transport::{Error, VirtioPci};

use super::StateError;
use crate::memory;
use queue::Io;

/// Why a device can't go on with its queues: what the driver did, or what the host refused.
#[derive(Debug, thiserror::Error)]
pub enum Fault {
    /// A ring or a chain of descriptors is not what it can be.
    #[error("its queue")]
    Queue(#[from] virtio_queue::Error),
    /// A buffer lies outside RAM.
    #[error("a buffer")]
    Memory(#[from] memory::Error),
    /// A request is not made as its device requires.
    #[error("{0}")]
    Request(&'static str),
    /// The host.
    #[error("{0}")]
    Host(&'static str, #[source] io::Error),
}

/// A virtio device without its transport.
///
/// The methods from [`Device::start`] to [`Device::finish`] are called on the worker's thread, the
/// others while no worker serves the device.
pub trait Device: Send {
    /// What it is (virtio 1.2, chapter 5).
    fn kind(&self) -> Kind;
    /// The features that it offers, without those of queues and transport.
    fn features(&self) -> u64;
    /// The most descriptors of each of its queues; powers of two.
    fn queue_sizes(&self) -> &'static [u16];
    /// Its configuration space, which does not change.
    fn config(&self) -> &[u8];
    /// Takes what only one monitor may have at a time, such as a disk image. Said again, it does
    /// nothing.
    ///
    /// # Errors
    /// When somebody else has it.
    fn claim(&mut self) -> io::Result<()>;
    /// Gives that up: the guest is the destination's.
    fn release(&mut self);
    /// The driver has chosen `features`.
    ///
    /// # Errors
    /// When the host can't do one of them after all.
    fn accept(&mut self, features: u64) -> io::Result<()>;
    /// The driver has reset the device.
    fn reset(&mut self);
    /// What is to migrate besides the queues.
    ///
    /// # Errors
    /// When it can't be encoded.
    fn save(&mut self) -> Result<Vec<u8>, StateError>;
    /// Takes that over; hostile input.
    ///
    /// # Errors
    /// When it is not a state of this device.
    fn load(&mut self, state: &[u8]) -> Result<(), StateError>;

    /// What the worker waits for besides the driver's kicks. Each is looked at when it becomes
    /// readable or writable, once until it does so again.
    fn sources(&self) -> Vec<RawFd>;
    /// The worker begins, or begins again after a stop. On a destination this is the first time,
    /// and `arrived` is true.
    ///
    /// # Errors
    /// Those end the service.
    fn start(&mut self, io: &mut Io, arrived: bool) -> Result<(), Fault>;
    /// The driver may have put chains into `queue`. Called for every queue at the start too.
    ///
    /// # Errors
    /// Those end the service.
    fn kicked(&mut self, queue: usize, io: &mut Io) -> Result<(), Fault>;
    /// The source with this index is ready.
    ///
    /// # Errors
    /// Those end the service.
    fn ready(&mut self, source: usize, io: &mut Io) -> Result<(), Fault>;
    /// The worker is to stop: finish what is under way, begin nothing. Returns how many requests
    /// were under way.
    ///
    /// # Errors
    /// Those end the service.
    fn finish(&mut self, io: &mut Io) -> Result<u64, Fault>;
}

/// Kinds of devices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A network card.
    Net,
    /// A disk.
    Block,
    /// A console.
    Console,
    /// A source of randomness.
    Entropy,
    /// Sockets between guest and host.
    Vsock,
}

impl Kind {
    /// The virtio device id.
    fn id(self) -> u16 {
        match self {
            Kind::Net => 1,
            Kind::Block => 2,
            Kind::Console => 3,
            Kind::Entropy => 4,
            Kind::Vsock => 19,
        }
    }

    /// The PCI class code.
    fn class(self) -> u32 {
        match self {
            Kind::Net => 0x02_00_00,
            Kind::Block => 0x01_80_00,
            Kind::Console | Kind::Vsock => 0x07_80_00,
            Kind::Entropy => 0x00_ff_00,
        }
    }
}
