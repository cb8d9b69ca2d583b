//! An io_uring that moves bytes between one file and guest RAM, many requests at a time.
//!
//! A request's pieces belong to the ring until the kernel is done with them, also when the ring is
//! dropped: the kernel would write into memory that may be somebody else's by then.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};

use io_uring::{IoUring, opcode, squeue, types};

use super::transfer::Pieces;

/// What the kernel is to do.
#[derive(Debug)]
pub enum Operation {
    /// Fill the pieces from the file at an offset.
    Read(Pieces, u64),
    /// Write the pieces to the file at an offset.
    Write(Pieces, u64),
    /// `fdatasync`.
    Sync,
    /// `fallocate` of a range with these flags.
    Allocate {
        /// `FALLOC_FL_*`.
        mode: i32,
        /// Where the range starts.
        offset: u64,
        /// Its length.
        len: u64,
    },
}

/// A request that is done: what it was started with, and how many bytes moved.
pub type Completion<T> = (T, Operation, io::Result<usize>);

/// The ring. `T` is what a request's owner wants back with its completion.
pub struct Ring<T> {
    ring: IoUring,
    file: File,
    /// What the kernel has, by its place: the user data of a request.
    pending: Vec<Option<(T, Operation)>>,
    free: Vec<usize>,
}

impl<T> Ring<T> {
    /// A ring for up to `depth` requests at a time on `file`.
    ///
    /// # Errors
    /// When the kernel has no io_uring, or does not let this process have one.
    pub fn new(file: File, depth: u16) -> io::Result<Self> {
        let ring = IoUring::new(u32::from(depth).next_power_of_two())?;
        let depth = usize::from(depth);
        Ok(Ring {
            ring,
            file,
            pending: std::iter::repeat_with(|| None).take(depth).collect(),
            free: (0..depth).collect(),
        })
    }

    /// Requests that the kernel has.
    pub fn in_flight(&self) -> usize {
        self.pending.len() - self.free.len()
    }

    /// Takes a request; it starts with the next [`Ring::submit`]. Gives it back when the ring is
    /// full.
    pub fn push(&mut self, owner: T, operation: Operation) -> Result<(), (T, Operation)> {
        let Some(place) = self.free.pop() else {
            return Err((owner, operation));
        };
        let entry = self.entry(&operation).user_data(place as u64);
        let slot = &mut self.pending[place];
        // The vectors do not move with the Pieces: they are on the heap.
        *slot = Some((owner, operation));
        // SAFETY: the entry's vectors and the memory that they name are kept by `pending` until
        // the completion is reaped, and `drop` reaps all.
        let refused = unsafe { self.ring.submission().push(&entry) }.is_err();
        match slot.take_if(|_| refused) {
            Some(request) => {
                self.free.push(place);
                Err(request)
            }
            None => Ok(()),
        }
    }

    /// Hands the kernel what was pushed, and waits for `wait` completions.
    ///
    /// # Errors
    /// What the kernel says; `EINTR` is not an error.
    pub fn submit(&mut self, wait: usize) -> io::Result<()> {
        loop {
            match self.ring.submit_and_wait(wait) {
                Ok(_) => return Ok(()),
                Err(error) if error.raw_os_error() == Some(libc::EINTR) => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Takes one request that is done.
    pub fn pop(&mut self) -> Option<Completion<T>> {
        let entry = self.ring.completion().next()?;
        let place = usize::try_from(entry.user_data()).ok()?;
        let (owner, operation) = self.pending.get_mut(place)?.take()?;
        self.free.push(place);
        let result = match usize::try_from(entry.result()) {
            Ok(bytes) => Ok(bytes),
            Err(_) => Err(io::Error::from_raw_os_error(
                entry.result().unsigned_abs().cast_signed(),
            )),
        };
        if let (Operation::Read(pieces, _), Ok(bytes)) = (&operation, &result) {
            pieces.mark_dirty(*bytes);
        }
        Some((owner, operation, result))
    }

    fn entry(&self, operation: &Operation) -> squeue::Entry {
        let fd = types::Fd(self.file.as_raw_fd());
        let count = |pieces: &Pieces| pieces.count().unsigned_abs();
        match operation {
            Operation::Read(pieces, offset) => {
                opcode::Readv::new(fd, pieces.as_ptr(), count(pieces))
                    .offset(*offset)
                    .build()
            }
            Operation::Write(pieces, offset) => {
                opcode::Writev::new(fd, pieces.as_ptr(), count(pieces))
                    .offset(*offset)
                    .build()
            }
            Operation::Sync => opcode::Fsync::new(fd)
                .flags(types::FsyncFlags::DATASYNC)
                .build(),
            Operation::Allocate { mode, offset, len } => opcode::Fallocate::new(fd, *len)
                .offset(*offset)
                .mode(*mode)
                .build(),
        }
    }
}

/// Readable when a request is done.
impl<T> AsRawFd for Ring<T> {
    fn as_raw_fd(&self) -> RawFd {
        self.ring.as_raw_fd()
    }
}

impl<T> Drop for Ring<T> {
    fn drop(&mut self) {
        while self.in_flight() > 0 {
            if self.submit(1).is_err() {
                // The kernel still has pieces and can't be waited for: they must stay mapped.
                self.pending.drain(..).for_each(std::mem::forget);
                return;
            }
            while self.pop().is_some() {}
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;
    use crate::memory::GuestRam;

    #[test]
    fn many_requests_complete_and_a_full_ring_says_so() {
        let ram = GuestRam::new(&[(0, 0x10_0000)]).unwrap();
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&[9; 0x10_0000]).unwrap();
        let Ok(mut ring) = Ring::new(file, 8) else {
            println!("skipped: no io_uring here");
            return;
        };
        for round in 0..4u64 {
            for n in 0..8 {
                let at = (round * 8 + n) * 0x1000;
                let pieces = ram.pieces([(at, 0x1000)]).unwrap();
                assert!(ring.push(at, Operation::Read(pieces, at)).is_ok());
            }
            assert!(ring.push(0, Operation::Sync).is_err());
            let mut done = 0;
            while done < 8 {
                ring.submit(1).unwrap();
                while let Some((at, operation, result)) = ring.pop() {
                    assert_eq!(result.unwrap(), 0x1000);
                    let Operation::Read(pieces, offset) = operation else {
                        panic!("not what was pushed");
                    };
                    assert_eq!(offset, at);
                    let mut bytes = [0; 0x1000];
                    pieces.copy_to(&mut bytes);
                    assert_eq!(bytes, [9; 0x1000]);
                    done += 1;
                }
            }
            assert_eq!(ring.in_flight(), 0);
        }
    }

    #[test]
    fn an_error_is_the_requests_own() {
        let ram = GuestRam::new(&[(0, 0x1000)]).unwrap();
        let file = File::open("/dev/null").unwrap();
        let Ok(mut ring) = Ring::new(file, 2) else {
            println!("skipped: no io_uring here");
            return;
        };
        let write = Operation::Write(ram.pieces([(0, 16)]).unwrap(), 0);
        assert!(ring.push('w', write).is_ok());
        ring.submit(1).unwrap();
        let (owner, _, result) = ring.pop().unwrap();
        assert_eq!(owner, 'w');
        assert_eq!(result.unwrap_err().raw_os_error(), Some(libc::EBADF));
    }
}
