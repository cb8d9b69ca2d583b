//! A queue as a device's worker sees it: chains of buffers come out, used ones go back.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vmm_sys_util::eventfd::EventFd;

use super::Fault;
use crate::devices::pci::msix::Vector;
use crate::memory::GuestRam;
use crate::memory::transfer::Pieces;

/// Bits of the ISR register, for drivers without MSI-X.
pub(super) const ISR_QUEUE: u8 = 1;
pub(super) const ISR_CONFIG: u8 = 2;

/// What a device reaches the guest by.
#[derive(Debug)]
pub struct Io {
    /// Guest RAM.
    pub ram: GuestRam,
    /// Its queues; those that the driver did not enable are missing.
    pub queues: Vec<Option<ActiveQueue>>,
}

/// Buffers that the driver offers with one descriptor chain. All of them lie in RAM.
#[derive(Debug)]
pub struct Chain {
    /// What gives the chain back.
    pub head: u16,
    /// What the device reads.
    pub readable: Pieces,
    /// What the device writes, after that.
    pub writable: Pieces,
}

/// A queue that is enabled.
#[derive(Debug)]
pub struct ActiveQueue {
    /// The rings and where in them the device is.
    pub(super) queue: Queue,
    /// What the driver's doorbell signals.
    pub(super) kick: EventFd,
    /// The interrupt that says that buffers were used.
    pub(super) vector: Option<Arc<Vector>>,
    pub(super) isr: Arc<AtomicU8>,
    /// Buffers were used since the last look at whether the driver wants to know.
    pub(super) used: bool,
}

impl Io {
    /// The next chain of the queue `index`; with none there, the driver's next one kicks. A queue
    /// that is not enabled never has one.
    ///
    /// # Errors
    /// When ring or chain are not what they can be.
    pub fn next(&mut self, index: usize) -> Result<Option<Chain>, Fault> {
        match self.queues.get_mut(index) {
            Some(Some(queue)) => queue.next(&self.ram),
            _ => Ok(None),
        }
    }

    /// Puts the chain that [`Io::next`] returned last back, untouched.
    pub fn put_back(&mut self, index: usize) {
        if let Some(Some(queue)) = self.queues.get_mut(index) {
            queue.queue.go_to_previous_position();
        }
    }

    /// Gives a chain back after `len` bytes were written to it.
    ///
    /// # Errors
    /// When it can't be one of this queue's, or the ring is not in RAM.
    pub fn done(&mut self, index: usize, head: u16, len: usize) -> Result<(), Fault> {
        if let Some(Some(queue)) = self.queues.get_mut(index) {
            let len = u32::try_from(len).unwrap_or(u32::MAX);
            queue.queue.add_used(self.ram.mem(), head, len)?;
            queue.used = true;
        }
        Ok(())
    }

    /// Interrupts the guest if buffers of the queue were used and the driver wants to know.
    ///
    /// # Errors
    /// When the ring is not in RAM.
    pub fn notify(&mut self, index: usize) -> Result<(), Fault> {
        if let Some(Some(queue)) = self.queues.get_mut(index)
            && std::mem::take(&mut queue.used)
            && queue.queue.needs_notification(self.ram.mem())?
        {
            queue.interrupt();
        }
        Ok(())
    }

    /// Has the worker look at the queue again, after it has looked whether it is to stop.
    pub fn again(&self, index: usize) {
        if let Some(Some(queue)) = self.queues.get(index) {
            // A counter that is full says the same.
            let _ = queue.kick.write(1);
        }
    }

    /// Whether the driver has enabled the queue.
    pub fn has(&self, index: usize) -> bool {
        matches!(self.queues.get(index), Some(Some(_)))
    }
}

impl ActiveQueue {
    /// Interrupts the guest, whatever it wants.
    pub(super) fn interrupt(&self) {
        match &self.vector {
            Some(vector) => vector.signal(),
            None => {
                self.isr.fetch_or(ISR_QUEUE, Ordering::SeqCst);
            }
        }
    }

    fn next(&mut self, ram: &GuestRam) -> Result<Option<Chain>, Fault> {
        // The second look is for a chain that came between the first and asking for a kick.
        for _ in 0..2 {
            if let Some(chain) = self.queue.iter(ram.mem())?.next() {
                let head = chain.head_index();
                let (mut readable, mut writable) = (Vec::new(), Vec::new());
                for descriptor in chain {
                    let range = (descriptor.addr().0, descriptor.len());
                    if descriptor.is_write_only() {
                        writable.push(range);
                    } else if writable.is_empty() {
                        readable.push(range);
                    } else {
                        return Err(Fault::Request(
                            "a chain has a readable buffer after a writable one",
                        ));
                    }
                }
                return Ok(Some(Chain {
                    head,
                    readable: ram.pieces(readable)?,
                    writable: ram.pieces(writable)?,
                }));
            }
            if !self.queue.enable_notification(ram.mem())? {
                return Ok(None);
            }
        }
        Err(Fault::Request("the available ring can't be read"))
    }
}
