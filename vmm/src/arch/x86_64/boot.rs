//! How a program starts: Linux in protected mode, see `linux.rs`; a payload in 64-bit mode, at
//! privilege 0, with the first 4 GiB mapped one to one.
//!
//! In the latter `rdi` holds the address of the boot page, `rsp` the top of a small stack, every other general
//! register 0. Interrupts are off, there is no IDT, and SSE may be used. Pages of 2 MiB map the
//! first 4 GiB, writable and executable; a guest with RAM above that maps it itself. The other
//! vCPUs wait for INIT and SIPI. `layout` says where everything lies.

use std::path::Path;

use blackout_abi::guest::{BOOT_MAGIC, BootPage, X86_64_BOOT_PAGE, X86_64_RAM_BASE};
use kvm_bindings::{kvm_dtable, kvm_regs, kvm_segment};
use object::elf::EM_X86_64;

use super::{Error, layout, linux};
use crate::arch::BootParams;
use crate::kvm::Vcpu;
use crate::memory::{GuestRam, PAGE_SIZE};
use crate::payload::{self, Program, Target};

/// Where the first vCPU starts, and how.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    mode: Mode,
    rip: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    /// 64-bit mode, with the boot page.
    Long,
    /// 32-bit protected mode without paging; `info` is what `ebx` (PVH) and `esi` (Linux's boot
    /// protocol) point to.
    Protected { info: u64 },
}

impl Entry {
    /// An entry in 32-bit protected mode.
    pub(super) fn protected(eip: u64, info: u64) -> Self {
        Entry {
            mode: Mode::Protected { info },
            rip: eip,
        }
    }
}

/// Null, 64-bit code, 32-bit code, data: descriptors as the CPU reads them (Intel SDM volume 3,
/// 3.4.5). The last two are where Linux's boot protocol wants them.
const GDT: [u64; 4] = [
    0,
    0x00af_9b00_0000_ffff,
    0x00cf_9b00_0000_ffff,
    0x00cf_9300_0000_ffff,
];
const CODE64_SELECTOR: u16 = 8;
const CODE32_SELECTOR: u16 = 16;
const DATA_SELECTOR: u16 = 24;
const TASK_SELECTOR: u16 = 32;

/// Bits of a page table entry: present, writable, and "maps a large page".
const PRESENT: u64 = 1;
const WRITABLE: u64 = 1 << 1;
const LARGE: u64 = 1 << 7;

const CR0_PE: u64 = 1;
const CR0_MP: u64 = 1 << 1;
const CR0_ET: u64 = 1 << 4;
const CR0_NE: u64 = 1 << 5;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const CR4_OSFXSR: u64 = 1 << 9;
const CR4_OSXMMEXCPT: u64 = 1 << 10;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
/// Bit 1 of RFLAGS is always set.
const RFLAGS_RESERVED: u64 = 1 << 1;

/// Loads the program into RAM that nothing was written to yet, with what it needs to know of its
/// machine.
///
/// # Errors
/// When a file can't be loaded or has no place.
pub fn load(ram: &GuestRam, program: &Program, boot: &BootParams<'_>) -> Result<Entry, Error> {
    match program {
        Program::Payload(path) => load_payload(ram, path, boot),
        Program::Linux(kernel) => linux::load(ram, kernel, boot),
    }
}

/// Puts the payload, the boot page and what the CPU needs at entry into fresh RAM.
fn load_payload(ram: &GuestRam, payload: &Path, boot: &BootParams<'_>) -> Result<Entry, Error> {
    let target = Target {
        machine: EM_X86_64,
        flat_gpa: layout::FLAT_PAYLOAD,
        reserved: layout::RESERVED,
    };
    let rip = payload::load_elf_or_flat(ram.mem(), payload, &target)?;
    let (cmdline_len, cmdline) = payload::boot_cmdline(boot.cmdline)?;
    let page = BootPage {
        magic: BOOT_MAGIC,
        version: 1,
        vcpus: boot.vcpus,
        ram_base: X86_64_RAM_BASE,
        ram_size: ram.size(),
        serial: layout::SERIAL,
        gicd: 0,
        gicr: 0,
        its: 0,
        cmdline_len,
        cmdline,
    };
    payload::write_boot_page(ram.mem(), X86_64_BOOT_PAGE, &page)?;
    write_gdt(ram)?;
    write_page_tables(ram)?;
    let mode = Mode::Long;
    Ok(Entry { mode, rip })
}

/// Lets `vcpu`, the first one, start at `entry`. The others keep their reset state.
pub fn set_entry(vcpu: &mut Vcpu, entry: &Entry) -> Result<(), Error> {
    let mut sregs = vcpu.sregs()?;
    let data = segment(DATA_SELECTOR, Kind::Data);
    (sregs.ds, sregs.es, sregs.ss) = (data, data, data);
    (sregs.fs, sregs.gs) = (data, data);
    sregs.gdt = kvm_dtable {
        base: layout::GDT,
        limit: size_of_val(&GDT) as u16 - 1,
        ..Default::default()
    };
    // The first exception finds no gate, so that a broken program resets and does not spin.
    sregs.idt = kvm_dtable::default();
    let mut regs = kvm_regs {
        rip: entry.rip,
        rflags: RFLAGS_RESERVED,
        ..Default::default()
    };
    match entry.mode {
        Mode::Long => {
            sregs.cs = segment(CODE64_SELECTOR, Kind::Code64);
            sregs.cr3 = layout::PAGE_TABLES;
            sregs.cr4 = CR4_PAE | CR4_OSFXSR | CR4_OSXMMEXCPT;
            sregs.cr0 = CR0_PG | CR0_NE | CR0_ET | CR0_MP | CR0_PE;
            sregs.efer = EFER_LME | EFER_LMA;
            (regs.rsp, regs.rdi) = (layout::STACK_TOP, X86_64_BOOT_PAGE);
        }
        Mode::Protected { info } => {
            sregs.cs = segment(CODE32_SELECTOR, Kind::Code32);
            sregs.tr = segment(TASK_SELECTOR, Kind::Task);
            (sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer) = (CR0_ET | CR0_PE, 0, 0, 0);
            (regs.rbx, regs.rsi) = (info, info);
        }
    }
    vcpu.set_sregs(&sregs)?;
    Ok(vcpu.set_regs(&regs)?)
}

/// What a segment is for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Code64,
    Code32,
    Data,
    Task,
}

/// A flat segment, as [`GDT`] describes it; a task segment as small as one can be.
fn segment(selector: u16, kind: Kind) -> kvm_segment {
    let task = kind == Kind::Task;
    kvm_segment {
        base: 0,
        limit: if task { 0x67 } else { u32::MAX },
        selector,
        type_: if kind == Kind::Data { 0x3 } else { 0xb },
        present: 1,
        s: u8::from(!task),
        g: u8::from(!task),
        l: u8::from(kind == Kind::Code64),
        db: u8::from(matches!(kind, Kind::Code32 | Kind::Data)),
        ..Default::default()
    }
}

/// The descriptors that segments are loaded from again.
pub(super) fn write_gdt(ram: &GuestRam) -> Result<(), Error> {
    write_words(ram, layout::GDT, GDT)
}

fn write_page_tables(ram: &GuestRam) -> Result<(), Error> {
    const DIRECTORIES: u64 = 4;
    let table = |index: u64| layout::PAGE_TABLES + index * PAGE_SIZE;
    let points_to = |address: u64| address | WRITABLE | PRESENT;
    write_words(ram, table(0), [points_to(table(1))])?;
    write_words(
        ram,
        table(1),
        (0..DIRECTORIES).map(|i| points_to(table(2 + i))),
    )?;
    let large_pages = (0..DIRECTORIES * 512).map(|i| points_to(i << 21) | LARGE);
    write_words(ram, table(2), large_pages)
}

fn write_words(
    ram: &GuestRam,
    gpa: u64,
    words: impl IntoIterator<Item = u64>,
) -> Result<(), Error> {
    let bytes: Vec<u8> = words.into_iter().flat_map(u64::to_le_bytes).collect();
    Ok(ram.write(gpa, &bytes)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn word(ram: &GuestRam, gpa: u64) -> u64 {
        let mut bytes = [0; 8];
        ram.read(gpa, &mut bytes).unwrap();
        u64::from_le_bytes(bytes)
    }

    #[test]
    fn the_page_tables_map_4_gib_one_to_one_inside_the_reserved_range() {
        let ram = GuestRam::new(&layout::ram_layout(2 << 20).unwrap()).unwrap();
        write_page_tables(&ram).unwrap();
        for address in [0u64, 0x12_3456, 0xfee0_0000, 0xffff_ffff] {
            let mut table = layout::PAGE_TABLES;
            for shift in [39, 30, 21] {
                let entry = word(&ram, table + ((address >> shift) & 511) * 8);
                assert_eq!(entry & 3, 3, "{address:#x} at {shift}");
                table = entry & !0xfff;
            }
            assert_eq!(table, address & !0x1f_ffff);
        }
        assert_eq!(word(&ram, layout::RESERVED.end), 0);
        assert_ne!(word(&ram, layout::RESERVED.end - 8), 0);
    }
}
