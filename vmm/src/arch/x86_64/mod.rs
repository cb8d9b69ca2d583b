//! x86-64: a PC's interrupt controllers, PIT and COM1, and no firmware.
//!
//! `layout` is the address map, `boot` puts the payload and its page tables there, `cpuid` and
//! `vcpu` are what a vCPU can do and the state it is in, `irqchip` and `pit` are what KVM emulates
//! outside the vCPUs, `clock` is hop `[7]`, `power` is how a guest switches itself off.

mod at_stop;
mod boot;
mod clock;
mod cpuid;
mod irqchip;
mod layout;
mod pit;
mod power;
mod vcpu;

pub use boot::{Entry, load_payload, set_entry};
pub use irqchip::Irqchip;
pub use layout::{PCI, SERIAL, ram_layout};
pub use power::platform_devices;
pub use vcpu::{init_vcpu, vcpu_state};

use crate::probes::Errno;
use crate::{kvm, memory, payload};

/// This architecture's name in the migration stream.
pub const NAME: &str = "x86_64";

/// A machine of this architecture could not be built.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// KVM refused.
    #[error(transparent)]
    Kvm(#[from] kvm::Error),
    /// Guest RAM could not be written.
    #[error("boot pages")]
    Memory(#[from] memory::Error),
    /// The payload can't be loaded.
    #[error(transparent)]
    Payload(#[from] payload::Error),
    /// No machine has this much RAM.
    #[error("{0} bytes of guest RAM: want a multiple of 4 KiB, from 2 MiB to 64 GiB")]
    RamSize(u64),
}

impl Errno for Error {
    fn errno(&self) -> i32 {
        match self {
            Error::Kvm(source) => source.errno(),
            Error::Memory(source) => source.errno(),
            Error::Payload(source) => source.errno(),
            Error::RamSize(_) => libc::EINVAL,
        }
    }
}
