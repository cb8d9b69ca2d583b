//! The stream over a connected socket, both directions.

use std::io::{self, Read};
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::time::{Duration, Instant};

use socket2::Socket;

use super::stream::Error;
use super::stream::frame::{Frame, Kind};
use super::stream::message::{Failure, Message};
use super::stream::reader::FrameReader;
use super::stream::writer::FrameWriter;
use crate::spanlog::SpanRecord;

/// How long a side that gave up waits for the other one to hear of it.
const FAREWELL: Duration = Duration::from_secs(2);

/// A migration's connection.
pub(super) struct Channel {
    socket: Socket,
    reader: FrameReader<Socket>,
    writer: FrameWriter<Socket>,
}

impl Channel {
    /// The stream over `socket`, which is connected. The caller sends and checks the prefaces.
    ///
    /// # Errors
    /// When the socket can't be duplicated.
    pub(super) fn new(socket: Socket) -> io::Result<Self> {
        let reader = FrameReader::new(socket.try_clone()?);
        let writer = FrameWriter::new(socket.try_clone()?);
        Ok(Channel {
            socket,
            reader,
            writer,
        })
    }

    /// Starts this side's direction.
    pub(super) fn send_preface(&mut self) -> Result<(), Error> {
        self.writer.preface()
    }

    /// Checks how the other side's direction starts.
    pub(super) fn receive_preface(&mut self) -> Result<(), Error> {
        self.reader.preface()
    }

    /// Sends a message.
    pub(super) fn send<'a, M: Message<'a>>(&mut self, message: &M) -> Result<(), Error> {
        self.writer.send(message)
    }

    /// Sends a frame of pages; see [`FrameWriter::send_frame`].
    pub(super) fn send_ram(&mut self, frame: &mut [u8]) -> Result<(), Error> {
        self.writer.send_frame(Kind::Ram, frame)
    }

    /// Receives the next frame.
    pub(super) fn receive(&mut self) -> Result<Frame<'_>, Error> {
        self.reader.next()
    }

    /// Receives the next frame and returns its kind; [`Channel::current`] has the rest of it.
    pub(super) fn advance(&mut self) -> Result<Kind, Error> {
        self.reader.advance()
    }

    /// The frame that was received last.
    pub(super) fn current(&self) -> Frame<'_> {
        self.reader.current()
    }

    /// Bytes that the connection has taken so far.
    pub(super) fn sent_bytes(&self) -> u64 {
        self.writer.offset()
    }

    /// Bytes that were read so far.
    pub(super) fn received_bytes(&self) -> u64 {
        self.reader.offset()
    }

    /// Whether the other side has closed the connection, or it broke, with nothing left to read.
    /// Does not wait.
    pub(super) fn is_broken(&self) -> bool {
        let mut byte = [MaybeUninit::uninit()];
        let peeked = self
            .socket
            .recv_with_flags(&mut byte, libc::MSG_PEEK | libc::MSG_DONTWAIT);
        match peeked {
            Ok(read) => read == 0,
            Err(error) => error.kind() != io::ErrorKind::WouldBlock,
        }
    }

    /// Tells the other side that this one gives up, and lets go of the connection. What the other
    /// side has sent meanwhile is read and thrown away: a connection that is closed with unread
    /// bytes is reset, and the reset may overtake the reason.
    pub(super) fn give_up(mut self, reason: String, spans: Vec<SpanRecord>) {
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
}
