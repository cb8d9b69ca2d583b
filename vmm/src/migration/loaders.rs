//! The destination's threads that load the first round of a single connection: most of what that takes
//! is the kernel's, which makes memory for every page, while the connection brings the next ones.
//!
//! Later rounds find their memory made, and the last one, for which the guest waits, is not to wait for
//! other threads to wake up.

use std::collections::VecDeque;
use std::io;
use std::sync::mpsc::{self, Receiver, Sender, TryRecvError};
use std::thread::{self, JoinHandle};

use super::stream::ram::{self, LoadError, Tally};
use crate::memory::GuestRam;

/// More threads than this wait for what one connection brings.
const THREADS: usize = 2;
/// Frames that are read and not loaded yet: more than the threads need to be busy, and far fewer than
/// the source may send without an answer.
const AHEAD: usize = 4 * THREADS;

/// The threads, in the order in which they get frames. Dropping them ends them; nothing writes to guest
/// RAM any more then.
#[derive(Debug)]
pub(super) struct Loaders {
    threads: VecDeque<Loader>,
    /// Frames that were handed out and not taken back.
    busy: usize,
    /// Buffers of frames that are loaded.
    spare: Vec<Vec<u8>>,
}

#[derive(Debug)]
struct Loader {
    payloads: Option<Sender<(u64, Vec<u8>)>>,
    loaded: Receiver<(LoadedFrame, Vec<u8>)>,
    thread: Option<JoinHandle<()>>,
}

/// What came of a frame.
#[derive(Debug)]
pub(super) struct LoadedFrame {
    /// Where it starts in the stream.
    pub(super) offset: u64,
    /// Its round and what it held.
    pub(super) result: Result<(u32, Tally), LoadError>,
}

impl Loaders {
    /// Starts them; `ram` is where the pages go.
    ///
    /// # Errors
    /// When there are no threads.
    pub(super) fn start(ram: &GuestRam) -> io::Result<Self> {
        let threads = (1..=THREADS).map(|number| Loader::start(number, ram.clone()));
        Ok(Loaders {
            threads: threads.collect::<io::Result<_>>()?,
            busy: 0,
            spare: Vec::new(),
        })
    }

    /// A buffer for the next frame.
    pub(super) fn buffer(&mut self) -> Vec<u8> {
        self.spare.pop().unwrap_or_default()
    }

    /// Has the pages of `payload`, which starts at `offset` of the stream, loaded. Returns what came of
    /// the frame that was handed out first of those that were not taken back, if it is loaded or no more
    /// may be under way.
    ///
    /// # Errors
    /// When a thread has panicked.
    pub(super) fn load(
        &mut self,
        offset: u64,
        payload: Vec<u8>,
    ) -> io::Result<Option<LoadedFrame>> {
        let next = self.busy % THREADS;
        let thread = self.threads.get(next).ok_or_else(panicked)?;
        let payloads = thread.payloads.as_ref().ok_or_else(panicked)?;
        payloads.send((offset, payload)).map_err(|_| panicked())?;
        self.busy += 1;
        match self.busy < AHEAD {
            true => self.take(|loader| match loader.loaded.try_recv() {
                Err(TryRecvError::Empty) => Ok(None),
                loaded => loaded.map(Some).map_err(|_| panicked()),
            }),
            false => self.wait(),
        }
    }

    /// Waits for the frame that was handed out first of those that were not taken back, and returns what
    /// came of it; `None` when all were.
    ///
    /// # Errors
    /// When its thread has panicked.
    pub(super) fn wait(&mut self) -> io::Result<Option<LoadedFrame>> {
        if self.busy == 0 {
            return Ok(None);
        }
        self.take(|loader| loader.loaded.recv().map(Some).map_err(|_| panicked()))
    }

    fn take(
        &mut self,
        receive: impl FnOnce(&Loader) -> io::Result<Option<(LoadedFrame, Vec<u8>)>>,
    ) -> io::Result<Option<LoadedFrame>> {
        let first = self.threads.front().ok_or_else(panicked)?;
        let Some((loaded, payload)) = receive(first)? else {
            return Ok(None);
        };
        self.threads.rotate_left(1);
        self.busy -= 1;
        self.spare.push(payload);
        Ok(Some(loaded))
    }
}

impl Drop for Loaders {
    fn drop(&mut self) {
        for loader in &mut self.threads {
            loader.payloads = None;
        }
        for loader in &mut self.threads {
            // A thread that panicked has already said why on stderr.
            let _ = loader.thread.take().map(JoinHandle::join);
        }
    }
}

impl Loader {
    fn start(number: usize, ram: GuestRam) -> io::Result<Self> {
        let (payloads, frames) = mpsc::channel::<(u64, Vec<u8>)>();
        let (done, loaded) = mpsc::channel();
        let serve = move || {
            for (offset, payload) in frames {
                let result = ram::load(&ram, &payload, None);
                // Nobody is interested any more when this fails.
                let _ = done.send((LoadedFrame { offset, result }, payload));
            }
        };
        let thread = thread::Builder::new()
            .name(format!("ram_load_{number}"))
            .spawn(serve)?;
        Ok(Loader {
            payloads: Some(payloads),
            loaded,
            thread: Some(thread),
        })
    }
}

fn panicked() -> io::Error {
    io::Error::other("a thread that loads pages has panicked")
}

#[cfg(test)]
mod tests {
    use super::super::stream::frame::HEADER_LEN;
    use super::super::stream::ram::Packer;
    use super::*;
    use crate::memory::{PAGE_SIZE, PageRun};

    #[test]
    fn frames_come_back_in_their_order_and_few_are_under_way() {
        const FRAMES: u64 = 100;
        const BAD: u64 = 70;
        let [source, target] = [(); 2].map(|()| GuestRam::new(&[(0, FRAMES * PAGE_SIZE)]).unwrap());
        let mut loaders = Loaders::start(&target).unwrap();
        let mut seen = Vec::new();
        for frame in 0..FRAMES {
            source
                .write(frame * PAGE_SIZE, &[frame as u8 + 1; 99])
                .unwrap();
            let mut packer = Packer::new(1);
            packer.add(&source, frame * PAGE_SIZE).unwrap();
            let mut payload = loaders.buffer();
            payload.clear();
            payload.extend(&packer.frame()[HEADER_LEN..]);
            if frame == BAD {
                payload.pop();
            }
            seen.extend(loaders.load(frame, payload).unwrap());
            assert!(loaders.busy < AHEAD);
        }
        while let Some(loaded) = loaders.wait().unwrap() {
            seen.push(loaded);
        }
        assert!(loaders.spare.len() <= AHEAD);
        let order: Vec<_> = seen.iter().map(|loaded| loaded.offset).collect();
        assert_eq!(order, (0..FRAMES).collect::<Vec<_>>());
        for loaded in seen {
            match loaded.result {
                Ok((1, tally)) => assert_eq!(tally.pages, 1),
                result => assert!(loaded.offset == BAD && result.is_err()),
            }
        }
        drop(loaders);
        source
            .zero(PageRun {
                gpa: BAD * PAGE_SIZE,
                pages: 1,
            })
            .unwrap();
        assert_eq!(source.checksum().unwrap(), target.checksum().unwrap());
    }
}
