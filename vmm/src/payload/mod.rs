//! Puts a guest's program into its RAM: a bare-metal one here, an ELF64 executable or a flat binary,
//! with the boot page that tells it about its machine; Linux in `linux.rs`.
//!
//! `arch`'s `load` calls this before the first vCPU runs, on RAM that is fresh and therefore
//! zero: what an ELF segment has in memory beyond its bytes in the file is left as it is. The file
//! is not trusted: nothing is allocated on its say-so, and a segment is checked against the guest's
//! RAM before a byte of it is read.

pub mod linux;

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::ops::Range;
use std::path::{Path, PathBuf};

use blackout_abi::guest::{BootPage, CMDLINE_MAX};
use object::elf::{self, FileHeader64, ProgramHeader64};
use object::read::elf::{FileHeader, ProgramHeader};
use object::read::{ReadCache, ReadRef};
use object::{Endian, LittleEndian};
use vm_memory::{Bytes, GuestAddress, GuestMemory, Permissions};

use crate::memory::RamMap;
use crate::probes::Errno;
pub use linux::Linux;

/// What a guest boots.
#[derive(Clone, Debug)]
pub enum Program {
    /// A bare-metal program: ELF or flat.
    Payload(PathBuf),
    /// A Linux kernel.
    Linux(Linux),
}

/// What kind of payload a machine takes, and where it may lie.
#[derive(Clone, Debug)]
pub struct Target {
    /// The ELF machine number: `object::elf::EM_X86_64` or `EM_AARCH64`.
    pub machine: u16,
    /// Where a flat binary is loaded and entered, guest-physical.
    pub flat_gpa: u64,
    /// Guest-physical addresses that the monitor needs for itself at boot.
    pub reserved: Range<u64>,
}

/// Why a payload can't be loaded.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file can't be opened or read.
    #[error("can't read the payload {}", path.display())]
    File {
        /// The payload.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The file starts like an ELF file, but is damaged.
    #[error("the payload is a damaged ELF file")]
    Damaged(#[source] object::read::Error),
    /// An ELF file that this machine can't run.
    #[error("the payload is an ELF file, but {0}")]
    Foreign(String),
    /// The file has nothing to run.
    #[error("the payload is empty")]
    Empty,
    /// A part of the payload has no place in the guest's memory.
    #[error("the payload's {size:#x} bytes at {gpa:#x} {problem}")]
    Place {
        /// Guest-physical address.
        gpa: u64,
        /// Bytes in memory.
        size: u64,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// No loaded segment can be executed at the entry point.
    #[error("the payload's entry point {0:#x} lies in no executable segment")]
    Entry(u64),
    /// The command line can't be passed on.
    #[error("the guest's command line {0}")]
    Cmdline(String),
    /// Guest RAM can't be written.
    #[error("can't write to guest RAM")]
    Memory(#[from] vm_memory::GuestMemoryError),
}

impl Errno for Error {
    fn errno(&self) -> i32 {
        match self {
            Error::File { source, .. } => source.errno(),
            Error::Damaged(_) | Error::Foreign(_) | Error::Empty | Error::Entry(_) => libc::ENOEXEC,
            Error::Place { .. } | Error::Memory(_) => libc::EFAULT,
            Error::Cmdline(_) => libc::EINVAL,
        }
    }
}

/// Loads the ELF64 executable or flat binary at `path` and returns its entry point,
/// guest-physical. What starts with the ELF magic is taken as ELF, everything else as flat.
///
/// # Errors
/// When the file can't be read, is damaged, is for another machine, or has no place in `mem`.
pub fn load_elf_or_flat(mem: &RamMap, path: &Path, target: &Target) -> Result<u64, Error> {
    let file_error = |source| Error::File {
        path: path.to_owned(),
        source,
    };
    let mut file = File::open(path).map_err(file_error)?;
    let size = file.metadata().map_err(file_error)?.len();
    let mut magic = Vec::new();
    file.by_ref()
        .take(4)
        .read_to_end(&mut magic)
        .map_err(file_error)?;
    // A device such as /dev/zero has bytes, but no size.
    if magic.is_empty() || size == 0 {
        return Err(Error::Empty);
    }
    if magic == elf::ELFMAG {
        return load_elf(mem, &mut file, target);
    }
    load_range(mem, &mut file, 0..size, target.flat_gpa, size, target)?;
    Ok(target.flat_gpa)
}

/// Writes `page` at the guest-physical address `gpa`.
///
/// # Errors
/// When the page does not lie in `mem`.
pub fn write_boot_page(mem: &RamMap, gpa: u64, page: &BootPage) -> Result<(), Error> {
    Ok(mem.write_slice(&boot_page_bytes(page), GuestAddress(gpa))?)
}

/// `text` as the boot page holds it: its length, and the bytes up to a NUL.
///
/// # Errors
/// When it is longer than [`CMDLINE_MAX`] or has a NUL in it.
pub fn boot_cmdline(text: &str) -> Result<(u64, [u8; CMDLINE_MAX + 1]), Error> {
    if text.len() > CMDLINE_MAX {
        let problem = format!("has {} bytes; {CMDLINE_MAX} fit", text.len());
        return Err(Error::Cmdline(problem));
    }
    if text.contains('\0') {
        return Err(Error::Cmdline("has a NUL character in it".into()));
    }
    let mut cmdline = [0; CMDLINE_MAX + 1];
    cmdline[..text.len()].copy_from_slice(text.as_bytes());
    Ok((text.len() as u64, cmdline))
}

fn load_elf(mem: &RamMap, file: &mut File, target: &Target) -> Result<u64, Error> {
    let cache = ReadCache::new(&*file);
    let (entry, segments) = parse_elf(&cache, target)?;
    for segment in &segments {
        let bytes = segment.bytes.clone();
        load_range(mem, file, bytes, segment.gpa, segment.size, target)?;
    }
    segments
        .iter()
        .find_map(|segment| segment.entry(entry))
        .ok_or(Error::Entry(entry))
}

/// A `PT_LOAD` entry.
struct Segment {
    gpa: u64,
    vaddr: u64,
    size: u64,
    bytes: Range<u64>,
    executable: bool,
}

impl Segment {
    /// Where the virtual address `entry` was loaded, if it is an instruction of this segment.
    fn entry(&self, entry: u64) -> Option<u64> {
        let offset = entry.checked_sub(self.vaddr)?;
        (self.executable && offset < self.size).then(|| self.gpa.wrapping_add(offset))
    }
}

fn parse_elf<'a>(data: impl ReadRef<'a>, target: &Target) -> Result<(u64, Vec<Segment>), Error> {
    let header = FileHeader64::<LittleEndian>::parse(data)
        .map_err(|_| Error::Foreign("not a 64-bit little-endian one".into()))?;
    let endian = LittleEndian;
    let (kind, machine) = (header.e_type.get(endian), header.e_machine.get(endian));
    if kind != elf::ET_EXEC && kind != elf::ET_DYN {
        return Err(Error::Foreign(format!("not an executable (type {kind})")));
    }
    if machine != target.machine {
        let (found, wanted) = (machine_name(machine), machine_name(target.machine));
        let problem = format!("for {found}; this monitor runs {wanted} guests");
        return Err(Error::Foreign(problem));
    }
    let segments = header
        .program_headers(endian, data)
        .map_err(Error::Damaged)?
        .iter()
        .filter(|ph| ph.p_type(endian) == elf::PT_LOAD && ph.p_memsz(endian) > 0)
        .map(|ph| segment(ph, endian))
        .collect::<Result<_, _>>()?;
    Ok((header.e_entry.get(endian), segments))
}

fn machine_name(machine: u16) -> String {
    match machine {
        elf::EM_X86_64 => "x86-64".into(),
        elf::EM_AARCH64 => "arm64".into(),
        other => format!("ELF machine {other}"),
    }
}

fn segment<E: Endian>(ph: &ProgramHeader64<E>, endian: E) -> Result<Segment, Error> {
    let (gpa, size) = (ph.p_paddr(endian), ph.p_memsz(endian));
    let place = |problem| Error::Place { gpa, size, problem };
    let (start, length) = ph.file_range(endian);
    if length > size {
        return Err(place("take more room in the file than in memory"));
    }
    let end = start
        .checked_add(length)
        .ok_or_else(|| place("lie beyond the end of the file"))?;
    Ok(Segment {
        gpa,
        vaddr: ph.p_vaddr(endian),
        size,
        bytes: start..end,
        executable: ph.p_flags(endian) & elf::PF_X != 0,
    })
}

/// Reads `bytes` of the file to `gpa`, where they take `size` bytes of memory.
fn load_range(
    mem: &RamMap,
    file: &mut File,
    bytes: Range<u64>,
    gpa: u64,
    size: u64,
    target: &Target,
) -> Result<(), Error> {
    let place = |problem| Error::Place { gpa, size, problem };
    let fits = usize::try_from(size)
        .is_ok_and(|size| mem.check_range(GuestAddress(gpa), size, Permissions::Write));
    let end = gpa.checked_add(size).filter(|_| fits);
    let end = end.ok_or_else(|| place("don't lie in guest RAM"))?;
    if gpa < target.reserved.end && target.reserved.start < end {
        return Err(place("lie on the monitor's boot pages: link it higher"));
    }
    file.seek(SeekFrom::Start(bytes.start))
        .map_err(|_| place("lie beyond the end of the file"))?;
    let count = usize::try_from(bytes.end - bytes.start)
        .map_err(|_| place("lie beyond the end of the file"))?;
    mem.read_exact_volatile_from(GuestAddress(gpa), file, count)
        .map_err(|_| place("end before the file says they do"))
}

/// The page as the guest reads it: little-endian, in the order of the struct's fields.
fn boot_page_bytes(page: &BootPage) -> Vec<u8> {
    let BootPage {
        magic,
        version,
        vcpus,
        ram_base,
        ram_size,
        serial,
        gicd,
        gicr,
        its,
        cmdline_len,
        cmdline,
    } = page;
    let mut bytes = Vec::with_capacity(size_of::<BootPage>());
    bytes.extend(magic.to_le_bytes());
    bytes.extend([version, vcpus].into_iter().flat_map(|n| n.to_le_bytes()));
    let addresses = [ram_base, ram_size, serial, gicd, gicr, its, cmdline_len];
    bytes.extend(addresses.into_iter().flat_map(|n| n.to_le_bytes()));
    bytes.extend(cmdline);
    bytes
}

#[cfg(test)]
mod tests;
