//! The ways that pages take: in messages, over one connection or several, or to places of their own in a
//! file; or none, when the destination is passed the memory itself.

use std::os::fd::OwnedFd;
use std::time::Instant;

use super::board::{Board, Cancelled};
use super::lanes::LaneError;
use super::pace::Pace;
use super::stream::Error;
use super::stream::mapped::{self, BATCH, Saver};
use super::stream::ram::Tally;
use super::work::split;
use crate::memory::{self, GuestRam, PageRun};
use crate::probes::Errno;

/// The way that all pages of a migration take.
#[derive(Debug)]
pub(super) enum Pages {
    /// In messages, also over so many further connections.
    Sent(u8),
    /// None: this is guest RAM.
    Passed(OwnedFd),
    /// Each has a place in the file that the stream goes to, so far behind its start.
    Mapped(u64),
}

/// Pages could not be sent.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SendError {
    /// The stream.
    #[error(transparent)]
    Stream(#[from] Error),
    /// The guest's memory.
    #[error("reading guest RAM")]
    Memory(#[from] memory::Error),
    /// A further connection for pages.
    #[error(transparent)]
    Lane(#[from] LaneError),
    /// The file that they have places in.
    #[error(transparent)]
    Mapped(#[from] mapped::Error),
    /// A person gave up.
    #[error(transparent)]
    Cancelled(#[from] Cancelled),
}

impl Errno for SendError {
    fn errno(&self) -> i32 {
        match self {
            SendError::Stream(source) => source.errno(),
            SendError::Memory(source) => source.errno(),
            SendError::Lane(source) => source.errno(),
            SendError::Mapped(source) => source.errno(),
            SendError::Cancelled(_) => libc::ECANCELED,
        }
    }
}

/// Writes the pages of a round to their places, and tells `note` of what was written. Those of `zeroes`
/// are known to be that.
pub(super) fn save(
    saver: &mut Saver,
    ram: &GuestRam,
    (zeroes, runs): (&[PageRun], &[PageRun]),
    pace: Pace,
    board: &Board,
    mut note: impl FnMut(Tally),
) -> Result<Tally, SendError> {
    let mut sent = Tally::default();
    let began = Instant::now();
    for &run in zeroes {
        let tally = saver.clear(run)?;
        sent.add(tally);
        note(tally);
    }
    let mut rest: Vec<_> = runs.iter().rev().copied().collect();
    while let Some(run) = split(&mut rest, BATCH) {
        // Nothing here waits for the file, as a cancel would wake it.
        if board.is_cancelled() {
            return Err(Cancelled.into());
        }
        let tally = saver.save(ram, run)?;
        sent.add(tally);
        note(tally);
        pace.keep(sent, began, board)?;
    }
    Ok(sent)
}
