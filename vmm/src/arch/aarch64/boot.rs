//! Puts the guest's program into RAM and says where the first vCPU starts.
//!
//! Bare-metal programs (ELF, flat) get the boot page's address in `x0`; an arm64 `Image`, which
//! says in its header that it is a Linux kernel, gets a device tree's, as
//! `Documentation/arch/arm64/booting.rst` wants it.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use blackout_abi::guest::{
    AARCH64_BOOT_PAGE, AARCH64_RAM_BASE, BOOT_MAGIC, BootPage, SHARED_PAGE_OFFSET,
};
use object::elf::EM_AARCH64;
use vm_memory::{Bytes, GuestAddress};

use super::Error;
use super::fdt;
use super::layout::{GICD, GICR, ITS, SERIAL};
use crate::arch::BootParams;
use crate::memory::{GuestRam, PAGE_SIZE};
use crate::payload::{self, Target};

/// Where a flat binary goes.
const FLAT: u64 = AARCH64_RAM_BASE + 0x8_0000;
/// A kernel wants a multiple of 2 MiB; the first has the boot page in it.
const KERNEL: u64 = AARCH64_RAM_BASE + 0x20_0000;
/// The device tree, behind the boot and shared pages.
const FDT: u64 = AARCH64_RAM_BASE + 0x1_0000;
/// Bytes of the `Image` header.
const IMAGE_HEADER: u64 = 64;

/// Where the first vCPU starts.
#[derive(Clone, Copy, Debug)]
pub struct Entry {
    /// The first instruction, guest-physical.
    pub pc: u64,
    /// The first argument register.
    pub x0: u64,
}

/// Loads an ELF executable, an arm64 `Image` or a flat binary into RAM that nothing was written to
/// yet, and writes the boot page and, for an `Image`, the device tree.
pub fn load_payload(ram: &GuestRam, payload: &Path, boot: &BootParams<'_>) -> Result<Entry, Error> {
    let mut target = Target {
        machine: EM_AARCH64,
        flat_gpa: FLAT,
        reserved: AARCH64_BOOT_PAGE..AARCH64_BOOT_PAGE + SHARED_PAGE_OFFSET + PAGE_SIZE,
    };
    let text_offset = image_text_offset(&head(payload)?);
    if let Some(offset) = text_offset {
        target.flat_gpa = KERNEL.saturating_add(offset);
    }
    let pc = payload::load_elf_or_flat(ram.mem(), payload, &target)?;
    payload::write_boot_page(ram.mem(), AARCH64_BOOT_PAGE, &boot_page(ram, boot)?)?;
    let x0 = match text_offset {
        Some(_) => {
            let tree = fdt::build(ram.size(), boot)?;
            let written = ram.mem().write_slice(&tree, GuestAddress(FDT));
            written.map_err(payload::Error::Memory)?;
            FDT
        }
        None => AARCH64_BOOT_PAGE,
    };
    Ok(Entry { pc, x0 })
}

fn boot_page(ram: &GuestRam, boot: &BootParams<'_>) -> Result<BootPage, Error> {
    let (cmdline_len, cmdline) = payload::boot_cmdline(boot.cmdline)?;
    Ok(BootPage {
        magic: BOOT_MAGIC,
        version: 1,
        vcpus: boot.vcpus,
        ram_base: AARCH64_RAM_BASE,
        ram_size: ram.size(),
        serial: SERIAL.base,
        gicd: GICD,
        gicr: GICR,
        its: ITS,
        cmdline_len,
        cmdline,
    })
}

/// The file's first bytes, as many as a header has or the file.
fn head(payload: &Path) -> Result<Vec<u8>, payload::Error> {
    let mut head = Vec::new();
    let read = File::open(payload).and_then(|f| f.take(IMAGE_HEADER).read_to_end(&mut head));
    read.map_err(|source| payload::Error::File {
        path: payload.to_owned(),
        source,
    })?;
    Ok(head)
}

/// How far behind a multiple of 2 MiB the `Image` with this header wants to lie; `None` when it is
/// no `Image`.
fn image_text_offset(head: &[u8]) -> Option<u64> {
    let number = |at: usize| Some(u64::from_le_bytes(*head.get(at..)?.first_chunk()?));
    if head.get(56..60)? != b"ARM\x64" {
        return None;
    }
    let (text_offset, image_size) = (number(8)?, number(16)?);
    // Kernels before 3.17 have no image size, and an offset of any byte order.
    Some(if image_size == 0 {
        0x8_0000
    } else {
        text_offset
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(text_offset: u64, image_size: u64) -> Vec<u8> {
        let mut head = vec![0; 64];
        head[8..16].copy_from_slice(&text_offset.to_le_bytes());
        head[16..24].copy_from_slice(&image_size.to_le_bytes());
        head[56..60].copy_from_slice(b"ARM\x64");
        head
    }

    #[test]
    fn an_image_is_known_by_its_magic() {
        assert_eq!(image_text_offset(&header(0, 1)), Some(0));
        assert_eq!(image_text_offset(&header(0x1000, 1)), Some(0x1000));
        assert_eq!(image_text_offset(&header(0x1000, 0)), Some(0x8_0000));
        assert_eq!(image_text_offset(&header(0, 1)[..58]), None);
        assert_eq!(image_text_offset(b"\x7fELF"), None);
        assert_eq!(image_text_offset(&[0; 64]), None);
    }
}
