//! The stream over what carries it: both directions, or the one that there is.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use super::oneway::{FinishError, OneWay};
use super::stream::Error;
use super::stream::frame::{Frame, Kind};
use super::stream::mapped::Place;
use super::stream::message::{Alive, Failure, Message};
use super::stream::reader::FrameReader;
use super::stream::writer::FrameWriter;
use super::wire::{FAREWELL, Wire};
use crate::memory::GuestRam;
use crate::spanlog::SpanRecord;

/// How long to wait for the other side, and how to make it wait.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    /// How long the other side may be silent when something is expected of it, or leave unread what
    /// it was sent. A side that is dead, or cut off, is given up then.
    pub silence: Duration,
    /// How often this side says that it is there; several times in `silence`.
    pub pulse: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Patience {
            silence: Duration::from_secs(30),
            pulse: Duration::from_secs(5),
        }
    }
}

/// A migration's connection.
pub(super) struct Channel {
    /// Before the writer: it must not be in the middle of a frame when the connection goes.
    pulse: Option<Pulse>,
    wire: Wire,
    reader: FrameReader<Wire>,
    writer: Arc<Mutex<FrameWriter<Wire>>>,
    patience: Patience,
}

impl Channel {
    /// The stream over `wire`. The caller sends and checks the prefaces.
    ///
    /// # Errors
    /// When the wire takes no timeouts.
    pub(super) fn new(wire: Wire, patience: Patience) -> io::Result<Self> {
        wire.set_patience(patience.silence)?;
        let reader = FrameReader::new(wire.clone());
        let writer = FrameWriter::new(wire.clone());
        Ok(Channel {
            pulse: None,
            wire,
            reader,
            writer: Arc::new(Mutex::new(writer)),
            patience,
        })
    }

    /// Whether the other side can answer.
    pub(super) fn has_way_back(&self) -> bool {
        self.wire.one_way().is_none()
    }

    /// Tells the other side every now and then that this one is there, from now until the end.
    ///
    /// # Errors
    /// When the thread for it can't be started.
    pub(super) fn keep_alive(&mut self) -> io::Result<()> {
        let (writer, every) = (Arc::clone(&self.writer), self.patience.pulse);
        self.pulse = Some(Pulse::start(self.wire.clone(), writer, every)?);
        Ok(())
    }

    /// Says no more that this one is there.
    pub(super) fn fall_silent(&mut self) {
        self.pulse = None;
    }

    /// Sees to it that what was sent is on the disk, if the stream goes to a file.
    pub(super) fn sync(&self) -> Result<(), Error> {
        let offset = self.writer().offset();
        let synced = self.wire.one_way().map_or(Ok(()), OneWay::sync);
        synced.map_err(|source| Error::Write { offset, source })
    }

    /// All was sent, and there is no way back: makes sure that it was taken, as far as one can know.
    pub(super) fn finish(&self) -> Result<(), FinishError> {
        self.wire.one_way().map_or(Ok(()), OneWay::finish)
    }

    /// Sets a part of the file aside, from `at` bytes behind the start of the stream on, for `ram`.
    ///
    /// # Errors
    /// When there is no file, or no place like that in it.
    pub(super) fn set_aside(&mut self, at: u64, ram: &GuestRam) -> io::Result<Place> {
        let way = self.wire.one_way().ok_or(io::ErrorKind::NotSeekable)?;
        let (file, at) = way.set_aside(at, ram.size())?;
        self.reader.skip_what_was_read_ahead();
        Ok(Place::new(file, at, ram))
    }

    /// Takes back what was sent. Says whether that was possible.
    pub(super) fn retract(&self) -> io::Result<bool> {
        self.wire.one_way().map_or(Ok(false), OneWay::retract)
    }

    /// Starts this side's direction.
    pub(super) fn send_preface(&mut self) -> Result<(), Error> {
        self.writer().preface()
    }

    /// Starts it with a descriptor for the other side.
    pub(super) fn send_preface_with(&mut self, fd: &OwnedFd) -> Result<(), Error> {
        self.writer()
            .preface_by(|bytes| self.wire.write_with(bytes, fd))
    }

    /// Takes the descriptor with which the other side starts its direction, if there is one. Comes
    /// before [`Channel::receive_preface`], which says what is wrong with a connection that fails.
    pub(super) fn receive_passed(&mut self) -> Option<OwnedFd> {
        self.wire.peek_passed().ok().flatten()
    }

    /// Checks how the other side's direction starts.
    pub(super) fn receive_preface(&mut self) -> Result<(), Error> {
        self.reader.preface()
    }

    /// Sends a message.
    ///
    /// # Errors
    /// If the other side has given up, its reason.
    pub(super) fn send<'a, M: Message<'a>>(&mut self, message: &M) -> Result<(), Error> {
        let sent = self.writer().send(message);
        sent.map_err(|error| self.explain(error))
    }

    /// As [`Channel::send`]; also says whether the connection took anything of the message.
    pub(super) fn try_send<'a, M: Message<'a>>(
        &mut self,
        message: &M,
    ) -> (Result<(), Error>, bool) {
        let mut writer = self.writer();
        let before = writer.offset();
        let sent = writer.send(message);
        let taken = writer.offset() != before;
        drop(writer);
        (sent.map_err(|error| self.explain(error)), taken)
    }

    /// Sends a frame of pages; see [`FrameWriter::send_frame`].
    pub(super) fn send_ram(&mut self, frame: &mut [u8]) -> Result<(), Error> {
        let sent = self.writer().send_frame(Kind::Ram, frame);
        sent.map_err(|error| self.explain(error))
    }

    /// Receives the next frame.
    pub(super) fn receive(&mut self) -> Result<Frame<'_>, Error> {
        self.advance()?;
        Ok(self.current())
    }

    /// Receives the next frame and returns its kind; [`Channel::current`] has the rest of it.
    pub(super) fn advance(&mut self) -> Result<Kind, Error> {
        loop {
            match self.reader.advance()? {
                Kind::Alive => {}
                kind => return Ok(kind),
            }
        }
    }

    /// The frame that was received last.
    pub(super) fn current(&self) -> Frame<'_> {
        self.reader.current()
    }

    /// Takes the offset and the payload of the frame that was received last, and leaves `buffer` for the
    /// next one.
    pub(super) fn take(&mut self, buffer: Vec<u8>) -> (u64, Vec<u8>) {
        self.reader.take(buffer)
    }

    /// Bytes that were read so far.
    pub(super) fn received_bytes(&self) -> u64 {
        self.reader.offset()
    }

    /// Whether the other side has closed the connection, or it broke, whatever is left to read.
    /// Does not wait.
    pub(super) fn is_broken(&self) -> bool {
        self.wire.is_broken()
    }

    /// Receives the other side's last message, if it comes at all: nothing depends on it, so it is not
    /// waited for as others are.
    pub(super) fn receive_farewell(&mut self) -> Result<Frame<'_>, Error> {
        let offset = self.received_bytes();
        let patience = self.wire.set_patience(FAREWELL);
        patience.map_err(|source| Error::Read { offset, source })?;
        self.receive()
    }

    /// Why nothing can be sent any more: what the other side said before it closed the connection,
    /// or else `error`.
    pub(super) fn explain(&mut self, error: Error) -> Error {
        if !self.is_broken() {
            return error;
        }
        // The end of the stream ends this.
        while let Ok(kind) = self.reader.advance() {
            if kind == Kind::Failure {
                return self.reader.current().unexpected("nothing");
            }
        }
        error
    }

    /// Tells the other side that this one gives up, and lets go of the connection. What the other
    /// side has sent meanwhile is read and thrown away.
    pub(super) fn give_up(mut self, reason: String, spans: Vec<SpanRecord>) {
        self.pulse = None;
        // Nobody is left to tell when this fails. Who does not read what was sent before is not waited
        // for any more.
        let told = self.wire.set_patience(FAREWELL);
        if told.is_err() || self.send(&Failure { reason, spans }).is_err() {
            return;
        }
        self.wire.linger(FAREWELL);
    }

    fn writer(&self) -> MutexGuard<'_, FrameWriter<Wire>> {
        self.writer.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The thread that says that this side is there. Dropping it ends it.
struct Pulse {
    stop: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Pulse {
    fn start(
        wire: Wire,
        writer: Arc<Mutex<FrameWriter<Wire>>>,
        every: Duration,
    ) -> io::Result<Self> {
        let (stop, stopped) = mpsc::channel();
        let beat = move || {
            while stopped.recv_timeout(every) == Err(RecvTimeoutError::Timeout) {
                // If the writer is taken, or there is no room, something is on its way anyway.
                if let Ok(mut writer) = writer.try_lock()
                    && wire.has_room()
                {
                    // Whoever writes next meets the same error, and can do something about it.
                    let _ = writer.send(&Alive {});
                }
            }
        };
        let thread = thread::Builder::new()
            .name("pulse".to_owned())
            .spawn(beat)?;
        Ok(Pulse {
            stop: Some(stop),
            thread: Some(thread),
        })
    }
}

impl Drop for Pulse {
    fn drop(&mut self) {
        drop(self.stop.take());
        // A thread that panicked has already said why on stderr.
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use socket2::{Domain, Socket, Type};

    use super::super::stream::message::Ping;
    use super::*;

    #[test]
    fn who_gives_up_does_not_wait_for_a_side_that_does_not_read() {
        let (here, _there) = Socket::pair(Domain::UNIX, Type::STREAM, None).unwrap();
        let wire = Wire::from(here);
        let patience = Patience {
            silence: Duration::from_secs(120),
            ..Patience::default()
        };
        let mut channel = Channel::new(wire.clone(), patience).unwrap();
        while wire.has_room() {
            channel.send(&Ping { t1: 0 }).unwrap();
        }
        wire.set_patience(Duration::from_millis(1)).unwrap();
        while channel.send(&Ping { t1: 0 }).is_ok() {}
        wire.set_patience(patience.silence).unwrap();
        let began = Instant::now();
        channel.give_up("nobody listens".to_owned(), Vec::new());
        assert!(began.elapsed() < Duration::from_secs(60));
    }
}
