//! Picks the architecture. Both sides export the same names, listed below.

#[cfg(target_arch = "aarch64")]
#[path = "aarch64/mod.rs"]
mod imp;
#[cfg(target_arch = "x86_64")]
#[path = "x86_64/mod.rs"]
mod imp;

pub use imp::{
    Board, Entry, Error, Irqchip, NAME, PCI, Uart, init_vcpu, load, ram_layout, set_entry,
    vcpu_state,
};

use std::ops::Range;

use crate::devices::bus;

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
