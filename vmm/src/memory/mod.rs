//! Guest RAM: one memfd, one KVM slot a region, and the dirty log.
//!
//! The memfd is called `blackout-ram`, so that an outside observer finds it under `/proc/PID/fd`;
//! its pages lie in the order of the regions. The guest writes this memory at any time, so nothing
//! here hands out a reference into it: bytes are copied in and out, or moved by the kernel between
//! RAM and a file (`transfer.rs`, `ring.rs`).
//!
//! Which pages were written is `dirty.rs`'s business.
#![allow(unsafe_code)]

mod device_log;
mod dirty;
mod fill;
pub mod handover;
pub mod ring;
#[cfg(test)]
mod tests;
pub mod transfer;

use std::fs::File;
use std::io;
use std::ptr::NonNull;
use std::sync::Arc;

use nix::errno::Errno as Code;
use nix::fcntl::{FallocateFlags, fallocate};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MmapAdvise, madvise};
use nix::unistd::{Whence, lseek};
use rustix::fs::{SealFlags, fcntl_add_seals};
use vm_memory::bitmap::Bitmap;
use vm_memory::mmap::FromRangesError;
use vm_memory::{
    Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryError, GuestMemoryMmap,
    GuestMemoryRegion, GuestRegionMmap,
};

use crate::kvm::{self, Slot, Vm};
use crate::probes::Errno;
pub use device_log::DeviceLog;
pub use dirty::merge;
pub use fill::Filling;

/// The mapping of guest RAM, with the log of what devices write.
pub type RamMap = GuestMemoryMmap<DeviceLog>;

/// The page size of every dirty log and of the migration stream. Both architectures run 4 KiB.
pub const PAGE_SIZE: u64 = 4096;

/// Guest RAM could not be made, reached or tracked.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A region's start or size is no multiple of the page size, or there is no region.
    #[error("a RAM region at {gpa:#x} of {size:#x} bytes is not made of whole pages")]
    Layout {
        /// Guest-physical address.
        gpa: u64,
        /// Bytes.
        size: u64,
    },
    /// The memfd could not be created or sized.
    #[error("memfd of {0} bytes for guest RAM")]
    Memfd(u64, #[source] io::Error),
    /// The memfd could not be mapped.
    #[error("mapping guest RAM")]
    Map(#[source] FromRangesError),
    /// An access outside RAM.
    #[error("guest-physical {gpa:#x}, {len} bytes")]
    Access {
        /// Where it started.
        gpa: u64,
        /// Its length.
        len: usize,
        /// What vm-memory said.
        source: GuestMemoryError,
    },
    /// One transfer over too many pieces.
    #[error(
        "a transfer over more than {} pieces of guest RAM",
        transfer::PIECES_MAX
    )]
    Pieces,
    /// Pages could not be put into RAM.
    #[error("{1} bytes for guest-physical {0:#x}")]
    Put(u64, usize, #[source] io::Error),
    /// Pages could not be given back to the kernel.
    #[error("zeroing {1} bytes at guest-physical {0:#x}")]
    Zero(u64, u64, #[source] io::Error),
    /// The memfd does not say which pages were written.
    #[error("looking for untouched guest RAM")]
    Extents(#[source] io::Error),
    /// It can't be shared, or another process's can't be mapped.
    #[error("handing guest RAM over")]
    HandOver(#[source] io::Error),
    /// What another process has passed is not what it should be.
    #[error("what was passed is not this guest's RAM: {0}")]
    Foreign(&'static str),
    /// A slot or its log.
    #[error(transparent)]
    Kvm(#[from] kvm::Error),
}

impl Error {
    /// What begins at `gpa` is not RAM.
    pub(crate) fn outside(gpa: u64, len: usize) -> Self {
        let source = GuestMemoryError::InvalidGuestAddress(GuestAddress(gpa));
        Error::Access { gpa, len, source }
    }
}

impl Errno for Error {
    fn errno(&self) -> i32 {
        match self {
            Error::Layout { .. } | Error::Pieces | Error::Foreign(_) => libc::EINVAL,
            Error::Memfd(_, source)
            | Error::Put(_, _, source)
            | Error::Zero(_, _, source)
            | Error::Extents(source)
            | Error::HandOver(source) => source.errno(),
            Error::Map(_) => libc::ENOMEM,
            Error::Access { .. } => libc::EFAULT,
            Error::Kvm(source) => source.errno(),
        }
    }
}

/// Neighbouring pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageRun {
    /// Guest-physical address of the first page.
    pub gpa: u64,
    /// How many pages; never 0.
    pub pages: u64,
}

/// Guest RAM.
#[derive(Clone, Debug)]
pub struct GuestRam {
    mem: Arc<RamMap>,
    slots: Arc<[Slot]>,
    memfd: Arc<File>,
    /// How [`GuestRam::put_pages`] does it.
    filler: Arc<fill::Filler>,
}

impl GuestRam {
    /// Makes zeroed RAM with the regions `layout`, each a guest-physical address and a size.
    pub fn new(layout: &[(u64, u64)]) -> Result<Self, Error> {
        for &(gpa, size) in layout {
            if size == 0 || gpa % PAGE_SIZE != 0 || size % PAGE_SIZE != 0 {
                return Err(Error::Layout { gpa, size });
            }
        }
        let total = layout.iter().map(|&(_, size)| size).sum();
        let memfd = memfd(total).map_err(|source| Error::Memfd(total, source))?;
        let mut offset = 0;
        let ranges = layout.iter().map(|&(gpa, size)| {
            let file = FileOffset::from_arc(Arc::clone(&memfd), offset);
            offset += size;
            (
                GuestAddress(gpa),
                usize::try_from(size).unwrap_or(usize::MAX),
                Some(file),
            )
        });
        let mem = RamMap::from_ranges_with_files(ranges).map_err(Error::Map)?;
        let slots = mem.iter().zip(0u32..).map(|(region, id)| Slot {
            id,
            gpa: region.start_addr().0,
            size: region.len(),
            hva: region.as_ptr().expose_provenance() as u64,
        });
        let slots = slots.collect();
        mem.iter().for_each(advise_huge_pages);
        Ok(GuestRam {
            mem: Arc::new(mem),
            slots,
            memfd,
            filler: Arc::default(),
        })
    }

    /// The memory itself, for loaders and devices.
    pub fn mem(&self) -> &RamMap {
        &self.mem
    }

    fn memfd(&self) -> &File {
        &self.memfd
    }

    /// The regions, as guest-physical address and size, in the order of the memfd.
    pub fn regions(&self) -> impl Iterator<Item = (u64, u64)> {
        self.slots.iter().map(|slot| (slot.gpa, slot.size))
    }

    /// Bytes of RAM.
    pub fn size(&self) -> u64 {
        self.slots.iter().map(|slot| slot.size).sum()
    }

    /// Gives every region its slot in `vm`, with the dirty log off.
    pub fn register(&self, vm: &Vm) -> Result<(), Error> {
        self.set_dirty_log(vm, false)
    }

    /// Every page, in two lists: those that have memory behind them, and those that were never
    /// written and read as zeroes. Asking is cheap, while reading the latter would give them memory.
    ///
    /// # Errors
    /// When the memfd does not tell.
    pub fn written_and_untouched(&self) -> Result<(Vec<PageRun>, Vec<PageRun>), Error> {
        let (mut written, mut untouched) = (Vec::new(), Vec::new());
        for region in self.mem.iter() {
            let gpa = region.start_addr().0;
            let mut push = |data: bool, offset: u64, end: u64| {
                let list = if data { &mut written } else { &mut untouched };
                let (gpa, pages) = (gpa + offset, (end - offset) / PAGE_SIZE);
                list.extend((pages > 0).then_some(PageRun { gpa, pages }));
            };
            extents(region.file_offset(), region.len(), &mut push).map_err(Error::Extents)?;
        }
        Ok((written, untouched))
    }

    /// Copies `buf.len()` bytes at `gpa` out of RAM.
    pub fn read(&self, gpa: u64, buf: &mut [u8]) -> Result<(), Error> {
        let len = buf.len();
        self.mem
            .read_slice(buf, GuestAddress(gpa))
            .map_err(|source| Error::Access { gpa, len, source })
    }

    /// Copies `buf` into RAM at `gpa`; all of it or, on an error, nothing.
    pub fn write(&self, gpa: u64, buf: &[u8]) -> Result<(), Error> {
        let len = buf.len();
        let at = GuestAddress(gpa);
        if !self.mem.check_range(at, len) {
            return Err(Error::outside(gpa, len));
        }
        self.mem
            .write_slice(buf, at)
            .map_err(|source| Error::Access { gpa, len, source })
    }

    /// Zeroes whole pages by giving them back to the kernel, so that a page that was never written
    /// on the other side of a migration costs no memory here either.
    pub fn zero(&self, run: PageRun) -> Result<(), Error> {
        let (mut gpa, mut left) = (run.gpa, run.pages.saturating_mul(PAGE_SIZE));
        while left > 0 {
            let at = GuestAddress(gpa);
            let Some((region, offset)) = self.mem.to_region_addr(at) else {
                let len = usize::try_from(left).unwrap_or(usize::MAX);
                return Err(Error::outside(gpa, len));
            };
            let len = left.min(region.len() - offset.0);
            punch(region.file_offset(), offset.0, len)
                .map_err(|source| Error::Zero(gpa, len, source))?;
            (gpa, left) = (gpa.wrapping_add(len), left - len);
        }
        Ok(())
    }

    /// Zeroes all RAM, as if it was never written; the log has it as written.
    pub fn clear(&self) -> Result<(), Error> {
        for (gpa, size) in self.regions() {
            let pages = size / PAGE_SIZE;
            self.zero(PageRun { gpa, pages })?;
        }
        for region in self.mem.iter() {
            let len = usize::try_from(region.len()).unwrap_or(usize::MAX);
            region.get_mmap().bitmap().mark_dirty(0, len);
        }
        Ok(())
    }

    /// CRC-32C of all RAM in address order. Means something only while no vCPU runs.
    pub fn checksum(&self) -> Result<u32, Error> {
        let mut sum = 0;
        let mut buf = vec![0; 1 << 20];
        for (gpa, size) in self.regions() {
            for offset in (0..size).step_by(buf.len()) {
                let len = usize::try_from(size - offset)
                    .unwrap_or(usize::MAX)
                    .min(buf.len());
                self.read(gpa + offset, &mut buf[..len])?;
                sum = crc32c::crc32c_append(sum, &buf[..len]);
            }
        }
        Ok(sum)
    }
}

/// Asks for huge pages, where the kernel gives them to memfds on request: a guest that arrives is
/// mapped in a five-hundredth of the page faults, and runs with fewer TLB misses.
fn advise_huge_pages(region: &GuestRegionMmap<DeviceLog>) {
    let Some(start) = NonNull::new(region.as_ptr().cast()) else {
        return;
    };
    // SAFETY: the range is this region's own mapping, and the advice changes nothing of what is in
    // it. A kernel that has no huge pages refuses, which is as well.
    let _ = unsafe { madvise(start, region.len() as usize, MmapAdvise::MADV_HUGEPAGE) };
}

fn memfd(size: u64) -> io::Result<Arc<File>> {
    let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
    let file = File::from(memfd_create(c"blackout-ram", flags)?);
    file.set_len(size)?;
    // Whoever else maps it can rely on that.
    fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
    Ok(Arc::new(file))
}

fn punch(file: Option<&FileOffset>, offset: u64, len: u64) -> io::Result<()> {
    let file = file.ok_or(io::ErrorKind::Unsupported)?;
    let [start, len] = [file.start() + offset, len].map(libc::off_t::try_from);
    let (Ok(start), Ok(len)) = (start, len) else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    Ok(fallocate(file.file(), flags, start, len)?)
}

/// Takes a region of `len` bytes of the memfd apart: `push` gets each stretch, whether it has memory
/// behind it, its start and its end.
fn extents(
    file: Option<&FileOffset>,
    len: u64,
    push: &mut dyn FnMut(bool, u64, u64),
) -> io::Result<()> {
    let file = file.ok_or(io::ErrorKind::Unsupported)?;
    let seek = |offset: u64, whence| -> io::Result<u64> {
        let from = libc::off_t::try_from(file.start() + offset).map_err(io::Error::other)?;
        match lseek(file.file(), from, whence) {
            Ok(found) => Ok((found.unsigned_abs() - file.start()).min(len)),
            // Nothing of that kind up to the end of the file.
            Err(Code::ENXIO) => Ok(len),
            Err(errno) => Err(errno.into()),
        }
    };
    let mut offset = 0;
    while offset < len {
        let data = seek(offset, Whence::SeekData)?;
        push(false, offset, data);
        let hole = if data < len {
            seek(data, Whence::SeekHole)?
        } else {
            len
        };
        push(true, data, hole);
        offset = hole;
    }
    Ok(())
}
