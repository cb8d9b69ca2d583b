//! One connection between a port of the guest and a unix socket of the host.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::num::Wrapping;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;

use super::packet::{Header, NO_RECEIVE, NO_SEND, Op, Ports};
use crate::memory::transfer::Pieces;

/// Bytes from the guest that wait for the host to read them.
pub(super) const BUFFER: u32 = 64 << 10;

/// How far a connection is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stage {
    /// The host asked for it; the guest has not answered.
    Asked,
    /// Both sides can send.
    Open,
    /// Nothing more comes from the host; the guest knows, or is about to.
    HostDone,
}

/// A connection.
#[derive(Debug)]
pub(super) struct Connection {
    stream: UnixStream,
    stage: Stage,
    /// What the guest has sent and the host not read yet.
    buffer: VecDeque<u8>,
    /// Bytes that came from the guest and left the buffer, ever.
    forwarded: Wrapping<u32>,
    /// What the guest was told of that last.
    told: Wrapping<u32>,
    /// Bytes sent to the guest, ever.
    sent: Wrapping<u32>,
    /// The guest's buffer, and how many bytes left it.
    peer_buf_alloc: u32,
    peer_forwarded: Wrapping<u32>,
    /// The host may have sent something.
    readable: bool,
    /// The guest will not send, will not receive.
    guest_done: bool,
    guest_deaf: bool,
}

/// What a connection has for the guest.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// Nothing now.
    Nothing,
    /// A packet of this kind, with flags.
    Control(Op, u32),
    /// As many bytes of data, which are in the buffer already.
    Data(usize),
}

impl Connection {
    /// One that the guest asked for, to a socket that took it.
    pub(super) fn opened(stream: UnixStream, request: &Header) -> Self {
        let mut this = Connection::new(stream, Stage::Open);
        this.hear(request);
        this
    }

    /// One that the host asked for.
    pub(super) fn asked(stream: UnixStream) -> Self {
        Connection::new(stream, Stage::Asked)
    }

    fn new(stream: UnixStream, stage: Stage) -> Self {
        Connection {
            stream,
            stage,
            buffer: VecDeque::new(),
            forwarded: Wrapping(0),
            told: Wrapping(0),
            sent: Wrapping(0),
            peer_buf_alloc: 0,
            peer_forwarded: Wrapping(0),
            readable: true,
            guest_done: false,
            guest_deaf: false,
        }
    }

    /// The socket.
    pub(super) fn fd(&self) -> RawFd {
        self.stream.as_raw_fd()
    }

    pub(super) fn stage(&self) -> Stage {
        self.stage
    }

    /// Notes what every packet of the guest says of its buffer.
    pub(super) fn hear(&mut self, header: &Header) {
        self.peer_buf_alloc = header.buf_alloc;
        self.peer_forwarded = Wrapping(header.fwd_cnt);
    }

    /// The guest has accepted: tells the host which port it talks from.
    ///
    /// # Errors
    /// When the host is gone.
    pub(super) fn accepted(&mut self, host_port: u32) -> io::Result<()> {
        self.stage = Stage::Open;
        self.stream
            .write_all(format!("OK {host_port}\n").as_bytes())
    }

    /// Takes data from the guest.
    ///
    /// # Errors
    /// When it is more than the guest may send, or the host is gone.
    pub(super) fn take(&mut self, data: &Pieces, len: usize) -> io::Result<()> {
        let room = (BUFFER as usize).saturating_sub(self.buffer.len());
        if len > room || len > data.len() || self.guest_done {
            return Err(io::ErrorKind::InvalidData.into());
        }
        let mut bytes = vec![0; len];
        data.copy_to(&mut bytes);
        self.buffer.extend(bytes);
        self.flush()
    }

    /// Gives the host what it reads.
    ///
    /// # Errors
    /// When the host is gone.
    pub(super) fn flush(&mut self) -> io::Result<()> {
        while !self.buffer.is_empty() {
            let (front, _) = self.buffer.as_slices();
            match self.stream.write(front) {
                Ok(written) => {
                    self.buffer.drain(..written);
                    self.forwarded += written as u32;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        if self.guest_done {
            self.stream.shutdown(Shutdown::Write)?;
        }
        Ok(())
    }

    /// The guest will not send or receive any more; whether the connection is over.
    ///
    /// # Errors
    /// When the host is gone.
    pub(super) fn shut(&mut self, flags: u32) -> io::Result<bool> {
        self.guest_done |= flags & NO_SEND != 0;
        self.guest_deaf |= flags & NO_RECEIVE != 0;
        self.flush()?;
        Ok(self.guest_done && (self.guest_deaf || self.stage == Stage::HostDone))
    }

    /// The host may have sent something, or read something.
    pub(super) fn wake(&mut self) {
        self.readable = true;
    }

    /// Whether [`Connection::next`] may have something.
    pub(super) fn has_next(&self) -> bool {
        self.told_too_little() || self.can_read()
    }

    /// What there is for the guest; data goes into `room`.
    ///
    /// # Errors
    /// When the host is gone.
    pub(super) fn next(&mut self, room: &mut [u8]) -> io::Result<Next> {
        if self.told_too_little() {
            return Ok(Next::Control(Op::CreditUpdate, 0));
        }
        if !self.can_read() {
            return Ok(Next::Nothing);
        }
        let credit = self.credit() as usize;
        let room = match room.get_mut(..credit) {
            Some(front) => front,
            None => room,
        };
        match self.stream.read(room) {
            Ok(0) => {
                self.readable = false;
                self.stage = Stage::HostDone;
                // A unix socket that is closed takes nothing more either, but one that is only
                // shut does; the guest learns of the difference when it writes.
                Ok(Next::Control(Op::Shutdown, NO_SEND))
            }
            Ok(read) => {
                self.sent += read as u32;
                Ok(Next::Data(read))
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                self.readable = false;
                Ok(Next::Nothing)
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(Next::Nothing),
            Err(error) => Err(error),
        }
    }

    /// A packet about this connection; every one says how much it can take.
    pub(super) fn header(&mut self, ports: Ports, op: Op, flags: u32, len: usize) -> Header {
        self.told = self.forwarded;
        Header {
            ports,
            len: u32::try_from(len).unwrap_or(u32::MAX),
            op: Some(op),
            flags,
            buf_alloc: BUFFER,
            fwd_cnt: self.forwarded.0,
        }
    }

    /// Whether the guest may believe the buffer to be fuller than it is, by much.
    fn told_too_little(&self) -> bool {
        self.stage != Stage::Asked && (self.forwarded - self.told).0 >= BUFFER / 2
    }

    fn can_read(&self) -> bool {
        self.readable && self.stage == Stage::Open && !self.guest_deaf && self.credit() > 0
    }

    /// Bytes that the guest has room for.
    fn credit(&self) -> u32 {
        let under_way = (self.sent - self.peer_forwarded).0;
        self.peer_buf_alloc.saturating_sub(under_way)
    }
}
