//! Puts the guest's program into RAM and says where the first vCPU starts.
//!
//! Bare-metal programs (ELF, flat) get the boot page's address in `x0`, a Linux `Image` that of a
//! device tree, as `Documentation/arch/arm64/booting.rst` wants it.

use std::fs::File;
use std::io::{Read, Seek};
use std::path::Path;

use blackout_abi::guest::{
    AARCH64_BOOT_PAGE, AARCH64_RAM_BASE, BOOT_MAGIC, BootPage, SHARED_PAGE_OFFSET,
};
use linux_loader::loader::{KernelLoader, PE};
use object::elf::EM_AARCH64;
use vm_memory::{Bytes, GuestAddress};

use super::Error;
use super::fdt;
use super::layout::{GICD, GICR, ITS, SERIAL};
use crate::arch::BootParams;
use crate::memory::{GuestRam, PAGE_SIZE};
use crate::payload::{self, Linux, Program, Target, linux};

/// Where a flat binary goes.
const FLAT: u64 = AARCH64_RAM_BASE + 0x8_0000;
/// A kernel wants a multiple of 2 MiB; the first has the device tree in it.
const KERNEL: u64 = AARCH64_RAM_BASE + KERNEL_ALIGN;
const KERNEL_ALIGN: u64 = 0x20_0000;
/// The device tree, behind the boot and shared pages of other programs.
const FDT: u64 = AARCH64_RAM_BASE + 0x1_0000;
/// Bytes of the `Image` header.
const IMAGE_HEADER: usize = 64;

/// Where the first vCPU starts.
#[derive(Clone, Copy, Debug)]
pub struct Entry {
    /// The first instruction, guest-physical.
    pub pc: u64,
    /// The first argument register.
    pub x0: u64,
}

/// Loads the program into RAM that nothing was written to yet, with what it needs to know of its
/// machine.
///
/// # Errors
/// When a file can't be loaded or has no place.
pub fn load(ram: &GuestRam, program: &Program, boot: &BootParams<'_>) -> Result<Entry, Error> {
    match program {
        Program::Payload(path) => load_payload(ram, path, boot),
        Program::Linux(linux) => load_linux(ram, linux, boot),
    }
}

/// An ELF executable or a flat binary, and the boot page.
fn load_payload(ram: &GuestRam, payload: &Path, boot: &BootParams<'_>) -> Result<Entry, Error> {
    let target = Target {
        machine: EM_AARCH64,
        flat_gpa: FLAT,
        reserved: AARCH64_BOOT_PAGE..AARCH64_BOOT_PAGE + SHARED_PAGE_OFFSET + PAGE_SIZE,
    };
    let pc = payload::load_elf_or_flat(ram.mem(), payload, &target)?;
    payload::write_boot_page(ram.mem(), AARCH64_BOOT_PAGE, &boot_page(ram, boot)?)?;
    let x0 = AARCH64_BOOT_PAGE;
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
        serial: SERIAL,
        gicd: GICD,
        gicr: GICR,
        its: ITS,
        cmdline_len,
        cmdline,
    })
}

/// A kernel, behind it its initial RAM disk, and the device tree.
fn load_linux(ram: &GuestRam, linux: &Linux, boot: &BootParams<'_>) -> Result<Entry, Error> {
    let mut kernel = linux::open_kernel(&linux.kernel, ram.size())?;
    let size = image_size(&mut kernel).map_err(|problem| linux::Error::Foreign {
        path: linux.kernel.clone(),
        problem: problem.to_owned(),
    })?;
    let loaded = PE::load(ram.mem(), Some(GuestAddress(KERNEL)), &mut kernel, None);
    let loaded = loaded.map_err(|source| linux::Error::Kernel {
        path: linux.kernel.clone(),
        source,
    })?;
    let start = loaded.kernel_load.0;
    // What the kernel has in memory is longer than what it has in the file.
    let end = start.saturating_add(size).max(loaded.kernel_end);
    if end > AARCH64_RAM_BASE + ram.size() {
        let (path, gpa) = (linux.kernel.clone(), start);
        return Err(linux::Error::Place { path, gpa, size }.into());
    }
    let behind = end.next_multiple_of(KERNEL_ALIGN);
    let load_initrd = |path| linux::load_initrd(ram, path, behind, |_| Some(behind));
    let initrd = linux.initrd.as_deref().map(load_initrd).transpose()?;
    let tree = fdt::build(ram.size(), boot, initrd)?;
    let written = ram.mem().write_slice(&tree, GuestAddress(FDT));
    written.map_err(payload::Error::Memory)?;
    Ok(Entry { pc: start, x0: FDT })
}

/// How many bytes of memory the `Image` in `kernel` wants from its start on. 0 for kernels before
/// 3.17, which do not say.
fn image_size(kernel: &mut File) -> Result<u64, &'static str> {
    let mut head = [0; IMAGE_HEADER];
    let read = kernel.read_exact(&mut head).and_then(|()| kernel.rewind());
    match (read, head.get(56..60)) {
        (Ok(()), Some(b"ARM\x64")) => parse_image_size(&head).ok_or("it is big-endian"),
        _ => Err(
            "it is no arm64 Image, nor one in gzip or EFI zboot; for other programs there is --payload",
        ),
    }
}

/// `None` for a big-endian kernel: its own start-up code can't be told from a damaged one.
fn parse_image_size(head: &[u8; IMAGE_HEADER]) -> Option<u64> {
    let number = |at: usize| Some(u64::from_le_bytes(*head.get(at..)?.first_chunk()?));
    let (image_size, flags) = (number(16)?, number(24)?);
    (flags & 1 == 0).then_some(image_size)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn image(image_size: u64, flags: u64) -> File {
        let mut head = vec![0; 64];
        head[16..24].copy_from_slice(&image_size.to_le_bytes());
        head[24..32].copy_from_slice(&flags.to_le_bytes());
        head[56..60].copy_from_slice(b"ARM\x64");
        file(&head)
    }

    fn file(bytes: &[u8]) -> File {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        file.rewind().unwrap();
        file
    }

    #[test]
    fn an_image_is_known_by_its_header() {
        assert_eq!(image_size(&mut image(0x1000, 0xa)), Ok(0x1000));
        assert_eq!(image_size(&mut image(0, 0)), Ok(0));
        assert!(
            image_size(&mut image(0x1000, 1))
                .unwrap_err()
                .contains("big-endian")
        );
        for other in [b"\x7fELF".as_slice(), &[0; 64], &[]] {
            let error = image_size(&mut file(other)).unwrap_err();
            assert!(error.contains("no arm64 Image"), "{error}");
        }
    }
}
