//! virtio over PCI (virtio 1.2, 4.1): a function with one BAR that holds all of a device's
//! structures, and the life of the device behind it.
//!
//! | offset in BAR 0 | what |
//! |---|---|
//! | 0x0000 | common configuration |
//! | 0x1000 | ISR |
//! | 0x2000 | the device's own configuration |
//! | 0x3000 | doorbells, 4 bytes for each queue; ioeventfds |
//! | 0x4000 | MSI-X table |
//! | 0x5000 | MSI-X pending bits |

mod capabilities;
mod life;
mod registers;
mod state;

use std::ffi::{CStr, CString};
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use vmm_sys_util::eventfd::EventFd;

use super::Device;
use super::worker::{Service, Worker};
use crate::devices::StateError;
use crate::devices::pci::config::{Config, Identity};
use crate::devices::pci::msix::{self, Msix};
use crate::devices::pci::{self, Backplane, Function, Root, Slot};
use crate::memory::GuestRam;
use crate::probes::Errno;
use crate::runstate::RunState;
use crate::runstate::notify::CallbackError;
use capabilities::PciCfg;
use registers::{Registers, Written};

/// Where the structures are in the BAR; see above.
mod at {
    pub(super) const COMMON: u64 = 0;
    pub(super) const ISR: u64 = 0x1000;
    pub(super) const DEVICE: u64 = 0x2000;
    pub(super) const NOTIFY: u64 = 0x3000;
    pub(super) const TABLE: u64 = 0x4000;
    pub(super) const PBA: u64 = 0x5000;
    /// Bytes that each of them may have.
    pub(super) const ROOM: u64 = 0x1000;
    pub(super) const BAR_SIZE: u64 = 0x8000;
    /// Bytes between two doorbells.
    pub(super) const NOTIFY_STRIDE: u64 = 4;
}

const BAR: usize = 0;
const VENDOR: u16 = 0x1af4;
/// What is added to a virtio device id to make a PCI one.
const DEVICE_BASE: u16 = 0x1040;
const SUBSYSTEM: u16 = 0x1100;

/// A device could not be put on the bus.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No place for it.
    #[error(transparent)]
    Full(#[from] pci::Full),
    /// Its interrupts.
    #[error(transparent)]
    Msix(#[from] msix::Error),
    /// Its thread or its doorbells.
    #[error("the worker of a device")]
    Worker(#[source] io::Error),
}

impl Errno for Error {
    fn errno(&self) -> i32 {
        match self {
            Error::Full(_) => libc::ENOSPC,
            Error::Msix(msix::Error::Kvm(source)) => source.errno(),
            Error::Msix(msix::Error::EventFd(source)) | Error::Worker(source) => source.errno(),
        }
    }
}

/// A virtio device as a PCI function.
pub struct VirtioPci {
    name: &'static CStr,
    config: Config,
    pci_cfg: PciCfg,
    msix: Msix,
    registers: Registers,
    /// The device's own configuration space.
    device_config: Vec<u8>,
    stage: Stage,
    worker: Worker,
    ram: GuestRam,
    kicks: Vec<EventFd>,
    status: Arc<AtomicU8>,
    isr: Arc<AtomicU8>,
}

/// Who has the device.
enum Stage {
    /// The transport: the driver has not started it.
    Idle(Box<dyn Device>),
    /// The worker.
    Serving,
    /// The transport: the driver has started it, and the VM is stopped.
    Stopped(Service),
    /// Nobody: its worker panicked.
    Lost,
}

impl VirtioPci {
    /// Puts `device` on the bus as a function called `name`.
    ///
    /// # Errors
    /// When the bus is full, or the host gives the device no thread or no interrupts.
    pub fn add(
        root: &mut Root,
        name: CString,
        device: Box<dyn Device>,
        ram: GuestRam,
    ) -> Result<Slot, Error> {
        let address = root.place(at::BAR_SIZE);
        root.add(|slot, backplane| Self::new(name, device, slot, address, ram, backplane))
    }

    fn new(
        name: CString,
        device: Box<dyn Device>,
        slot: Slot,
        address: u64,
        ram: GuestRam,
        backplane: Arc<dyn Backplane>,
    ) -> Result<Self, Error> {
        let kind = device.kind();
        let mut config = Config::new(&Identity {
            vendor: VENDOR,
            device: DEVICE_BASE + kind.id(),
            revision: 1,
            class: kind.class(),
            subsystem_vendor: VENDOR,
            subsystem: SUBSYSTEM,
        });
        config.add_bar(BAR, at::BAR_SIZE);
        config.place_bar(BAR, address);
        let sizes = device.queue_sizes();
        // One for each queue, and one for changes of the configuration.
        let vectors = sizes.len() + 1;
        let (table, pba) = (at::TABLE as u32, at::PBA as u32);
        let msix = Msix::new(
            &mut config,
            vectors,
            table,
            pba,
            slot.requester(),
            backplane,
        )?;
        let device_config = device.config().to_vec();
        let pci_cfg = capabilities::add(&mut config, device_config.len());
        let kick = |_| EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC);
        let kicks = sizes.iter().map(kick).collect::<io::Result<_>>();
        let registers = Registers::new(device.features(), sizes, vectors);
        // A device's name is given once and needed until the end: the handlers' list has it too.
        let name: &'static CStr = Box::leak(name.into_boxed_c_str());
        Ok(VirtioPci {
            config,
            pci_cfg,
            msix,
            registers,
            device_config,
            stage: Stage::Idle(device),
            worker: Worker::spawn(&name.to_string_lossy()).map_err(Error::Worker)?,
            name,
            ram,
            kicks: kicks.map_err(Error::Worker)?,
            status: Arc::default(),
            isr: Arc::default(),
        })
    }

    /// A store to common configuration: the registers take it, and say what else is to happen.
    fn write_common(&mut self, offset: u64, data: &[u8]) {
        let status = self.status.load(Ordering::SeqCst);
        match self.registers.write(offset, data, status) {
            Written::Nothing => {}
            Written::Status(value) => self.set_status(value),
            Written::QueueEnabled(index) => self.enable_queue(index),
            Written::QueueReset(index) => self.reset_queue(index),
        }
    }

    /// Signals a queue's doorbell for a store that was not KVM's to take.
    fn ring(&self, offset: u64) {
        let index = usize::try_from(offset / at::NOTIFY_STRIDE).unwrap_or(usize::MAX);
        if let Some(kick) = self.kicks.get(index) {
            // A counter that is full says the same.
            let _ = kick.write(1);
        }
    }

    /// The 4 bytes through which configuration space reaches into the BAR, if `offset..offset+len`
    /// is within them and what they point to is allowed.
    fn through_pci_cfg(&self, offset: u16, len: usize) -> Option<(u64, usize)> {
        let (target, width) = self.pci_cfg.target(&self.config, offset, len)?;
        let end = target.checked_add(width as u64)?;
        (end <= at::BAR_SIZE).then_some((target, width))
    }
}

impl Function for VirtioPci {
    fn name(&self) -> &'static CStr {
        self.name
    }

    fn config(&self) -> &Config {
        &self.config
    }

    fn read_config(&mut self, offset: u16, data: &mut [u8]) {
        match self.through_pci_cfg(offset, data.len()) {
            Some((target, width)) => {
                data.fill(0);
                let width = width.min(data.len());
                self.read_bar(BAR, target, &mut data[..width]);
            }
            None => self.config.read(offset, data),
        }
    }

    fn write_config(&mut self, offset: u16, data: &[u8]) {
        self.config.write(offset, data);
        if let Some((target, width)) = self.through_pci_cfg(offset, data.len()) {
            self.write_bar(BAR, target, &data[..width.min(data.len())]);
        }
        self.msix.config_written(&self.config);
    }

    fn read_bar(&mut self, _: usize, offset: u64, data: &mut [u8]) {
        let inside = offset % at::ROOM;
        data.fill(0);
        match offset - inside {
            at::COMMON => {
                let status = self.status.load(Ordering::SeqCst);
                self.registers.read(inside, data, status);
            }
            // Reading it clears it.
            at::ISR if inside == 0 => {
                if let Some(byte) = data.first_mut() {
                    *byte = self.isr.swap(0, Ordering::SeqCst);
                }
            }
            at::DEVICE => {
                let from = usize::try_from(inside).unwrap_or(usize::MAX);
                let bytes = self.device_config.get(from..).unwrap_or_default();
                for (byte, &value) in data.iter_mut().zip(bytes) {
                    *byte = value;
                }
            }
            at::TABLE => self.msix.read_table(inside, data),
            at::PBA => self.msix.read_pba(inside, data),
            _ => {}
        }
    }

    fn write_bar(&mut self, _: usize, offset: u64, data: &[u8]) {
        let inside = offset % at::ROOM;
        match offset - inside {
            at::COMMON => self.write_common(inside, data),
            at::NOTIFY => self.ring(inside),
            at::TABLE => self.msix.write_table(inside, data),
            _ => {}
        }
    }

    fn doorbells(&self, _: usize) -> Vec<(u64, &EventFd)> {
        let offsets = (at::NOTIFY..).step_by(at::NOTIFY_STRIDE as usize);
        offsets.zip(&self.kicks).collect()
    }

    fn reset(&mut self) {
        self.reset_device();
        self.config.reset();
        self.msix.reset();
    }

    fn claim(&mut self) -> io::Result<()> {
        self.with_device(|device| device.claim()).unwrap_or(Ok(()))
    }

    fn release(&mut self) {
        self.with_device(|device| device.release());
    }

    fn prepare(&mut self, running: bool, _: RunState) -> Result<(), CallbackError> {
        if running {
            self.claim()?;
        } else if let Stage::Serving = self.stage {
            self.worker.ask_stop();
        }
        Ok(())
    }

    fn change(&mut self, running: bool, _: RunState) -> Result<(), CallbackError> {
        if running {
            self.go_on();
            Ok(())
        } else {
            self.drain()
        }
    }

    fn version(&self) -> u32 {
        state::VERSION
    }

    fn save(&mut self) -> Result<Vec<u8>, StateError> {
        self.save_state()
    }

    fn load(&mut self, version: u32, state: &[u8]) -> Result<(), StateError> {
        self.load_state(version, state)
    }
}

#[cfg(test)]
mod tests;
