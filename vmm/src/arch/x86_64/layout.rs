//! The address map.
//!
//! | guest-physical | what |
//! |---|---|
//! | 0x0000 | free: a guest's real-mode trampoline, for instance |
//! | 0x1000 | GDT at entry |
//! | 0x4000 | boot page, `blackout_abi::guest::BootPage` |
//! | 0x5000 | the guest's shared page |
//! | 0x6000–0x8fff | stack at entry |
//! | 0x9000–0xefff | page tables at entry |
//! | 0xf000 | free RAM from here; there is no firmware, no VGA hole |
//! | 0x7000 | Linux: `boot_params` or PVH start info, then PVH's other tables |
//! | 0x2_0000 | Linux: command line |
//! | 0xe_0000–0xf_ffff | Linux: ACPI tables |
//! | 0x10_0000 | flat payloads; kernels, where they say |
//! | 0xc000_0000–0xdfff_ffff | PCI: memory BARs below 4 GiB |
//! | 0xe000_0000 | PCI: ECAM, 1 MiB: bus 0 |
//! | 0xfec0_0000 | I/O APIC |
//! | 0xfee0_0000 | local APICs, and where MSIs are written to |
//! | 0xfffb_c000 | four pages of KVM's own |
//! | 0x1_0000_0000 | the RAM that has no place below |
//! | 0x40_0000_0000–0x4f_ffff_ffff | PCI: 64-bit memory BARs |
//!
//! The 64-bit window ends below 2^39, the address width of small CPUs.
//!
//! | I/O port | what | GSI |
//! |---|---|---|
//! | 0x064, 0xcf9 | resets | |
//! | 0x3f8 | COM1 | 4 |
//! | 0x600 | ACPI PM1 registers | 9 |
//!
//! KVM has the PICs and the PIT at their usual ports.

use std::ops::Range;

use blackout_abi::guest;

use super::Error;
use crate::arch::PciWindows;
use crate::memory::PAGE_SIZE;

/// COM1, an I/O port.
pub(super) const SERIAL: u64 = 0x3f8;
/// Its ports.
pub(super) const SERIAL_SIZE: u64 = 8;
/// Its interrupt.
pub(super) const SERIAL_GSI: u32 = 4;
/// ACPI's PM1 registers, I/O ports: status, enable, control.
pub(super) const PM1: u64 = 0x600;
/// Their ports.
pub(super) const PM1_SIZE: u64 = 6;
/// ACPI's interrupt.
pub(super) const SCI_GSI: u32 = 9;
/// The keyboard controller's command port, and the command that pulses the CPU's reset line.
pub(super) const KEYBOARD_COMMAND: u64 = 0x64;
/// See [`KEYBOARD_COMMAND`].
pub(super) const PULSE_RESET: u8 = 0xfe;
/// The chipset's reset control register, and its bit that resets the CPU.
pub(super) const RESET_CONTROL: u64 = 0xcf9;
/// See [`RESET_CONTROL`].
pub(super) const RESET_CPU: u8 = 1 << 2;

/// Where the PCI host bridge's windows are.
pub const PCI: PciWindows = PciWindows {
    ecam: 0xe000_0000..0xe010_0000,
    mmio32: HOLE..0xe000_0000,
    mmio64: 0x40_0000_0000..0x50_0000_0000,
};

/// The GDT that the segments at entry come from.
pub(super) const GDT: u64 = 0x1000;
/// `rsp` at entry.
pub(super) const STACK_TOP: u64 = 0x9000;
/// The page tables at entry: PML4, PDPT, then one page directory for each of 4 GiB.
pub(super) const PAGE_TABLES: u64 = 0x9000;
/// Linux: what the kernel's first page is, `boot_params` or PVH's start info.
pub(super) const BOOT_INFO: u64 = 0x7000;
/// Linux: PVH's list of modules, one of which there is: the initial RAM disk.
pub(super) const MODULES: u64 = 0x8000;
/// Linux: PVH's memory map.
pub(super) const MEMORY_MAP: u64 = 0x8100;
/// Linux: the command line, with a NUL.
pub(super) const CMDLINE: u64 = 0x2_0000;
/// Linux: where PCs have graphics and firmware. It is RAM here, but kernels do not take it as such.
pub(super) const LEGACY_HOLE: Range<u64> = 0xa_0000..0x10_0000;
/// Linux: the ACPI tables, the RSDP first: in the range that old kernels search for it.
pub(super) const ACPI: Range<u64> = 0xe_0000..0x10_0000;
/// Linux: kernels lie here or higher.
pub(super) const KERNEL_MIN: u64 = 0x10_0000;
/// The I/O APIC.
pub(super) const IO_APIC: u32 = 0xfec0_0000;
/// Every vCPU's local APIC.
pub(super) const LOCAL_APIC: u32 = 0xfee0_0000;
/// What the monitor writes before the first instruction. No payload may lie here.
pub(super) const RESERVED: Range<u64> = GDT..0xf000;
/// Where a flat binary goes.
pub(super) const FLAT_PAYLOAD: u64 = 0x10_0000;
/// `KVM_SET_IDENTITY_MAP_ADDR`: one page.
pub(super) const KVM_IDENTITY_MAP: u64 = 0xfffb_c000;
/// `KVM_SET_TSS_ADDR`: three pages.
pub(super) const KVM_TSS: u64 = 0xfffb_d000;

/// RAM ends here below 4 GiB.
const HOLE: u64 = 0xc000_0000;
/// RAM goes on here.
const HIGH: u64 = 1 << 32;
const MIN_RAM: u64 = 2 << 20;
const MAX_RAM: u64 = 64 << 30;

const _: () = assert!(guest::X86_64_RAM_BASE == 0);
const _: () = assert!(HIGH + MAX_RAM <= PCI.mmio64.start);
const _: () = assert!(RESERVED.start <= guest::X86_64_BOOT_PAGE);
const _: () = assert!(guest::X86_64_BOOT_PAGE + guest::SHARED_PAGE_OFFSET + PAGE_SIZE < STACK_TOP);

/// The regions of `size` bytes of RAM, as guest-physical address and size.
///
/// # Errors
/// When a machine can't have that much.
pub fn ram_layout(size: u64) -> Result<Vec<(u64, u64)>, Error> {
    if !(MIN_RAM..=MAX_RAM).contains(&size) || !size.is_multiple_of(PAGE_SIZE) {
        return Err(Error::RamSize(size));
    }
    let mut regions = vec![(guest::X86_64_RAM_BASE, size.min(HOLE))];
    if size > HOLE {
        regions.push((HIGH, size - HOLE));
    }
    Ok(regions)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ram_leaves_out_the_hole_below_4_gib() {
        let rows: &[(u64, &[(u64, u64)])] = &[
            (MIN_RAM, &[(0, MIN_RAM)]),
            (HOLE, &[(0, HOLE)]),
            (HOLE + 0x1000, &[(0, HOLE), (HIGH, 0x1000)]),
            (4 << 30, &[(0, HOLE), (HIGH, 1 << 30)]),
        ];
        for &(size, regions) in rows {
            assert_eq!(ram_layout(size).unwrap(), regions, "{size:#x}");
        }
    }

    #[test]
    fn a_size_that_no_machine_has_is_refused() {
        for size in [0, 0x1000, MIN_RAM + 1, MAX_RAM + 0x1000, u64::MAX] {
            assert!(ram_layout(size).is_err(), "{size:#x}");
        }
    }
}
