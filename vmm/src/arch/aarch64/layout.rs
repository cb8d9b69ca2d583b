//! Where things are: the memory map, close to that of QEMU's `virt` machine.

use blackout_abi::guest::AARCH64_RAM_BASE;

use super::Error;
use crate::arch::Serial;
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

/// The console, a 16550 with its registers one byte apart.
pub const SERIAL: Serial = Serial {
    base: 0x0900_0000,
    size: 8,
    pio: false,
    gsi: 1,
};

/// Interrupts of the GIC, private ones included: 32 shared ones, the fewest that KVM makes. Each
/// further one costs a stop its registers, and devices use MSIs.
pub(super) const IRQS: u32 = 64;

/// The most vCPUs that the map has redistributors for.
pub(super) const VCPUS_MAX: u32 = ((SERIAL.base - GICR) / GICR_STRIDE) as u32;

/// KVM's default guest-physical address space has 40 bits.
const RAM_END: u64 = 1 << 40;

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
        const { assert!(GICD + GICD_SIZE <= ITS) };
        const { assert!(ITS + ITS_SIZE <= GICR) };
        assert!(GICR + u64::from(VCPUS_MAX) * GICR_STRIDE <= SERIAL.base);
        const { assert!(SERIAL.base + SERIAL.size <= AARCH64_RAM_BASE) };
    }
}
