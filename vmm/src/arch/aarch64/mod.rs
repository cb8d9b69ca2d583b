//! The arm64 board: GICv3 with one ITS, vCPUs under PSCI, the virtual counter.
//!
//! `[7]` is `its.rs`, `[7b]` `gic.rs`. What a migration saves and loads of them is there and in
//! `gic_state.rs` and `cpu_interface.rs`; the order is that of `Documentation/virt/kvm/devices/arm-vgic{-v3,-its}.rst`.

mod board;
mod boot;
mod cpu_interface;
mod fdt;
mod gic;
mod gic_state;
mod its;
mod its_tables;
mod layout;
mod registers;
mod timer;
mod vcpu;

use std::ffi::CStr;
use std::sync::{Arc, Mutex, PoisonError};

/// The console.
pub use crate::devices::pl011::Pl011 as Uart;
pub use board::Board;
pub use boot::{Entry, load};
pub use layout::{PCI, ram_layout};
pub use vcpu::{init_vcpu, set_entry, vcpu_state};

use kvm_bindings::{
    kvm_device_type_KVM_DEV_TYPE_ARM_VGIC_ITS, kvm_device_type_KVM_DEV_TYPE_ARM_VGIC_V3,
};

use super::{Finding, GuestClock, Mapped, has};
use crate::devices::DeviceState;
use crate::kvm::{self, Capability, Vcpu, Vm};
use crate::memory::GuestRam;
use crate::payload::{self, linux};
use crate::probes::Errno;
use crate::runstate::StateHandler;
use gic::Gic;
use its::Its;
use timer::Vtimer;

/// The architecture's name in the migration stream.
pub const NAME: &str = "aarch64";

/// What guests' clocks do during a migration unless said otherwise: the architecture has no way to
/// tell a guest that it was stopped, and one whose timers all fire at once may take that for a hang.
pub const GUEST_CLOCK: GuestClock = GuestClock::Freeze;

/// The board could not be built.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// KVM refused.
    #[error(transparent)]
    Kvm(#[from] kvm::Error),
    /// RAM that the memory map has no place for.
    #[error("{size:#x} bytes of RAM: give whole pages, and no more than 511 GiB")]
    Ram {
        /// Bytes asked for.
        size: u64,
    },
    /// More vCPUs than KVM takes or the memory map has redistributors for, or none.
    #[error("{asked} vCPUs: give 1 to {max}")]
    Vcpus {
        /// How many were asked for.
        asked: u32,
        /// How many there is room for.
        max: u32,
    },
    /// The payload can't be loaded.
    #[error(transparent)]
    Payload(#[from] payload::Error),
    /// The kernel can't be loaded.
    #[error(transparent)]
    Linux(#[from] linux::Error),
    /// The host has no random numbers.
    #[error("the device tree's seeds")]
    Random(#[from] getrandom::Error),
    /// The device tree does not fit together.
    #[error("the device tree")]
    Fdt(#[from] vm_fdt::Error),
}

impl Errno for Error {
    fn errno(&self) -> i32 {
        match self {
            Error::Kvm(source) => source.errno(),
            Error::Payload(source) => source.errno(),
            Error::Linux(source) => source.errno(),
            Error::Random(source) => source.raw_os_error().unwrap_or(libc::EIO),
            Error::Ram { .. } | Error::Vcpus { .. } | Error::Fdt(_) => libc::EINVAL,
        }
    }
}

/// What KVM has of this board. That its MSIs name their device goes without saying: it says so only of
/// a VM that has an ITS.
pub fn check(vm: &Vm) -> Vec<Finding> {
    let device = |kind, what: &str, without| Finding {
        what: what.to_owned(),
        there: vm.has_device(kind),
        needed: true,
        without,
    };
    vec![
        device(
            kvm_device_type_KVM_DEV_TYPE_ARM_VGIC_V3,
            "GICv3",
            "interrupts",
        ),
        device(
            kvm_device_type_KVM_DEV_TYPE_ARM_VGIC_ITS,
            "ITS",
            "PCI interrupts",
        ),
        has(
            vm,
            Capability::ArmPsci02,
            "PSCI 0.2",
            true,
            "second vCPUs, and no shutdowns",
        ),
    ]
}

/// The interrupt controller and the counter.
pub struct Irqchip {
    gic: Gic,
    its: Its,
    vtimer: Option<Vtimer>,
    guest_clock: GuestClock,
}

impl Irqchip {
    /// Creates GIC and ITS. The vCPUs come after it.
    pub fn create(vm: &Arc<Vm>, vcpus: u32, guest_clock: GuestClock) -> Result<Self, Error> {
        let max = layout::VCPUS_MAX.min(vm.max_vcpus());
        if !(1..=max).contains(&vcpus) {
            return Err(Error::Vcpus { asked: vcpus, max });
        }
        let gic = Gic::create(vm)?;
        let its = Its::create(vm)?;
        Ok(Irqchip {
            gic,
            its,
            vtimer: None,
            guest_clock,
        })
    }

    /// Initialises both, now that all vCPUs are there.
    pub fn init(&mut self, vcpus: &[Arc<Mutex<Vcpu>>]) -> Result<(), Error> {
        let mut affinities = Vec::with_capacity(vcpus.len());
        for vcpu in vcpus {
            let vcpu = vcpu.lock().unwrap_or_else(PoisonError::into_inner);
            affinities.push(gic_state::affinity(&vcpu)?);
        }
        self.gic.init(affinities)?;
        self.its.init()?;
        self.vtimer = vcpus
            .first()
            .map(|first| Vtimer::new(Arc::clone(first), self.guest_clock));
        Ok(())
    }

    /// Takes back what loading a state does not: LPIs and what the ITS maps, interrupts that are on or
    /// active. No vCPU runs.
    pub fn reset(&self) -> Result<(), Error> {
        self.its.reset()?;
        Ok(self.gic.reset()?)
    }

    /// What must be done when the VM starts and stops: on a stop first the ITS's tables, then the
    /// pending LPIs; the counter stops before both, in its `prepare`.
    pub fn handlers(&self, _vcpus: &[Arc<Mutex<Vcpu>>]) -> Vec<Box<dyn StateHandler>> {
        let mut handlers: Vec<Box<dyn StateHandler>> = Vec::new();
        if let Some(vtimer) = &self.vtimer {
            handlers.push(Box::new(vtimer.clone()));
        }
        handlers.push(Box::new(self.gic.handler()));
        handlers.push(Box::new(self.its.handler()));
        handlers
    }

    /// What migrates, to be loaded in this order after RAM and the vCPUs.
    pub fn devices(&self) -> Vec<Box<dyn DeviceState>> {
        let mut devices: Vec<Box<dyn DeviceState>> =
            vec![Box::new(self.gic.state()), Box::new(self.its.state())];
        if let Some(vtimer) = &self.vtimer {
            devices.push(Box::new(vtimer.clone()));
        }
        devices
    }

    /// Makes the ioctl that the handler called `handler` makes on a stop, alone: without a span,
    /// so that a benchmark can tell what the handler adds. The VM must be stopped. `false` when
    /// there is no such handler.
    pub fn bare_stop(&self, handler: &CStr) -> Result<bool, Error> {
        match handler.to_bytes() {
            b"its" => self.its.save_tables()?,
            b"gicv3" => self.gic.save_pending_tables()?,
            _ => return Ok(false),
        }
        Ok(true)
    }

    /// What the ITS maps, as its tables in `ram` said when its state was saved or loaded last;
    /// `None` before that.
    pub fn mapped(&self, ram: &GuestRam) -> Option<Mapped> {
        let baser = self.its.device_table()?;
        Some(its_tables::count(ram, baser))
    }
}
