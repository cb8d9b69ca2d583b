//! The address map, close to that of QEMU's `virt` machine.
//!
//! | guest-physical | what | SPI |
//! |---|---|---|
//! | 0x0800_0000 | GICv3 distributor, 64 KiB | |
//! | 0x0808_0000 | ITS, 128 KiB: control frame, translation frame | |
//! | 0x080a_0000 | GICv3 redistributors, 128 KiB for each vCPU | |
//! | 0x0900_0000 | PL011, the console | 1 |
//! | 0x0901_0000 | PL031, the clock of the day | 2 |
//! | 0x0903_0000 | PL061, whose line 3 is the power button | 7 |
//! | 0x1000_0000–0x3eff_ffff | PCI: memory BARs below 4 GiB | |
//! | 0x3f00_0000 | PCI: ECAM, 1 MiB: bus 0 | |
//! | 0x4000_0000 | RAM: boot page, shared page, device tree, then the program | |
//! | 0x80_0000_0000–0xff_ffff_ffff | PCI: 64-bit memory BARs | |
//!
//! SPI n is the GIC's interrupt 32 + n. Nothing else uses them: PCI devices have MSIs.

use blackout_abi::guest::AARCH64_RAM_BASE;

use super::Error;
use crate::arch::PciWindows;
use crate::memory::PAGE_SIZE;

/// The distributor, 64 KiB.
pub(super) const GICD: u64 = 0x0800_0000;
/// The ITS, 128 KiB: the control frame and the translation frame.
pub(super) const ITS: u64 = 0x0808_0000;
/// Bytes of the ITS.
pub(super) const ITS_SIZE: u64 = 0x2_0000;
/// The redistributors, 128 KiB for each vCPU.
pub(super) const GICR: u64 = 0x080a_0000;
/// Bytes of one redistributor: its control frame and its SGI frame.
pub(super) const GICR_STRIDE: u64 = 0x2_0000;
/// Bytes of the distributor.
pub(super) const GICD_SIZE: u64 = 0x1_0000;

/// The console, a PL011.
pub(super) const SERIAL: u64 = 0x0900_0000;
/// Its interrupt.
pub(super) const SERIAL_SPI: u32 = 1;
/// The clock of the day, a PL031. Its interrupt is never raised, but drivers ask for one.
pub(super) const RTC: u64 = 0x0901_0000;
/// Its interrupt.
pub(super) const RTC_SPI: u32 = 2;
/// The power button's PL061.
pub(super) const GPIO: u64 = 0x0903_0000;
/// Its interrupt.
pub(super) const GPIO_SPI: u32 = 7;
/// Bytes of the registers of each of these.
pub(super) const DEVICE_SIZE: u64 = 0x1000;

/// Interrupts of the GIC, private ones included: 32 shared ones, the fewest that KVM makes. Each
/// further one costs a stop its registers, and devices use MSIs.
pub(super) const IRQS: u32 = 64;

/// The most vCPUs that the map has redistributors for.
pub(super) const VCPUS_MAX: u32 = ((SERIAL - GICR) / GICR_STRIDE) as u32;

/// Where the PCI host bridge's windows are.
pub const PCI: PciWindows = PciWindows {
    ecam: 0x3f00_0000..0x3f10_0000,
    mmio32: 0x1000_0000..0x3f00_0000,
    mmio64: RAM_END..1 << ADDRESS_BITS,
};

/// KVM's default guest-physical address space.
const ADDRESS_BITS: u32 = 40;
/// RAM has its lower half but for the first GiB, PCI its upper.
const RAM_END: u64 = 1 << (ADDRESS_BITS - 1);

/// The RAM regions of a machine with `size` bytes.
///
/// # Errors
/// When `size` is 0, is not made of whole pages, or does not fit the address space.
pub fn ram_layout(size: u64) -> Result<Vec<(u64, u64)>, Error> {
    let fits = size <= RAM_END - AARCH64_RAM_BASE;
    if size == 0 || !size.is_multiple_of(PAGE_SIZE) || !fits {
        return Err(Error::Ram { size });
    }
    Ok(vec![(AARCH64_RAM_BASE, size)])
}

#[cfg(test)]
mod tests {
    use std::ops::Range;

    use super::*;

    #[test]
    fn ram_is_one_region_of_whole_pages_below_the_end() {
        assert_eq!(ram_layout(0x1000).unwrap(), [(AARCH64_RAM_BASE, 0x1000)]);
        assert!(ram_layout(0).is_err());
        assert!(ram_layout(0x1001).is_err());
        assert!(ram_layout(u64::MAX - 0xfff).is_err());
    }

    #[test]
    fn nothing_overlaps() {
        let sized = |base: u64, size: u64| base..base + size;
        let ranges: [Range<u64>; 9] = [
            sized(GICD, GICD_SIZE),
            sized(ITS, ITS_SIZE),
            sized(GICR, u64::from(VCPUS_MAX) * GICR_STRIDE),
            sized(SERIAL, DEVICE_SIZE),
            sized(RTC, DEVICE_SIZE),
            sized(GPIO, DEVICE_SIZE),
            PCI.mmio32,
            PCI.ecam,
            sized(AARCH64_RAM_BASE, RAM_END - AARCH64_RAM_BASE),
        ];
        assert!(ranges.is_sorted_by(|a, b| a.end <= b.start));
        assert_eq!(PCI.mmio64.start, RAM_END);
    }
}
