//! Guest RAM that moves to another process without being copied: its memfd is passed, and mapped in
//! the place of the memory that was there.
//!
//! KVM's slots name host-virtual addresses, which stay, so neither they nor anybody who holds the map
//! notices. The descriptor's number stays too, and means the other memfd from then on.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use rustix::fs::{SealFlags, fcntl_get_seals};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use super::{Error, GuestRam, advise_huge_pages};

/// Another process's RAM in the place of this one's own, which comes back when this is dropped.
#[derive(Debug)]
pub struct Adopted {
    ram: GuestRam,
    /// The memory that was there before; `None` once it is not wanted back.
    own: Option<OwnedFd>,
}

impl GuestRam {
    /// A descriptor of this RAM, for another process.
    ///
    /// # Errors
    /// When there are no more descriptors.
    pub fn share(&self) -> Result<OwnedFd, Error> {
        let own = self.memfd().as_fd().try_clone_to_owned();
        own.map_err(Error::HandOver)
    }

    /// Puts `theirs`, RAM of the same size that another process has shared, in the place of this one.
    /// The caller sees to it that nobody writes to RAM while both processes have it and the guest is
    /// the other one's.
    ///
    /// # Errors
    /// When it is no RAM like this. It all stays as it was.
    pub fn adopt(&self, theirs: OwnedFd) -> Result<Adopted, Error> {
        let theirs = File::from(theirs);
        let size = theirs.metadata().map_err(Error::HandOver)?.len();
        if size != self.size() {
            return Err(Error::Foreign("its size differs"));
        }
        // A file that may shrink would take this process with it when it does.
        let sealed = fcntl_get_seals(&theirs).is_ok_and(|seals| seals.contains(SealFlags::SHRINK));
        if !sealed {
            return Err(Error::Foreign("it is no memfd whose size is sealed"));
        }
        let own = Some(self.share()?);
        let adopted = Adopted {
            ram: self.clone(),
            own,
        };
        // If it fails half-way, the drop mends what was done.
        self.map(&theirs).map_err(Error::HandOver)?;
        Ok(adopted)
    }

    /// Maps `file` over all regions, and makes the descriptor's number mean it.
    fn map(&self, file: &impl AsRawFd) -> io::Result<()> {
        let number = self.memfd().as_raw_fd();
        // SAFETY: the number stays an open descriptor of `self.memfd()`, which owns it and is borrowed
        // here; no Rust code relies on which file it means.
        if unsafe { libc::dup3(file.as_raw_fd(), number, libc::O_CLOEXEC) } < 0 {
            return Err(io::Error::last_os_error());
        }
        for region in self.mem().iter() {
            let offset = region.file_offset().map_or(0, |file| file.start());
            let offset = libc::off_t::try_from(offset).map_err(io::Error::other)?;
            let length = usize::try_from(region.len()).map_err(io::Error::other)?;
            // SAFETY: the range is this region's own mapping, of which nobody holds a Rust reference:
            // all accesses are vm-memory's volatile ones, and the kernel's. It is replaced at once, by
            // a mapping as long of a file as long.
            let mapped = unsafe {
                libc::mmap(
                    region.as_ptr().cast(),
                    length,
                    libc::PROT_READ | libc::PROT_WRITE,
                    libc::MAP_SHARED | libc::MAP_NORESERVE | libc::MAP_FIXED,
                    number,
                    offset,
                )
            };
            if mapped == libc::MAP_FAILED {
                return Err(io::Error::last_os_error());
            }
            advise_huge_pages(region);
        }
        Ok(())
    }
}

impl Adopted {
    /// The guest is this process's now, and so is its RAM.
    pub fn keep(mut self) {
        self.own = None;
    }
}

impl Drop for Adopted {
    fn drop(&mut self) {
        let Some(own) = self.own.take() else { return };
        if let Err(error) = self.ram.map(&own) {
            // It would write to the memory of a guest that another process runs.
            tracing::error!("can't let go of another process's guest RAM: {error}");
            std::process::abort();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::{PAGE_SIZE, PageRun};

    const LAYOUT: [(u64, u64); 2] = [(0, 2 * PAGE_SIZE), (0x10_0000, 2 * PAGE_SIZE)];

    fn byte(ram: &GuestRam, gpa: u64) -> u8 {
        let mut byte = [0];
        ram.read(gpa, &mut byte).unwrap();
        byte[0]
    }

    #[test]
    fn ram_is_one_for_both_until_it_is_given_back_or_kept() {
        let [here, there] = [
            GuestRam::new(&LAYOUT).unwrap(),
            GuestRam::new(&LAYOUT).unwrap(),
        ];
        let far = 0x10_0000 + PAGE_SIZE;
        here.write(far, &[7]).unwrap();
        there.write(far, &[1]).unwrap();
        let adopted = there.adopt(here.share().unwrap()).unwrap();
        assert_eq!(byte(&there, far), 7);
        there.write(0, &[9]).unwrap();
        assert_eq!(byte(&here, 0), 9);
        drop(adopted);
        assert_eq!((byte(&there, far), byte(&there, 0)), (1, 0));
        assert_eq!((byte(&here, far), byte(&here, 0)), (7, 9));

        there.adopt(here.share().unwrap()).unwrap().keep();
        drop(here);
        assert_eq!((byte(&there, far), byte(&there, 0)), (7, 9));
        // What asks the memfd asks the right one.
        let (written, _) = there.written_and_untouched().unwrap();
        assert_eq!(written.iter().map(|run| run.pages).sum::<u64>(), 2);
        there.zero(PageRun { gpa: far, pages: 1 }).unwrap();
        assert_eq!(byte(&there, far), 0);
    }

    #[test]
    fn what_is_no_ram_is_refused() {
        let ram = GuestRam::new(&LAYOUT).unwrap();
        let small = GuestRam::new(&LAYOUT[..1]).unwrap();
        let error = ram.adopt(small.share().unwrap()).unwrap_err();
        assert!(matches!(error, Error::Foreign("its size differs")));
        let file = tempfile::tempfile().unwrap();
        file.set_len(4 * PAGE_SIZE).unwrap();
        assert!(matches!(ram.adopt(file.into()), Err(Error::Foreign(_))));
        assert_eq!(byte(&ram, 0), 0);
    }
}
