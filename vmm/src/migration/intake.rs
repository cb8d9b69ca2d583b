//! The destination's further connections: pages arrive on all of them at once. What a round is, and
//! when it is over, the first connection says.
//!
//! Each has a thread that loads what comes. A connection that breaks is told to the source on that
//! connection; the source then ends the migration on the first one.

use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use super::channel::Channel;
use super::status::describe;
use super::stream;
use super::stream::frame::Kind;
use super::stream::message::Ack;
use super::stream::ram::{self, LoadError, Tally};
use super::wire::Wire;
use crate::memory::{self, GuestRam};
use crate::probes::Errno;

/// Pages did not arrive.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// One of the connections.
    #[error("connection {lane} for pages")]
    Stream {
        /// Which, from 1.
        lane: usize,
        /// What is wrong with it.
        source: stream::Error,
    },
    /// Guest RAM.
    #[error("guest RAM")]
    Memory(#[from] memory::Error),
    /// The round should be over, but is not.
    #[error("{missing} pages of round {round} did not arrive on any connection for {} s", silence.as_secs())]
    Stalled {
        /// The round.
        round: u32,
        /// What the source says to have sent, less what is here.
        missing: u64,
        /// How long nothing came.
        silence: Duration,
    },
}

impl Errno for Error {
    fn errno(&self) -> i32 {
        match self {
            Error::Stream { source, .. } => source.errno(),
            Error::Memory(source) => source.errno(),
            Error::Stalled { .. } => libc::ETIMEDOUT,
        }
    }
}

/// The connections. Dropping them ends them; nothing writes to guest RAM any more then.
#[derive(Debug)]
pub(super) struct Intake {
    shared: Arc<Shared>,
    lanes: Vec<(Wire, JoinHandle<()>)>,
}

#[derive(Debug)]
struct Shared {
    ram: GuestRam,
    state: Mutex<State>,
    /// Told when a frame is loaded, and when a connection breaks.
    changed: Condvar,
}

#[derive(Debug)]
struct State {
    /// The round whose pages may come.
    round: u32,
    loaded: Tally,
    /// Frames that are being loaded.
    loading: usize,
    /// Nothing may come any more.
    over: bool,
    error: Option<Error>,
}

impl Intake {
    /// None yet; `ram` is where the pages go.
    pub(super) fn new(ram: GuestRam) -> Self {
        Intake {
            shared: Arc::new(Shared {
                ram,
                state: Mutex::new(State {
                    round: 1,
                    loaded: Tally::default(),
                    loading: 0,
                    over: false,
                    error: None,
                }),
                changed: Condvar::new(),
            }),
            lanes: Vec::new(),
        }
    }

    /// Adds a connection of the source's.
    ///
    /// # Errors
    /// When there is no thread for it.
    pub(super) fn add(&mut self, wire: Wire, channel: Channel) -> io::Result<()> {
        let shared = Arc::clone(&self.shared);
        let lane = self.lanes.len() + 1;
        let thread = thread::Builder::new()
            .name(format!("multifdrecv_{lane}"))
            .spawn(move || shared.serve(channel, lane))?;
        self.lanes.push((wire, thread));
        Ok(())
    }

    /// Waits until `pages` pages of the round are loaded, and goes on to the next round, if there is
    /// one. Returns what was loaded.
    ///
    /// # Errors
    /// When a connection broke, or none brings anything for as long as `silence`.
    pub(super) fn end_round(
        &self,
        pages: u64,
        last: bool,
        silence: Duration,
    ) -> Result<Tally, Error> {
        let mut state = self.shared.lock();
        loop {
            if let Some(error) = state.error.take() {
                return Err(error);
            }
            if state.loaded.pages >= pages && state.loading == 0 {
                state.round = state.round.wrapping_add(1);
                state.over = last;
                return Ok(std::mem::take(&mut state.loaded));
            }
            let (before, round) = (state.loaded.pages, state.round);
            let (next, timeout) = self
                .shared
                .changed
                .wait_timeout(state, silence)
                .unwrap_or_else(PoisonError::into_inner);
            state = next;
            if timeout.timed_out() && state.loaded.pages == before && state.error.is_none() {
                let missing = pages.saturating_sub(before);
                return Err(Error::Stalled {
                    round,
                    missing,
                    silence,
                });
            }
        }
    }

    /// What broke first, if anything did.
    pub(super) fn take_error(&self) -> Option<Error> {
        self.shared.lock().error.take()
    }
}

impl Drop for Intake {
    fn drop(&mut self) {
        self.shared.lock().over = true;
        for (wire, _) in &self.lanes {
            wire.interrupt();
        }
        for (_, thread) in self.lanes.drain(..) {
            // A thread that panicked has already said why on stderr.
            let _ = thread.join();
        }
    }
}

impl Shared {
    /// Loads what comes until the connection ends.
    fn serve(&self, mut channel: Channel, lane: usize) {
        let Err(error) = self.load_all(&mut channel) else {
            return;
        };
        let mut state = self.lock();
        if state.over {
            return;
        }
        let error = match error {
            LoadAllError::Stream(source) => Error::Stream { lane, source },
            LoadAllError::Memory(source) => source.into(),
        };
        let reason = describe(&error);
        state.error.get_or_insert(error);
        drop(state);
        self.changed.notify_all();
        channel.give_up(reason, Vec::new());
    }

    fn load_all(&self, channel: &mut Channel) -> Result<(), LoadAllError> {
        let mut bytes = 0;
        loop {
            let kind = channel.advance()?;
            let frame = channel.current();
            if kind != Kind::Ram {
                return Err(frame.unexpected("a page").into());
            }
            let round = ram::round(frame.payload);
            {
                let mut state = self.lock();
                if state.over || round != Some(state.round) {
                    return Err(frame.malformed("it is of another round".to_owned()).into());
                }
                state.loading += 1;
            }
            let loaded = ram::load(&self.ram, frame.payload, None);
            let tally = {
                let mut state = self.lock();
                state.loading -= 1;
                let (_, tally) = loaded.map_err(|error| match error {
                    LoadError::Malformed(problem) => frame.malformed(problem.to_owned()).into(),
                    LoadError::Memory(source) => LoadAllError::Memory(source),
                    LoadError::Mapped(source) => frame.malformed(source.to_string()).into(),
                })?;
                state.loaded.add(tally);
                tally
            };
            self.changed.notify_all();
            bytes += tally.bytes;
            channel.send(&Ack { bytes })?;
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

enum LoadAllError {
    Stream(stream::Error),
    Memory(memory::Error),
}

impl From<stream::Error> for LoadAllError {
    fn from(error: stream::Error) -> Self {
        LoadAllError::Stream(error)
    }
}
