//! Whole pages that come from elsewhere, into RAM that no vCPU uses yet.

use std::os::unix::fs::FileExt;

use rustix::io::Errno;
use rustix::mm::{Advice, madvise};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::{Error, GuestRam};

impl GuestRam {
    /// Puts whole pages into RAM. The kernel copies them into the memfd, so that a page that had no memory
    /// before takes no fault and is not zeroed only to be overwritten. It does so for one thread at a time.
    ///
    /// # Errors
    /// When they are not all RAM, or there is no memory for them.
    pub fn put_pages(&self, gpa: u64, mut pages: &[u8]) -> Result<(), Error> {
        let len = pages.len();
        let mut at = GuestAddress(gpa);
        if !self.mem.check_range(at, len) {
            return Err(Error::outside(gpa, len));
        }
        while !pages.is_empty() {
            let found = self.mem.to_region_addr(at);
            let file = found.and_then(|(region, offset)| {
                let left = usize::try_from(region.len() - offset.0).unwrap_or(usize::MAX);
                Some((region.file_offset()?, offset.0, left))
            });
            let Some((file, offset, left)) = file else {
                return Err(Error::outside(gpa, len));
            };
            let part = pages.get(..left).unwrap_or(pages);
            let written = file.file().write_all_at(part, file.start() + offset);
            written.map_err(|source| Error::Put(at.0, part.len(), source))?;
            pages = pages.get(part.len()..).unwrap_or_default();
            at = GuestAddress(at.0.wrapping_add(part.len() as u64));
        }
        Ok(())
    }

    /// The same for a thread beside others that do it too: the memory is asked for through the mapping,
    /// where nobody waits for anybody. To write to memory that can't be had would be fatal otherwise.
    ///
    /// # Errors
    /// As [`GuestRam::put_pages`].
    pub fn put_pages_in_parallel(&self, gpa: u64, pages: &[u8]) -> Result<(), Error> {
        let len = pages.len();
        match self.populate(gpa, len)? {
            true => self.write(gpa, pages),
            false => self.put_pages(gpa, pages),
        }
    }

    /// Maps all pages of a range, and makes memory for those that have none. Says whether the kernel can do
    /// that, as it can since Linux 5.14.
    fn populate(&self, gpa: u64, len: usize) -> Result<bool, Error> {
        for slice in self.mem.get_slices(GuestAddress(gpa), len) {
            let slice = slice.map_err(|source| Error::Access { gpa, len, source })?;
            let (start, advice) = (slice.ptr_guard_mut(), Advice::LinuxPopulateWrite);
            // SAFETY: the slice lies in this RAM's own mapping, which `self.mem` keeps, and what is in
            // it does not change.
            match unsafe { madvise(start.as_ptr().cast(), slice.len(), advice) } {
                Ok(()) => {}
                Err(Errno::INVAL) => return Ok(false),
                Err(error) => return Err(Error::Put(gpa, len, error.into())),
            }
        }
        Ok(true)
    }
}
