//! MSI-X: the capability, the vector table, the pending bits.
//!
//! A device signals a [`Vector`] from its worker's thread; the guest masks and unmasks it from its
//! vCPUs' threads. Neither waits for the other: a vector that is masked keeps what was signalled as
//! its pending bit, and whoever comes second, the one who signals or the one who unmasks, sees the
//! other.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::EventFd;

use super::super::StateError;
use super::config::Config;
use super::{Backplane, Msi};
use crate::kvm;

/// The capability's id.
const CAPABILITY: u8 = 0x11;

/// Bytes of a table entry: address, data, control.
pub const ENTRY: usize = 16;

/// Bits of the message control register.
const ENABLE: u16 = 1 << 15;
const MASK_ALL: u16 = 1 << 14;

/// An entry's control word: bit 0 masks it, the others are reserved.
const CONTROL: usize = 12;
const MASKED: u8 = 1;

/// Vectors could not be made.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No eventfd.
    #[error("an eventfd for an interrupt")]
    EventFd(#[source] io::Error),
    /// KVM refused.
    #[error(transparent)]
    Kvm(#[from] kvm::Error),
}

/// One interrupt of a device. Whoever has it can signal it.
#[derive(Debug)]
pub struct Vector {
    irqfd: EventFd,
    /// Whether signals are kept as pending: by its own mask, the function's, or MSI-X being off.
    masked: AtomicBool,
    pending: AtomicBool,
}

impl Vector {
    /// Raises the interrupt, now or when it is unmasked.
    pub fn signal(&self) {
        if self.masked.load(Ordering::SeqCst) {
            self.pending.store(true, Ordering::SeqCst);
            // Unmasked in between: then one of the two takes the pending bit, and sends.
            if self.masked.load(Ordering::SeqCst) || !self.pending.swap(false, Ordering::SeqCst) {
                return;
            }
        }
        self.send();
    }

    fn mask(&self) {
        self.masked.store(true, Ordering::SeqCst);
    }

    fn unmask(&self) {
        self.masked.store(false, Ordering::SeqCst);
        if self.pending.swap(false, Ordering::SeqCst) {
            self.send();
        }
    }

    fn send(&self) {
        // The only error is a counter that is full, which KVM empties at once.
        if let Err(error) = self.irqfd.write(1) {
            tracing::error!("an interrupt is lost: {error}");
        }
    }
}

/// A function's MSI-X.
pub struct Msix {
    vectors: Vec<Arc<Vector>>,
    gsis: Vec<u32>,
    table: Vec<[u8; ENTRY]>,
    /// What the interrupt of each vector is routed to.
    routed: Vec<Option<Msi>>,
    control: u16,
    /// Where the capability is in configuration space.
    at: u16,
    device: u32,
    backplane: Arc<dyn Backplane>,
}

/// What migrates besides configuration space.
#[derive(Debug, Serialize, Deserialize)]
pub struct Saved {
    table: Vec<[u8; ENTRY]>,
    pending: Vec<bool>,
}

/// An entry after a reset: masked, with no message.
const AT_RESET: [u8; ENTRY] = {
    let mut entry = [0; ENTRY];
    entry[CONTROL] = MASKED;
    entry
};

impl Msix {
    /// Adds the capability for `count` vectors, at least one, to `config`. The table is at `table`
    /// in the BAR with index 0, the pending bits at `pba`. `device` is the function's requester id.
    ///
    /// # Errors
    /// When an interrupt can't be connected.
    pub fn new(
        config: &mut Config,
        count: usize,
        table: u32,
        pba: u32,
        device: u32,
        backplane: Arc<dyn Backplane>,
    ) -> Result<Self, Error> {
        let mut body = Vec::from(((count - 1) as u16).to_le_bytes());
        body.extend(table.to_le_bytes());
        body.extend(pba.to_le_bytes());
        let at = config.add_capability(CAPABILITY, &body, &(ENABLE | MASK_ALL).to_le_bytes());
        let (mut vectors, mut gsis) = (Vec::new(), Vec::new());
        for _ in 0..count {
            let flags = libc::EFD_NONBLOCK | libc::EFD_CLOEXEC;
            let irqfd = EventFd::new(flags).map_err(Error::EventFd)?;
            gsis.push(backplane.connect(&irqfd)?);
            vectors.push(Arc::new(Vector {
                irqfd,
                masked: AtomicBool::new(true),
                pending: AtomicBool::new(false),
            }));
        }
        Ok(Msix {
            vectors,
            gsis,
            table: vec![AT_RESET; count],
            routed: vec![None; count],
            control: 0,
            at,
            device,
            backplane,
        })
    }

    /// The vector with this number, if there is one.
    pub fn vector(&self, number: u16) -> Option<Arc<Vector>> {
        self.vectors.get(usize::from(number)).cloned()
    }

    /// A load from the table.
    pub fn read_table(&self, offset: u64, data: &mut [u8]) {
        let table = self.table.as_flattened();
        for (at, byte) in (offset..).zip(data) {
            let at = usize::try_from(at).unwrap_or(usize::MAX);
            *byte = table.get(at).copied().unwrap_or(0);
        }
    }

    /// A store to the table.
    pub fn write_table(&mut self, offset: u64, data: &[u8]) {
        let Ok(offset) = usize::try_from(offset) else {
            return;
        };
        for (at, &byte) in (offset..).zip(data) {
            if let Some(entry) = self.table.get_mut(at / ENTRY) {
                match at % ENTRY {
                    0 => entry[0] = byte & !3,
                    CONTROL => entry[CONTROL] = byte & MASKED,
                    reserved if reserved > CONTROL => {}
                    other => entry[other] = byte,
                }
            }
        }
        let last = offset.saturating_add(data.len().saturating_sub(1));
        self.update(offset / ENTRY..last / ENTRY + 1);
    }

    /// A load from the pending bits.
    pub fn read_pba(&self, offset: u64, data: &mut [u8]) {
        for (at, byte) in (offset..).zip(data) {
            let first = usize::try_from(at).unwrap_or(usize::MAX).saturating_mul(8);
            let bits = self.vectors.iter().skip(first).take(8).enumerate();
            *byte = bits.fold(0, |byte, (bit, vector)| {
                byte | u8::from(vector.pending.load(Ordering::SeqCst)) << bit
            });
        }
    }

    /// Called after every store to configuration space: looks whether MSI-X was switched on or off,
    /// or the function masked.
    pub fn config_written(&mut self, config: &Config) {
        let control = config.word(self.at + 2) & (ENABLE | MASK_ALL);
        if control == self.control {
            return;
        }
        if (control & ENABLE) > (self.control & ENABLE) {
            // What was signalled when nobody could have heard it is not pending now.
            for vector in &self.vectors {
                vector.pending.store(false, Ordering::SeqCst);
            }
        }
        self.control = control;
        self.update(0..self.table.len());
    }

    /// Back to power-on; configuration space has been reset.
    pub fn reset(&mut self) {
        self.control = 0;
        self.table.fill(AT_RESET);
        for vector in &self.vectors {
            vector.mask();
            vector.pending.store(false, Ordering::SeqCst);
        }
    }

    /// What migrates besides configuration space.
    pub fn save(&self) -> Saved {
        let pending = self
            .vectors
            .iter()
            .map(|v| v.pending.load(Ordering::SeqCst));
        Saved {
            table: self.table.clone(),
            pending: pending.collect(),
        }
    }

    /// Takes over a state; `config` is the function's, loaded already. The routes are left for one
    /// [`Backplane::commit`] of all functions; until that is done nothing may run that signals.
    ///
    /// # Errors
    /// When the source had another number of vectors.
    pub fn load(&mut self, saved: &Saved, config: &Config) -> Result<(), StateError> {
        if saved.table.len() != self.table.len() || saved.pending.len() != self.table.len() {
            let problem = format!("{} interrupt vectors", saved.table.len());
            return Err(StateError::Invalid(problem));
        }
        for (entry, saved) in self.table.iter_mut().zip(&saved.table) {
            *entry = *saved;
            entry[0] &= !3;
            entry[CONTROL..].copy_from_slice(&[saved[CONTROL] & MASKED, 0, 0, 0]);
        }
        self.control = config.word(self.at + 2) & (ENABLE | MASK_ALL);
        for (number, &pending) in saved.pending.iter().enumerate() {
            let vector = &self.vectors[number];
            let masked = self.masked(number);
            vector.masked.store(masked, Ordering::SeqCst);
            vector.pending.store(pending, Ordering::SeqCst);
            if !masked {
                self.routed[number] = Some(self.message(number));
                self.backplane
                    .route(self.gsis[number], self.message(number));
            }
        }
        Ok(())
    }

    /// Makes the vectors in `numbers` what table and control say.
    fn update(&mut self, numbers: std::ops::Range<usize>) {
        let numbers = numbers.start.min(self.table.len())..numbers.end.min(self.table.len());
        let mut routed = false;
        for number in numbers.clone() {
            if self.masked(number) {
                self.vectors[number].mask();
            } else if self.routed[number] != Some(self.message(number)) {
                self.routed[number] = Some(self.message(number));
                self.backplane
                    .route(self.gsis[number], self.message(number));
                routed = true;
            }
        }
        if routed && let Err(error) = self.backplane.commit() {
            // The guest wrote a message that no interrupt controller takes.
            tracing::warn!(
                "{error}: {}: a device's interrupts go nowhere",
                error.source
            );
            self.routed.fill(None);
        }
        for number in numbers.filter(|&number| !self.masked(number)) {
            self.vectors[number].unmask();
        }
    }

    fn masked(&self, number: usize) -> bool {
        let off = self.control & (ENABLE | MASK_ALL) != ENABLE;
        off || self.table[number][CONTROL] & MASKED != 0
    }

    fn message(&self, number: usize) -> Msi {
        let [a, b, c, d, e, f, g, h, i, j, k, l, ..] = self.table[number];
        Msi {
            address: u64::from_le_bytes([a, b, c, d, e, f, g, h]),
            data: u32::from_le_bytes([i, j, k, l]),
            device: self.device,
        }
    }
}
