//! The source's further connections, QEMU's `multifd`: the pages of a round go over all of them at
//! once. Everything else, and what is decided by, stays on the first connection.
//!
//! Each has a thread that takes a frame's worth of pages, sends it, and takes the next one. A round
//! is over when every thread has sent its last frame and, while the guest runs, has seen all of its
//! frames acknowledged. When one connection breaks the migration has failed.

use std::io;
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use super::channel::Channel;
use super::flow::Flow;
use super::stream::Error;
use super::stream::ram::{Packer, Tally};
use super::wire::Wire;
use super::work::{self, Batch, Work};
use crate::memory::{self, GuestRam};
use crate::probes::Errno;

/// More connections than this share nothing any more but the memory for their buffers.
pub(super) const MAX_LANES: u8 = 32;

/// Pages could not be sent over one of them.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LaneError {
    /// The stream.
    #[error("connection {lane} of {of} for pages")]
    Stream {
        /// Which, from 1.
        lane: u8,
        /// How many there are.
        of: u8,
        /// What is wrong with it.
        source: Error,
    },
    /// The guest's memory.
    #[error("reading guest RAM")]
    Memory(#[from] memory::Error),
}

impl Errno for LaneError {
    fn errno(&self) -> i32 {
        match self {
            LaneError::Stream { source, .. } => source.errno(),
            LaneError::Memory(source) => source.errno(),
        }
    }
}

/// The connections, which the destination knows. Dropping them ends them.
#[derive(Debug, Default)]
pub(super) struct Lanes(Vec<Lane>);

#[derive(Debug)]
struct Lane {
    wire: Wire,
    jobs: Option<Sender<Arc<Round>>>,
    thread: Option<JoinHandle<()>>,
}

impl Lanes {
    /// Adds a connection on which the destination waits for pages; `of` is how many there will be.
    ///
    /// # Errors
    /// When there is no thread for it.
    pub(super) fn add(&mut self, wire: Wire, channel: Channel, of: u8) -> io::Result<()> {
        let (jobs, rounds) = mpsc::channel();
        let lane = self.len() + 1;
        let thread = thread::Builder::new()
            .name(format!("multifdsend_{lane}"))
            .spawn(move || serve(channel, &rounds, lane, of))?;
        self.0.push(Lane {
            wire,
            jobs: Some(jobs),
            thread: Some(thread),
        });
        Ok(())
    }

    /// Whether there are any.
    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// How many there are.
    pub(super) fn len(&self) -> u8 {
        u8::try_from(self.0.len()).unwrap_or(u8::MAX)
    }

    /// Lets all of them send `round`.
    pub(super) fn start(&self, round: &Arc<Round>) {
        round.lock().busy = self.0.len();
        for lane in &self.0 {
            let sent = lane.jobs.as_ref().map(|jobs| jobs.send(Arc::clone(round)));
            if !matches!(sent, Some(Ok(()))) {
                // Its thread has panicked, and said so: what it would have sent, others send.
                round.finished(Ok(()));
            }
        }
    }
}

impl Drop for Lanes {
    fn drop(&mut self) {
        for lane in &mut self.0 {
            lane.jobs = None;
            lane.wire.interrupt();
        }
        for lane in &mut self.0 {
            // A thread that panicked has already said why on stderr.
            let _ = lane.thread.take().map(JoinHandle::join);
        }
    }
}

/// A round that all connections send together.
#[derive(Debug)]
pub(super) struct Round {
    ram: GuestRam,
    number: u32,
    /// Whether the guest runs, so that the end is waited for.
    answered: bool,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug)]
struct State {
    work: Work,
    /// Payload bytes that may be sent so far.
    allowed: u64,
    busy: usize,
    sent: Tally,
    loaded: u64,
    error: Option<LaneError>,
}

impl State {
    /// Whoever wants to take something finds that there is nothing.
    fn end(&mut self) {
        self.work.clear();
        self.allowed = u64::MAX;
    }
}

/// How far a round is.
#[derive(Clone, Copy, Debug)]
pub(super) struct Progress {
    /// What was sent.
    pub(super) sent: Tally,
    /// Payload bytes of it that the destination has loaded.
    pub(super) loaded: u64,
    /// Whether that is all.
    pub(super) over: bool,
}

impl Round {
    /// The `number`th one, with `work` to do, of which nothing is sent before it is
    /// [allowed](Round::wait).
    pub(super) fn new(ram: GuestRam, number: u32, work: Work, answered: bool) -> Arc<Self> {
        Arc::new(Round {
            ram,
            number,
            answered,
            state: Mutex::new(State {
                work,
                allowed: 0,
                busy: 0,
                sent: Tally::default(),
                loaded: 0,
                error: None,
            }),
            changed: Condvar::new(),
        })
    }

    /// Lets `allowed` bytes be sent since the start, and waits for the end for no longer than `limit`.
    ///
    /// # Errors
    /// When a connection is broken.
    pub(super) fn wait(&self, allowed: u64, limit: Duration) -> Result<Progress, LaneError> {
        let mut state = self.lock();
        if state.allowed != allowed {
            state.allowed = allowed;
            self.changed.notify_all();
        }
        let going = |state: &mut State| state.busy > 0 && state.error.is_none();
        let (mut state, _) = self
            .changed
            .wait_timeout_while(state, limit, going)
            .unwrap_or_else(PoisonError::into_inner);
        match state.error.take() {
            Some(error) => Err(error),
            None => Ok(Progress {
                sent: state.sent,
                loaded: state.loaded,
                over: state.busy == 0,
            }),
        }
    }

    /// Nobody waits any more: nothing further is sent.
    pub(super) fn give_up(&self) {
        self.lock().end();
        self.changed.notify_all();
    }

    /// The next pages, once they may be sent.
    fn take(&self, room: u64, batch: &mut Batch) -> bool {
        let waits = |state: &mut State| state.sent.bytes >= state.allowed;
        let mut state = self
            .changed
            .wait_while(self.lock(), waits)
            .unwrap_or_else(PoisonError::into_inner);
        state.work.take(room, batch)
    }

    fn note(&self, sent: Tally, loaded: u64) {
        let mut state = self.lock();
        state.sent.add(sent);
        state.loaded += loaded;
    }

    fn finished(&self, result: Result<(), LaneError>) {
        let mut state = self.lock();
        state.busy -= 1;
        if let Err(error) = result {
            state.end();
            state.error.get_or_insert(error);
        }
        if state.busy == 0 || state.error.is_some() {
            self.changed.notify_all();
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn serve(mut channel: Channel, rounds: &Receiver<Arc<Round>>, lane: u8, of: u8) {
    let mut flow = Flow::default();
    let mut packer = Packer::new(0);
    for round in rounds {
        let sent = send(&mut channel, &mut flow, &mut packer, &round);
        round.finished(sent.map_err(|error| match error {
            SendError::Stream(source) => LaneError::Stream { lane, of, source },
            SendError::Memory(source) => source.into(),
        }));
    }
}

enum SendError {
    Stream(Error),
    Memory(memory::Error),
}

impl From<Error> for SendError {
    fn from(error: Error) -> Self {
        SendError::Stream(error)
    }
}

impl From<memory::Error> for SendError {
    fn from(error: memory::Error) -> Self {
        SendError::Memory(error)
    }
}

/// Sends pages of `round` until there are none.
fn send(
    channel: &mut Channel,
    flow: &mut Flow,
    packer: &mut Packer,
    round: &Round,
) -> Result<(), SendError> {
    let mut batch = Batch::default();
    packer.begin(round.number);
    while work::fill(&round.ram, packer, &mut batch, |room, batch| {
        round.take(room, batch)
    })? {
        let before = flow.bytes_loaded();
        flow.make_room(channel)?;
        let tally = packer.tally();
        channel.send_ram(packer.frame())?;
        packer.clear();
        flow.sent(tally);
        round.note(tally, flow.bytes_loaded() - before);
    }
    if round.answered {
        let before = flow.bytes_loaded();
        flow.drain(channel)?;
        round.note(Tally::default(), flow.bytes_loaded() - before);
    }
    Ok(())
}
