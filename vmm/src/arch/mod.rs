//! Picks the architecture. Both sides export the same names, listed below.

#[cfg(target_arch = "aarch64")]
#[path = "aarch64/mod.rs"]
mod imp;
#[cfg(target_arch = "x86_64")]
#[path = "x86_64/mod.rs"]
mod imp;

pub use imp::{
    Board, Entry, Error, GUEST_CLOCK, Irqchip, NAME, PCI, Uart, check, init_vcpu, load, ram_layout,
    set_entry, vcpu_state,
};

use std::ops::Range;
use std::time::SystemTime;

use crate::devices::bus;
use crate::kvm::{Capability, Vm};

/// What a guest's clock does while the guest is on its way from one host to another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GuestClock {
    /// It goes on: the guest's time stays right, and finds that time has passed.
    Advance,
    /// It stands still: the guest does not notice, and its time is late by what the move took.
    Freeze,
}

/// Nanoseconds from `then` to now, both of `CLOCK_REALTIME`; 0 when the clocks of the two hosts
/// disagree so much that `then` is yet to come.
pub(crate) fn passed_since(then: u64) -> u64 {
    realtime_ns().saturating_sub(then)
}

/// `CLOCK_REALTIME`, ns: the one clock that two hosts share, as far as they share any.
pub(crate) fn realtime_ns() -> u64 {
    let now = SystemTime::UNIX_EPOCH.elapsed().unwrap_or_default();
    u64::try_from(now.as_nanos()).unwrap_or(u64::MAX)
}

/// One thing that KVM has or lacks.
#[derive(Clone, Debug)]
pub struct Finding {
    /// What it is for, in a person's words.
    pub what: String,
    /// Whether it is there.
    pub there: bool,
    /// Whether no guest runs without it.
    pub needed: bool,
    /// What does not work without it.
    pub without: &'static str,
}

/// Whether `vm` has `capability`.
pub(crate) fn has(
    vm: &Vm,
    capability: Capability,
    what: &str,
    needed: bool,
    without: &'static str,
) -> Finding {
    Finding {
        what: what.to_owned(),
        there: vm.check_extension(capability) > 0,
        needed,
        without,
    }
}

/// Where the PCI host bridge's windows are, guest-physical.
#[derive(Clone, Debug)]
pub struct PciWindows {
    /// Configuration space, 1 MiB for each bus, from bus 0.
    pub ecam: Range<u64>,
    /// Memory BARs below 4 GiB.
    pub mmio32: Range<u64>,
    /// 64-bit memory BARs.
    pub mmio64: Range<u64>,
}

/// A device that belongs to the architecture's board, and where it is.
#[derive(Clone)]
pub struct BoardDevice {
    /// Its first address: MMIO, or an I/O port when `pio`.
    pub base: u64,
    /// Bytes of its range.
    pub size: u64,
    /// Whether `base` is a port.
    pub pio: bool,
    /// The device.
    pub device: bus::Shared,
}

/// What a program is told of its machine, besides what the architecture knows itself.
#[derive(Clone, Copy, Debug)]
pub struct BootParams<'a> {
    /// vCPUs of the machine.
    pub vcpus: u32,
    /// The guest's command line.
    pub cmdline: &'a str,
}

/// What an interrupt translation service maps.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Mapped {
    /// Devices.
    pub devices: u64,
    /// Events of all of them.
    pub events: u64,
}
