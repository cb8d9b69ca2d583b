//! RAM that is filled with whole pages from elsewhere, while no vCPU and no device uses it.

use std::fs;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::{PoisonError, RwLock};

use linux_raw_sys::general::{
    UFFD_API, UFFD_USER_MODE_ONLY, UFFDIO_REGISTER_MODE_MISSING, uffdio_api, uffdio_copy,
    uffdio_range, uffdio_register,
};
use linux_raw_sys::ioctl::{UFFDIO_API, UFFDIO_COPY, UFFDIO_REGISTER};
use rustix::io;
use rustix::ioctl::{Updater, ioctl};
use rustix::mm::{UserfaultfdFlags, userfaultfd};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::{Error, GuestRam, PAGE_SIZE};

/// Says whether the kernel has huge pages for memfds.
const SHMEM_ENABLED: &str = "/sys/kernel/mm/transparent_hugepage/shmem_enabled";

/// RAM that gets its first pages. What has not arrived yet must be neither read nor written, other than by
/// [`GuestRam::put_pages`] and [`GuestRam::zero`], before this is dropped: this process would wait until
/// then, and the kernel's own accesses, such as KVM's, fail.
#[derive(Debug)]
pub struct Filling(GuestRam);

/// The userfaultfd with which RAM is being filled, if it is.
#[derive(Debug, Default)]
pub(super) struct Filler(RwLock<Option<OwnedFd>>);

impl GuestRam {
    /// Has every page that is put into RAM come with its memory, as long as what is returned lives.
    ///
    /// A page that has no memory is not zeroed only to be overwritten then, takes no fault, and threads
    /// do not wait for each other, as they do who write to one memfd. Such pages are small ones: where the
    /// kernel has huge pages for memfds, the guest is better off with those. There, and where this process
    /// may not do it, pages are put as ever.
    pub fn fill(&self) -> Filling {
        if small_pages() {
            match self.userfaultfd() {
                Ok(fd) => self.filler.set(Some(fd)),
                Err(error) => tracing::debug!("no userfaultfd, RAM is filled by writes: {error}"),
            }
        }
        Filling(self.clone())
    }

    /// A userfaultfd for all of RAM (Documentation/admin-guide/mm/userfaultfd.rst).
    fn userfaultfd(&self) -> io::Result<OwnedFd> {
        // That accesses of the kernel's own do not wait is why this takes no rights.
        let user_only = UserfaultfdFlags::from_bits_retain(UFFD_USER_MODE_ONLY);
        // SAFETY: it stays in this module, which puts pages where there are none and does nothing else.
        let fd = unsafe { userfaultfd(UserfaultfdFlags::CLOEXEC | user_only)? };
        let mut api = uffdio_api {
            api: UFFD_API.into(),
            features: 0,
            ioctls: 0,
        };
        // SAFETY: linux/userfaultfd.h has this structure for this number.
        unsafe { ioctl(&fd, Updater::<UFFDIO_API, _>::new(&mut api))? };
        for region in self.mem.iter() {
            let mut register = uffdio_register {
                range: uffdio_range {
                    start: region.as_ptr().expose_provenance() as u64,
                    len: region.len(),
                },
                mode: UFFDIO_REGISTER_MODE_MISSING.into(),
                ioctls: 0,
            };
            // SAFETY: as above; the range is this region's own mapping, which keeps what it has.
            unsafe { ioctl(&fd, Updater::<UFFDIO_REGISTER, _>::new(&mut register))? };
        }
        Ok(fd)
    }

    /// Puts whole pages into RAM that no vCPU uses yet. The kernel copies them, so that a page that had
    /// no memory before takes no fault and is not zeroed only to be overwritten.
    ///
    /// # Errors
    /// When they are not all RAM, or there is no memory for them.
    pub fn put_pages(&self, gpa: u64, mut pages: &[u8]) -> Result<(), Error> {
        let len = pages.len();
        let mut at = GuestAddress(gpa);
        if !self.mem.check_range(at, len) {
            return Err(Error::outside(gpa, len));
        }
        let filler = self.filler.0.read().unwrap_or_else(PoisonError::into_inner);
        while !pages.is_empty() {
            let found = self.mem.to_region_addr(at);
            let place = found.and_then(|(region, offset)| {
                let left = usize::try_from(region.len() - offset.0).unwrap_or(usize::MAX);
                Some((region, region.file_offset()?, offset.0, left))
            });
            let Some((region, file, offset, left)) = place else {
                return Err(Error::outside(gpa, len));
            };
            let mut part = pages.get(..left).unwrap_or(pages);
            let mut done = 0;
            if let Some(fd) = &*filler {
                done = copy(fd, region.as_ptr().wrapping_add(offset as usize), part);
                // A page that is there already can't be copied to. The next one may be missing again.
                part = part.get(..done + PAGE_SIZE as usize).unwrap_or(part);
            }
            let rest = part.get(done..).unwrap_or_default();
            let written = file
                .file()
                .write_all_at(rest, file.start() + offset + done as u64);
            written.map_err(|source| Error::Put(at.0, part.len(), source))?;
            pages = pages.get(part.len()..).unwrap_or_default();
            at = GuestAddress(at.0.wrapping_add(part.len() as u64));
        }
        Ok(())
    }
}

impl Drop for Filling {
    fn drop(&mut self) {
        self.0.filler.set(None);
    }
}

impl Filler {
    /// Waits for those who put pages.
    fn set(&self, fd: Option<OwnedFd>) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = fd;
    }
}

/// Whether memfds have small pages in any case.
fn small_pages() -> bool {
    fs::read_to_string(SHMEM_ENABLED)
        .is_ok_and(|text| ["[never]", "[deny]"].iter().any(|no| text.contains(no)))
}

/// Copies pages to `target`, a place in registered RAM that is long enough, up to the first that is there
/// already, or whatever else is in the way. Returns the number of bytes.
fn copy(fd: impl AsFd, target: *mut u8, pages: &[u8]) -> usize {
    let mut done = 0;
    loop {
        let rest = pages.get(done..).unwrap_or_default();
        if rest.is_empty() {
            return done;
        }
        let mut copy = uffdio_copy {
            dst: target.wrapping_add(done).expose_provenance() as u64,
            src: rest.as_ptr().expose_provenance() as u64,
            len: rest.len() as u64,
            mode: 0,
            copy: 0,
        };
        // SAFETY: linux/userfaultfd.h has this structure for this number. What it writes to is guest RAM,
        // to which nobody has a Rust reference.
        let copied = unsafe { ioctl(&fd, Updater::<UFFDIO_COPY, _>::new(&mut copy)) };
        done += usize::try_from(copy.copy).unwrap_or(0).min(rest.len());
        match copied {
            // It was interrupted after a part.
            Err(io::Errno::AGAIN) if copy.copy > 0 => {}
            _ => return done,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::PageRun;
    use crate::probes::Errno;

    #[test]
    fn ram_that_is_being_filled_takes_every_page() {
        const PAGES: usize = 96;
        let half = PAGES as u64 / 2 * PAGE_SIZE;
        let ram = GuestRam::new(&[(0, half), (half, half)]).unwrap();
        let mut expected = vec![0; PAGES * PAGE_SIZE as usize];
        for (number, page) in expected.chunks_mut(PAGE_SIZE as usize).enumerate() {
            page.fill(number as u8 + 1);
        }
        // Some pages are there before, or come twice.
        ram.write(5 * PAGE_SIZE, &[0xff; 3]).unwrap();
        let wanted = small_pages() && ram.userfaultfd().is_ok();
        let filling = ram.fill();
        let used = ram.filler.0.read().unwrap().is_some();
        assert!(used == wanted);
        if !used {
            println!("SKIP: no userfaultfd here, or huge pages for memfds: only writes are tested");
        }
        let put = |first: usize, pages: usize| {
            let at = first * PAGE_SIZE as usize;
            let pages = &expected[at..at + pages * PAGE_SIZE as usize];
            ram.put_pages(at as u64, pages).unwrap();
        };
        put(47, 2);
        put(90, 1);
        std::thread::scope(|scope| {
            for first in (0..PAGES).step_by(12) {
                scope.spawn(move || put(first, 12));
            }
        });
        let beyond = ram.put_pages(2 * half - PAGE_SIZE, &[0; 2 * PAGE_SIZE as usize]);
        assert_eq!(beyond.unwrap_err().errno(), libc::EFAULT);
        let hole = PageRun {
            gpa: 20 * PAGE_SIZE,
            pages: 3,
        };
        ram.zero(hole).unwrap();
        put(21, 1);
        drop(filling);
        for number in [20, 22] {
            expected[number * PAGE_SIZE as usize..][..PAGE_SIZE as usize].fill(0);
        }
        let mut all = vec![0; expected.len()];
        ram.read(0, &mut all).unwrap();
        assert!(all == expected);
        // It is RAM like any other again.
        ram.put_pages(0, &expected[..4096]).unwrap();
        ram.zero(hole).unwrap();
        ram.write(20 * PAGE_SIZE, &[7]).unwrap();
    }
}
