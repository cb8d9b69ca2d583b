//! What a machine boots, the first time and after each reset.
//!
//! A reset needs no code of each device's own: every device can load a state, and the one that it
//! had when the machine was built is a machine that was just switched on.

use std::sync::{Arc, Mutex, PoisonError};

use super::{Machine, lock};
use crate::arch;
use crate::devices::{DeviceState, StateError};
use crate::kvm::Vcpu;
use crate::memory::{self, GuestRam};
use crate::payload::Program;
use crate::probes::Errno;

/// A reset that failed. The machine is neither what it was nor what it is to be.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is nothing to boot: a migration's destination that was given no program.
    #[error("this monitor was given no program to boot again")]
    NoProgram,
    /// The interrupt controller, or the program.
    #[error(transparent)]
    Arch(#[from] arch::Error),
    /// Guest RAM.
    #[error("guest RAM")]
    Memory(#[from] memory::Error),
    /// A device did not take its state at power-on.
    #[error("device {name}")]
    Device {
        /// Its name.
        name: String,
        /// Why.
        source: StateError,
    },
}

impl Errno for Error {
    fn errno(&self) -> i32 {
        match self {
            Error::NoProgram => libc::ENOTSUP,
            Error::Arch(source) => source.errno(),
            Error::Memory(source) => source.errno(),
            Error::Device { source, .. } => source.errno(),
        }
    }
}

/// A program, and the machine that it starts on.
pub(super) struct Boot {
    program: Program,
    cmdline: String,
    vcpus: u32,
    /// The vCPU that starts.
    first: Arc<Mutex<Vcpu>>,
    /// What the devices but those of the PCI bus were when they were built: version and state, in
    /// the machine's order.
    power_on: Vec<(u32, Vec<u8>)>,
}

impl Boot {
    /// Notes what `devices` are now, before any program.
    pub(super) fn new(
        program: Program,
        cmdline: String,
        vcpus: &[Arc<Mutex<Vcpu>>],
        devices: &mut [Box<dyn DeviceState>],
    ) -> Result<Option<Self>, Error> {
        let Some(first) = vcpus.first() else {
            return Ok(None);
        };
        let mut power_on = Vec::with_capacity(devices.len());
        for device in devices {
            let state = device.save().map_err(|source| failed(&**device, source))?;
            power_on.push((device.version(), state));
        }
        Ok(Some(Boot {
            program,
            cmdline,
            vcpus: u32::try_from(vcpus.len()).unwrap_or(u32::MAX),
            first: Arc::clone(first),
            power_on,
        }))
    }

    /// Puts the program into RAM that is all zero, and the first vCPU at its start.
    pub(super) fn load(&self, ram: &GuestRam) -> Result<(), arch::Error> {
        let params = arch::BootParams {
            vcpus: self.vcpus,
            cmdline: &self.cmdline,
        };
        let entry = arch::load(ram, &self.program, &params)?;
        let mut first = self.first.lock().unwrap_or_else(PoisonError::into_inner);
        arch::set_entry(&mut first, &entry)
    }
}

impl Machine {
    /// Whether [`Machine::reset`] has something to boot.
    pub fn can_reset(&self) -> bool {
        self.boot.is_some()
    }

    /// Makes the machine what it was when it was switched on, with its program at the start.
    /// [`control::system_reset`](crate::control::system_reset) calls this while no vCPU runs.
    ///
    /// # Errors
    /// The first that fails; the guest can't run then.
    pub fn reset(&mut self) -> Result<(), Error> {
        let boot = self.boot.as_ref().ok_or(Error::NoProgram)?;
        lock(&self.pci).reset();
        self.irqchip.reset()?;
        for (device, (version, state)) in self.devices.iter_mut().zip(&boot.power_on) {
            let loaded = device.load(*version, state);
            loaded.map_err(|source| failed(&**device, source))?;
        }
        self.ram.clear()?;
        Ok(boot.load(&self.ram)?)
    }
}

fn failed(device: &dyn DeviceState, source: StateError) -> Error {
    Error::Device {
        name: device.name().to_string_lossy().into_owned(),
        source,
    }
}
