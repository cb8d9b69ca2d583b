//! Pieces of guest RAM as the source or the target of one transfer: the kernel moves the bytes
//! between them and a file, with no copy in between.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use vm_memory::bitmap::Bitmap;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryError, VolatileSlice};

use super::{Error, GuestRam, RamMap};

/// The most pieces that the kernel takes in one call (`UIO_MAXIOV`).
pub const PIECES_MAX: usize = 1024;

/// Pieces of guest RAM, in the order in which a transfer goes over them. They were checked when
/// this was made: all of them lie in RAM.
#[derive(Clone, Debug)]
pub struct Pieces {
    ram: Arc<RamMap>,
    /// Guest-physical address and length of each; none is empty.
    ranges: Vec<(u64, usize)>,
    vectors: Vec<libc::iovec>,
    len: usize,
}

// SAFETY: the vectors point into the mapping that `ram` keeps; it is valid on any thread, and is
// only ever accessed by the kernel or by vm-memory's volatile accesses.
unsafe impl Send for Pieces {}

impl GuestRam {
    /// The pieces at `ranges`, each a guest-physical address and a length.
    ///
    /// # Errors
    /// When one lies outside RAM, or there are more than [`PIECES_MAX`].
    pub fn pieces(&self, ranges: impl IntoIterator<Item = (u64, u32)>) -> Result<Pieces, Error> {
        let mut pieces = Pieces::none(&self.mem);
        for (gpa, len) in ranges {
            let len = usize::try_from(len).unwrap_or(usize::MAX);
            pieces.push(gpa, len)?;
        }
        Ok(pieces)
    }
}

impl Pieces {
    /// Bytes of all of them.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is no byte.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Takes the first `len` bytes off; what is left stays. Asked for more than there is, it takes
    /// all.
    pub fn split_to(&mut self, len: usize) -> Pieces {
        let all = std::mem::replace(self, Pieces::none(&self.ram));
        let mut front = Pieces::none(&self.ram);
        for (&(gpa, size), vector) in all.ranges.iter().zip(&all.vectors) {
            let taken = size.min(len - front.len);
            front.add(gpa, vector.iov_base, taken);
            let rest = vector.iov_base.wrapping_byte_add(taken);
            self.add(gpa + taken as u64, rest, size - taken);
        }
        front
    }

    /// Takes the last `len` bytes off, or all there are.
    pub fn split_off(&mut self, len: usize) -> Pieces {
        let mut rest = self.clone();
        *self = rest.split_to(self.len.saturating_sub(len));
        rest
    }

    /// Fills the pieces from the start with `bytes`, as far as they go; returns how many.
    pub fn fill(&self, bytes: &[u8]) -> usize {
        let mut done = 0;
        for &(gpa, size) in &self.ranges {
            let end = bytes.len().min(done + size);
            // The piece lies in RAM, so this can't fail.
            let _ = self.ram.write_slice(&bytes[done..end], GuestAddress(gpa));
            done = end;
        }
        done
    }

    /// Copies from the start into `bytes`, as far as they go; returns how many.
    pub fn copy_to(&self, bytes: &mut [u8]) -> usize {
        let mut done = 0;
        for &(gpa, size) in &self.ranges {
            let end = bytes.len().min(done + size);
            let piece = bytes.get_mut(done..end).unwrap_or_default();
            // The piece lies in RAM, so this can't fail.
            let _ = self.ram.read_slice(piece, GuestAddress(gpa));
            done = end;
        }
        done
    }

    /// Fills the pieces from `file`: at `offset`, or where a stream or a packet source is. Returns
    /// how many bytes came, which may be fewer.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn read_from(&self, file: &File, offset: Option<u64>) -> io::Result<usize> {
        let (fd, vectors, count) = (file.as_raw_fd(), self.as_ptr(), self.count());
        let read = match offset {
            // SAFETY: the vectors cover memory that `ram` keeps mapped and that nobody holds a
            // Rust reference to.
            Some(offset) => unsafe { libc::preadv(fd, vectors, count, file_offset(offset)?) },
            // SAFETY: as above.
            None => unsafe { libc::readv(fd, vectors, count) },
        };
        let read = usize::try_from(read).map_err(|_| io::Error::last_os_error())?;
        self.mark_dirty(read);
        Ok(read)
    }

    /// Writes the pieces to `file`: at `offset`, or as one packet, or to where a stream is. Returns
    /// how many bytes went, which may be fewer.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn write_to(&self, file: &File, offset: Option<u64>) -> io::Result<usize> {
        let (fd, vectors, count) = (file.as_raw_fd(), self.as_ptr(), self.count());
        let written = match offset {
            // SAFETY: the vectors cover memory that `ram` keeps mapped.
            Some(offset) => unsafe { libc::pwritev(fd, vectors, count, file_offset(offset)?) },
            // SAFETY: as above.
            None => unsafe { libc::writev(fd, vectors, count) },
        };
        usize::try_from(written).map_err(|_| io::Error::last_os_error())
    }

    /// Tells the log that the kernel has written the first `len` bytes.
    pub(super) fn mark_dirty(&self, len: usize) {
        let mut left = len;
        for &(gpa, size) in &self.ranges {
            let written = size.min(left);
            if let (Some((region, at)), true) =
                (self.ram.to_region_addr(GuestAddress(gpa)), written > 0)
            {
                let offset = usize::try_from(at.0).unwrap_or(usize::MAX);
                region.get_mmap().bitmap().mark_dirty(offset, written);
            }
            left -= written;
        }
    }

    /// The vectors, for a system call; they stay where they are as long as this is not changed.
    pub(super) fn as_ptr(&self) -> *const libc::iovec {
        self.vectors.as_ptr()
    }

    /// How many vectors there are: never more than [`PIECES_MAX`].
    pub(super) fn count(&self) -> libc::c_int {
        libc::c_int::try_from(self.vectors.len()).unwrap_or(libc::c_int::MAX)
    }

    fn push(&mut self, gpa: u64, len: usize) -> Result<(), Error> {
        let error = |source| Error::Access { gpa, len, source };
        if !self.ram.check_range(GuestAddress(gpa), len) {
            return Err(error(GuestMemoryError::InvalidGuestAddress(GuestAddress(
                gpa,
            ))));
        }
        let ram = Arc::clone(&self.ram);
        let mut start = gpa;
        for slice in ram.get_slices(GuestAddress(gpa), len) {
            let slice: VolatileSlice<'_, _> = slice.map_err(error)?;
            if slice.is_empty() {
                continue;
            }
            if self.vectors.len() == PIECES_MAX {
                return Err(Error::Pieces);
            }
            self.add(start, slice.ptr_guard_mut().as_ptr().cast(), slice.len());
            start += slice.len() as u64;
        }
        Ok(())
    }

    fn add(&mut self, gpa: u64, base: *mut libc::c_void, len: usize) {
        if len > 0 {
            self.ranges.push((gpa, len));
            self.vectors.push(libc::iovec {
                iov_base: base,
                iov_len: len,
            });
            self.len = self.len.saturating_add(len);
        }
    }

    fn none(ram: &Arc<RamMap>) -> Self {
        Pieces {
            ram: Arc::clone(ram),
            ranges: Vec::new(),
            vectors: Vec::new(),
            len: 0,
        }
    }
}

fn file_offset(offset: u64) -> io::Result<libc::off_t> {
    libc::off_t::try_from(offset).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Seek, Write};

    use super::*;
    use crate::memory::PAGE_SIZE;

    fn ram() -> GuestRam {
        GuestRam::new(&[(0, 0x2000), (0x2000, 0x2000), (0x10_0000, 0x1000)]).unwrap()
    }

    fn dirty(ram: &GuestRam) -> Vec<usize> {
        let regions = ram.mem().iter();
        let pages = regions.map(|region| region.get_mmap().bitmap().take());
        pages
            .map(|pages| pages.iter().map(|page| 1 << page).sum())
            .collect()
    }

    #[test]
    fn a_file_fills_pieces_and_the_log_knows_where() {
        let ram = ram();
        let mut file = tempfile::tempfile().unwrap();
        let bytes: Vec<u8> = (0..=255).cycle().take(0x1100).collect();
        file.write_all(&bytes).unwrap();
        // Over the border of two regions, and a second piece elsewhere.
        let pieces = ram.pieces([(0x1fff, 2), (0x10_0010, 0x1f00 - 0x1000)]);
        let pieces = pieces.unwrap();
        assert_eq!(pieces.len(), 0xf02);
        assert_eq!(pieces.read_from(&file, Some(0x100)).unwrap(), 0xf02);
        let mut seen = vec![0; 0xf02];
        assert_eq!(pieces.copy_to(&mut seen), 0xf02);
        assert_eq!(seen, bytes[0x100..0x1002]);
        assert_eq!(dirty(&ram), [0b10, 0b1, 0b1]);

        let mut out = tempfile::tempfile().unwrap();
        assert_eq!(pieces.write_to(&out, Some(0)).unwrap(), 0xf02);
        out.rewind().unwrap();
        let mut written = Vec::new();
        out.read_to_end(&mut written).unwrap();
        assert_eq!(written, seen);
        assert_eq!(dirty(&ram), [0, 0, 0]);
    }

    #[test]
    fn a_short_read_marks_only_what_it_wrote() {
        let ram = ram();
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&[7; 100]).unwrap();
        let pieces = ram.pieces([(0, 0x1000), (0x1000, 0x1000)]).unwrap();
        assert_eq!(pieces.read_from(&file, Some(0)).unwrap(), 100);
        assert_eq!(dirty(&ram), [1, 0, 0]);
    }

    #[test]
    fn pieces_split_anywhere() {
        let ram = ram();
        let all = || ram.pieces([(0, 10), (0x100, 20), (0x200, 5)]).unwrap();
        for cut in 0..=40 {
            let mut rest = all();
            let front = rest.split_to(cut);
            assert_eq!((front.len(), rest.len()), (cut.min(35), 35 - cut.min(35)));
            front.fill(&[1; 64]);
            rest.fill(&[2; 64]);
            let mut seen = [0; 35];
            all().copy_to(&mut seen);
            let ones = seen.iter().filter(|&&b| b == 1).count();
            assert_eq!(ones, cut.min(35));
            assert!(seen.is_sorted());
            let mut front = all();
            assert_eq!(front.split_off(cut).len(), cut.min(35));
            assert_eq!(front.len(), 35 - cut.min(35));
        }
    }

    #[test]
    fn pieces_outside_ram_are_refused() {
        let ram = ram();
        for (gpa, len) in [
            (0x3fff, 2),
            (0x4000, 1),
            (u64::MAX, 2),
            (0xf_ffff, 1),
            (0x10_0000, u32::MAX),
        ] {
            assert!(ram.pieces([(gpa, len)]).is_err(), "{gpa:#x} {len:#x}");
        }
        let many = std::iter::repeat_n((0, 1), PIECES_MAX);
        assert!(ram.pieces(many.clone()).is_ok());
        assert!(ram.pieces(many.chain([(PAGE_SIZE, 1)])).is_err());
        assert!(
            ram.pieces([(0, 0), (0x9999_9999, 0)])
                .is_ok_and(|p| p.is_empty())
        );
    }
}
