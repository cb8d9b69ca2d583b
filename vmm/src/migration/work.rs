//! The pages of a round that are still to be sent, for as many senders as there are.

use super::stream::ram::Packer;
use crate::memory::{self, GuestRam, PAGE_SIZE, PageRun};

/// What is left of a round, in the order in which it is sent: zeroes first, which cost nothing.
#[derive(Debug, Default)]
pub(super) struct Work {
    /// Backwards, so that the next one is the last.
    zeroes: Vec<PageRun>,
    runs: Vec<PageRun>,
}

/// A part of it that one sender has taken.
#[derive(Debug, Default)]
pub(super) struct Batch {
    /// These are known to be zeroes.
    zeroes: Option<PageRun>,
    /// These have to be looked at.
    runs: Vec<PageRun>,
}

impl Work {
    /// Everything of a round. The pages of `zeroes` are known to be that.
    pub(super) fn new(zeroes: &[PageRun], runs: &[PageRun]) -> Self {
        let backwards = |runs: &[PageRun]| runs.iter().rev().copied().collect();
        Work {
            zeroes: backwards(zeroes),
            runs: backwards(runs),
        }
    }

    /// Nothing more is sent.
    pub(super) fn clear(&mut self) {
        *self = Work::default();
    }

    /// Takes what fits into a frame in which there is room for `room` pages, as the next contents of
    /// `batch`. Says whether there was anything.
    pub(super) fn take(&mut self, room: u64, batch: &mut Batch) -> bool {
        batch.runs.clear();
        batch.zeroes = split(&mut self.zeroes, Packer::MAX_ZERO_PAGES);
        if batch.zeroes.is_some() {
            return true;
        }
        let mut room = room;
        while let Some(run) = split(&mut self.runs, room) {
            room -= run.pages;
            batch.runs.push(run);
        }
        !batch.runs.is_empty()
    }
}

/// Takes no more than `most` pages off the end of the list.
pub(super) fn split(runs: &mut Vec<PageRun>, most: u64) -> Option<PageRun> {
    let run = runs.last_mut().filter(|_| most > 0)?;
    let taken = PageRun {
        gpa: run.gpa,
        pages: run.pages.min(most),
    };
    (run.gpa, run.pages) = (run.gpa + taken.pages * PAGE_SIZE, run.pages - taken.pages);
    if run.pages == 0 {
        runs.pop();
    }
    Some(taken)
}

impl Batch {
    /// Copies its pages out of `ram` into a frame. There must be room, as was said to [`Work::take`].
    ///
    /// # Errors
    /// When there is no such page.
    pub(super) fn pack(&self, ram: &GuestRam, packer: &mut Packer) -> Result<(), memory::Error> {
        if let Some(run) = self.zeroes {
            packer.add_zeroes(run);
        }
        for run in &self.runs {
            for page in 0..run.pages {
                packer.add(ram, run.gpa + page * PAGE_SIZE)?;
            }
        }
        Ok(())
    }
}

/// Fills a frame from what `take` gets of a round, for a room in pages. Says whether there is
/// anything in it.
///
/// # Errors
/// When there is no such page.
pub(super) fn fill(
    ram: &GuestRam,
    packer: &mut Packer,
    batch: &mut Batch,
    mut take: impl FnMut(u64, &mut Batch) -> bool,
) -> Result<bool, memory::Error> {
    while packer.room() > 0 && take(packer.room(), batch) {
        batch.pack(ram, packer)?;
    }
    Ok(packer.tally().pages > 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(page: u64, pages: u64) -> PageRun {
        PageRun {
            gpa: page * PAGE_SIZE,
            pages,
        }
    }

    #[test]
    fn every_page_is_taken_once_and_no_more_than_there_is_room_for() {
        let most = Packer::MAX_ZERO_PAGES;
        let mut work = Work::new(&[run(500, most + 1)], &[run(0, 3), run(7, 70)]);
        let mut batch = Batch::default();
        let mut taken = Vec::new();
        while work.take(64, &mut batch) {
            let pages: u64 = batch.runs.iter().map(|run| run.pages).sum();
            assert!(pages <= 64);
            taken.push((batch.zeroes, batch.runs.clone()));
        }
        let zeroes = |run| (Some(run), Vec::new());
        let expected = [
            zeroes(run(500, most)),
            zeroes(run(500 + most, 1)),
            (None, vec![run(0, 3), run(7, 61)]),
            (None, vec![run(68, 9)]),
        ];
        assert_eq!(taken, expected);
        assert!(!Work::new(&[], &[run(0, 3)]).take(0, &mut batch));
    }

    #[test]
    fn a_frame_is_filled_up_when_pages_turn_out_to_be_zeroes() {
        let ram = GuestRam::new(&[(0, 256 * PAGE_SIZE)]).unwrap();
        ram.write(200 * PAGE_SIZE, &[1]).unwrap();
        let mut work = Work::new(&[], &[run(0, 256)]);
        let (mut packer, mut batch) = (Packer::new(1), Batch::default());
        let take = |room, batch: &mut Batch| work.take(room, batch);
        assert!(fill(&ram, &mut packer, &mut batch, take).unwrap());
        let tally = packer.tally();
        assert_eq!((tally.pages, tally.zero), (256, 255));
    }
}
