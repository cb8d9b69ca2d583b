//! x86-64: a PC's interrupt controllers, PIT and COM1, and no firmware.
//!
//! `layout` is the address map, `boot` puts the payload and its page tables there, `cpuid` and
//! `vcpu` are what a vCPU can do and the state it is in, `irqchip` and `pit` are what KVM emulates
//! outside the vCPUs, `clock` is hop `[7]`, `power` is how a guest switches itself off.

mod acpi;
mod at_stop;
mod board;
mod boot;
mod clock;
mod cpuid;
mod irqchip;
mod layout;
mod linux;
mod pit;
mod power;
mod vcpu;

pub use board::Board;
pub use boot::{Entry, load, set_entry};
pub use irqchip::Irqchip;
pub use layout::{PCI, ram_layout};
pub use vcpu::{init_vcpu, vcpu_state};

/// The console.
pub use crate::devices::serial::Serial as Uart;

use std::io;
use std::path::Path;

use crate::arch::{Finding, GuestClock, has};
use crate::kvm::{Capability, Vm};
use crate::payload::linux::Error as LinuxError;
use crate::probes::Errno;
use crate::{kvm, memory, payload};

/// This architecture's name in the migration stream.
pub const NAME: &str = "x86_64";

/// What guests' clocks do during a migration unless said otherwise: kvmclock can tell a guest that it
/// was stopped, so its watchdogs do not mind, and its time stays right.
pub const GUEST_CLOCK: GuestClock = GuestClock::Advance;

/// What KVM has of this board.
pub fn check(vm: &Vm) -> Vec<Finding> {
    use Capability::{AdjustClock, Irqchip, Pit2, TscControl, TscDeadlineTimer, Xsave2};
    let module = |name: &str| Path::new("/sys/module").join(name).exists();
    vec![
        has(
            vm,
            Irqchip,
            "PICs, I/O APIC and local APICs",
            true,
            "interrupts",
        ),
        has(vm, Pit2, "PIT", true, "timers at boot"),
        has(
            vm,
            AdjustClock,
            "kvmclock that can be set",
            true,
            "migrations",
        ),
        has(
            vm,
            Xsave2,
            "states of large CPU features",
            false,
            "guests have no AMX",
        ),
        has(
            vm,
            TscDeadlineTimer,
            "deadline timers",
            false,
            "timers take more exits",
        ),
        has(
            vm,
            TscControl,
            "scaled TSCs",
            false,
            "a guest moves only to hosts whose TSC is as fast",
        ),
        Finding {
            what: "a CPU's own virtualization".to_owned(),
            there: module("kvm_intel") || module("kvm_amd") || !module("kvm_pvm"),
            needed: false,
            without: "only bare-metal guests run, and slowly: PVM boots no stock Linux",
        },
    ]
}

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
    /// The kernel can't be loaded.
    #[error(transparent)]
    Linux(#[from] LinuxError),
    /// The console's interrupt.
    #[error("the console's irqfd")]
    Irqfd(#[source] io::Error),
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
            Error::Linux(source) => source.errno(),
            Error::Irqfd(source) => source.errno(),
            Error::RamSize(_) => libc::EINVAL,
        }
    }
}
