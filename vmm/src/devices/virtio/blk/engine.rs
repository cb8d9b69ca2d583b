//! How the host does what a disk's driver asks for: by io_uring, with many requests under way; or,
//! where there is none, one request after the other.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};

use nix::fcntl::{FallocateFlags, fallocate};

use super::request::Request;
use crate::memory::ring::{Completion, Operation, Ring};

/// One of the two.
pub(super) enum Engine {
    /// io_uring.
    Ring(Box<Ring<Request>>, usize),
    /// System calls.
    Calls(File),
}

/// A request and how it ended.
type Ended = (Request, io::Result<()>);

impl Engine {
    /// For `file`, with up to `depth` requests under way.
    pub(super) fn new(file: File, depth: u16) -> io::Result<Self> {
        match Ring::new(file.try_clone()?, depth) {
            Ok(ring) => Ok(Engine::Ring(Box::new(ring), usize::from(depth))),
            Err(error) => {
                tracing::info!("no io_uring here, disk requests go one by one: {error}");
                Ok(Engine::Calls(file))
            }
        }
    }

    /// Whether it takes no further request now.
    pub(super) fn is_full(&self) -> bool {
        match self {
            Engine::Ring(ring, depth) => ring.in_flight() == *depth,
            Engine::Calls(_) => false,
        }
    }

    /// Requests under way.
    pub(super) fn in_flight(&self) -> usize {
        match self {
            Engine::Ring(ring, _) => ring.in_flight(),
            Engine::Calls(_) => 0,
        }
    }

    /// Begins a request; returns it if it is over at once. The ring is not full.
    pub(super) fn start(&mut self, request: Request, operation: Operation) -> Option<Ended> {
        match self {
            Engine::Ring(ring, _) => {
                let (request, _) = ring.push(request, operation).err()?;
                Some((request, Err(io::ErrorKind::ResourceBusy.into())))
            }
            Engine::Calls(file) => Some((request, all_at_once(file, operation))),
        }
    }

    /// Hands the kernel what was begun.
    pub(super) fn submit(&mut self) -> io::Result<()> {
        match self {
            Engine::Ring(ring, _) => ring.submit(0),
            Engine::Calls(_) => Ok(()),
        }
    }

    /// Waits for one request to end.
    pub(super) fn wait(&mut self) -> io::Result<()> {
        match self {
            Engine::Ring(ring, _) => ring.submit(1),
            Engine::Calls(_) => Ok(()),
        }
    }

    /// A request that has ended. One that moved a part of its bytes goes on with the rest.
    pub(super) fn completed(&mut self) -> Option<Ended> {
        let Engine::Ring(ring, _) = self else {
            return None;
        };
        loop {
            let (request, operation, result) = ring.pop()?;
            match advance((request, operation, result)) {
                Progress::Ended(ended) => return Some(ended),
                Progress::Rest(request, rest) => {
                    if let Err((request, _)) = ring.push(request, rest) {
                        return Some((request, Err(io::ErrorKind::ResourceBusy.into())));
                    }
                    if let Err(error) = ring.submit(0) {
                        tracing::warn!("submitting the rest of a disk request: {error}");
                    }
                }
            }
        }
    }

    /// What to wait for, besides the driver.
    pub(super) fn source(&self) -> Option<RawFd> {
        match self {
            Engine::Ring(ring, _) => Some(ring.as_raw_fd()),
            Engine::Calls(_) => None,
        }
    }
}

/// What a completion means.
enum Progress {
    Ended(Ended),
    /// A part of it was done; this is left.
    Rest(Request, Operation),
}

fn advance((request, operation, result): Completion<Request>) -> Progress {
    let moved = match result {
        Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
        Err(error) => return Progress::Ended((request, Err(error))),
        // The file is shorter than the disk it was.
        Ok(0) if matches!(operation, Operation::Read(..) | Operation::Write(..)) => {
            return Progress::Ended((request, Err(io::ErrorKind::UnexpectedEof.into())));
        }
        Ok(moved) => moved,
    };
    match rest(operation, moved) {
        Some(rest) => Progress::Rest(request, rest),
        None => Progress::Ended((request, Ok(()))),
    }
}

/// What is left of `operation` after `moved` bytes of it.
fn rest(operation: Operation, moved: usize) -> Option<Operation> {
    match operation {
        Operation::Read(mut pieces, offset) => {
            pieces.split_to(moved);
            (!pieces.is_empty()).then(|| Operation::Read(pieces, offset + moved as u64))
        }
        Operation::Write(mut pieces, offset) => {
            pieces.split_to(moved);
            (!pieces.is_empty()).then(|| Operation::Write(pieces, offset + moved as u64))
        }
        Operation::Sync | Operation::Allocate { .. } => None,
    }
}

fn all_at_once(file: &File, mut operation: Operation) -> io::Result<()> {
    loop {
        let result = match &operation {
            Operation::Read(pieces, offset) => pieces.read_from(file, Some(*offset)),
            Operation::Write(pieces, offset) => pieces.write_to(file, Some(*offset)),
            Operation::Sync => return file.sync_data(),
            Operation::Allocate { mode, offset, len } => {
                let flags = FallocateFlags::from_bits_retain(*mode);
                let range = (libc::off_t::try_from(*offset), libc::off_t::try_from(*len));
                let (Ok(offset), Ok(len)) = range else {
                    return Err(io::ErrorKind::InvalidInput.into());
                };
                return Ok(fallocate(file, flags, offset, len)?);
            }
        };
        let moved = match result {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(moved) => moved,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
            Err(error) => return Err(error),
        };
        match rest(operation, moved) {
            Some(left) => operation = left,
            None => return Ok(()),
        }
    }
}
