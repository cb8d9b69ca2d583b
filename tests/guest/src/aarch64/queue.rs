//! The ITS's command queue (GIC architecture, IHI 0069, chapter 5.3).

use super::registers::{Deadline, Registers};
use crate::Failure;
use crate::arena::Arena;

/// Bytes of the queue: 2048 commands.
const SIZE: u64 = 0x1_0000;
/// Bytes of a command.
const COMMAND: u64 = 32;

mod gits {
    pub(crate) const CBASER: u64 = 0x80;
    pub(crate) const CWRITER: u64 = 0x88;
    pub(crate) const CREADR: u64 = 0x90;
    /// Valid, inner-shareable, write-back.
    pub(crate) const CBASER_FLAGS: u64 = 1 << 63 | 7 << 59 | 1 << 10;
}

/// A command's first three words; the fourth is always 0.
pub(crate) type Command = [u64; 3];

/// `MAPD`: maps a device's interrupt translation table, of 2^`bits` events.
pub(crate) fn mapd(device: u32, itt: u64, bits: u32) -> Command {
    [
        0x08 | u64::from(device) << 32,
        u64::from(bits - 1),
        1 << 63 | itt,
    ]
}

/// `MAPD` with V = 0: unmaps a device.
pub(crate) fn unmap_device(device: u32) -> Command {
    [0x08 | u64::from(device) << 32, 0, 0]
}

/// `MAPC`: maps a collection to the redistributor of a processor.
pub(crate) fn mapc(collection: u64, processor: u64) -> Command {
    [0x09, 0, 1 << 63 | processor << 16 | collection]
}

/// `MAPTI`: maps an event of a device to an LPI and a collection.
pub(crate) fn mapti(device: u32, event: u32, lpi: u32, collection: u64) -> Command {
    [
        0x0a | u64::from(device) << 32,
        u64::from(lpi) << 32 | u64::from(event),
        collection,
    ]
}

/// `INVALL`: reads the LPI configuration of a collection again.
pub(crate) fn invall(collection: u64) -> Command {
    [0x0d, 0, collection]
}

/// `SYNC`: waits for what was done to a processor's redistributor.
pub(crate) fn sync(processor: u64) -> Command {
    [0x05, 0, processor << 16]
}

/// `INT`: raises an event.
pub(crate) fn int(device: u32, event: u32) -> Command {
    [0x03 | u64::from(device) << 32, u64::from(event), 0]
}

/// The queue, as the writer sees it.
pub(crate) struct Queue {
    its: Registers,
    base: u64,
    /// Where the next command goes.
    write: u64,
    /// Commands written that the ITS was not told of.
    waiting: u64,
}

impl Queue {
    /// Gives the ITS, which must be off, an empty queue.
    pub(crate) fn new(its: Registers, arena: &mut Arena) -> Result<Self, Failure> {
        let base = arena.take(SIZE, SIZE)?;
        its.write64(gits::CBASER, gits::CBASER_FLAGS | base | (SIZE / 4096 - 1));
        its.write64(gits::CWRITER, 0);
        Ok(Queue {
            its,
            base,
            write: 0,
            waiting: 0,
        })
    }

    /// Puts a command in; the ITS sees it at the next [`Queue::flush`], or when the queue is full.
    pub(crate) fn push(&mut self, command: Command) -> Result<(), Failure> {
        if (self.waiting + 1) * COMMAND >= SIZE {
            self.flush()?;
        }
        let slot = (self.base + self.write) as *mut [u64; 4];
        let [first, second, third] = command;
        // SAFETY: the queue is this guest's own RAM, and the ITS has read this slot already.
        unsafe { slot.write_volatile([first, second, third, 0]) };
        self.write = (self.write + COMMAND) % SIZE;
        self.waiting += 1;
        Ok(())
    }

    /// Lets the ITS carry out what was put in, and waits until it has.
    pub(crate) fn flush(&mut self) -> Result<(), Failure> {
        self.its.write64(gits::CWRITER, self.write);
        self.waiting = 0;
        let deadline = Deadline::seconds(60);
        while self.its.read64(gits::CREADR) != self.write {
            if deadline.passed() {
                return Err(Failure::CommandQueue);
            }
        }
        Ok(())
    }
}
