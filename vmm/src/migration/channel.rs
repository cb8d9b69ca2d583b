//! The stream over a connected socket, both directions.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use socket2::Socket;

use super::stream::Error;
use super::stream::frame::{Frame, Kind};
use super::stream::message::{Alive, Failure, Message};
use super::stream::reader::FrameReader;
use super::stream::writer::FrameWriter;
use crate::spanlog::SpanRecord;

/// How long a side that gave up waits for the other one to hear of it.
const FAREWELL: Duration = Duration::from_secs(2);

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
    socket: Socket,
    reader: FrameReader<Socket>,
    writer: Arc<Mutex<FrameWriter<Patient>>>,
    patience: Patience,
}

impl Channel {
    /// The stream over `socket`, which is connected. The caller sends and checks the prefaces.
    ///
    /// # Errors
    /// When the socket can't be duplicated.
    pub(super) fn new(socket: Socket, patience: Patience) -> io::Result<Self> {
        socket.set_read_timeout(Some(patience.silence))?;
        socket.set_write_timeout(Some(patience.silence))?;
        let reader = FrameReader::new(socket.try_clone()?);
        let writer = FrameWriter::new(Patient(socket.try_clone()?));
        Ok(Channel {
            pulse: None,
            socket,
            reader,
            writer: Arc::new(Mutex::new(writer)),
            patience,
        })
    }

    /// Tells the other side every now and then that this one is there, from now until the end.
    ///
    /// # Errors
    /// When the thread for it can't be started.
    pub(super) fn keep_alive(&mut self) -> io::Result<()> {
        let socket = self.socket.try_clone()?;
        let (writer, every) = (Arc::clone(&self.writer), self.patience.pulse);
        self.pulse = Some(Pulse::start(socket, writer, every)?);
        Ok(())
    }

    /// Starts this side's direction.
    pub(super) fn send_preface(&mut self) -> Result<(), Error> {
        self.writer().preface()
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

    /// Bytes that were read so far.
    pub(super) fn received_bytes(&self) -> u64 {
        self.reader.offset()
    }

    /// Whether the other side has closed the connection, or it broke, whatever is left to read.
    /// Does not wait.
    pub(super) fn is_broken(&self) -> bool {
        let gone = PollFlags::RDHUP | PollFlags::HUP | PollFlags::ERR;
        is(&self.socket, PollFlags::RDHUP, gone)
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
    /// side has sent meanwhile is read and thrown away: a connection that is closed with unread
    /// bytes is reset, and the reset may overtake the reason.
    pub(super) fn give_up(mut self, reason: String, spans: Vec<SpanRecord>) {
        self.pulse = None;
        // Nobody is left to tell when this fails.
        if self.send(&Failure { reason, spans }).is_err() {
            return;
        }
        let _ = self.socket.shutdown(Shutdown::Write);
        let until = Instant::now() + FAREWELL;
        let mut rest = [0; 16 << 10];
        loop {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() || self.socket.set_read_timeout(Some(left)).is_err() {
                return;
            }
            if !self.socket.read(&mut rest).is_ok_and(|read| read > 0) {
                return;
            }
        }
    }

    fn writer(&self) -> MutexGuard<'_, FrameWriter<Patient>> {
        self.writer.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A socket that is written to for as long as the other side lives.
struct Patient(Socket);

impl Write for Patient {
    /// What the other side does not read may wait, as long as more and more comes from there.
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut heard = 0;
        loop {
            match (&self.0).write(bytes) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    let unread = rustix::io::ioctl_fionread(&self.0)?;
                    if unread <= heard {
                        return Err(error);
                    }
                    heard = unread;
                }
                written => return written,
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The thread that says that this side is there. Dropping it ends it.
struct Pulse {
    stop: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Pulse {
    fn start(
        socket: Socket,
        writer: Arc<Mutex<FrameWriter<Patient>>>,
        every: Duration,
    ) -> io::Result<Self> {
        let (stop, stopped) = mpsc::channel();
        let beat = move || {
            while stopped.recv_timeout(every) == Err(RecvTimeoutError::Timeout) {
                // If the writer is taken, or there is no room, something is on its way anyway.
                if let Ok(mut writer) = writer.try_lock()
                    && is(&socket, PollFlags::OUT, PollFlags::OUT)
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

/// Whether one of `wanted` holds of the socket now, when it is asked for `asked`.
fn is(socket: &Socket, asked: PollFlags, wanted: PollFlags) -> bool {
    let mut fds = [PollFd::new(socket, asked)];
    let now = Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    poll(&mut fds, Some(&now)).is_ok() && fds.iter().any(|fd| fd.revents().intersects(wanted))
}

#[cfg(test)]
mod tests {
    use socket2::{Domain, Type};

    use super::*;

    /// Writes more than a socket takes, while the other side says `alive` so often, ms, and reads
    /// nothing for a while.
    fn write_to_busy(alive: u64) -> io::Result<usize> {
        let (here, there) = Socket::pair(Domain::UNIX, Type::STREAM, None).unwrap();
        here.set_write_timeout(Some(Duration::from_millis(100)))
            .unwrap();
        let busy = thread::spawn(move || {
            let until = Instant::now() + Duration::from_millis(600);
            while Instant::now() < until {
                thread::sleep(Duration::from_millis(alive));
                (&there).write_all(&[0]).unwrap_or_default();
            }
            io::copy(&mut &there, &mut io::sink())
        });
        let bytes = vec![0; 4 << 20];
        let mut writer = Patient(here);
        let mut written = 0;
        let result = loop {
            match bytes.get(written..) {
                None | Some([]) => break Ok(written),
                Some(rest) => match writer.write(rest) {
                    Ok(more) => written += more,
                    Err(error) => break Err(error),
                },
            }
        };
        drop(writer);
        // Its copy ends with an error when this side leaves something unread.
        let _ = busy.join().unwrap();
        result
    }

    #[test]
    fn who_does_not_read_but_speaks_is_waited_for() {
        assert_eq!(write_to_busy(20).unwrap(), 4 << 20);
        let error = write_to_busy(400).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
    }
}
