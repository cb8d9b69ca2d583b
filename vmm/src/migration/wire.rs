//! What a stream goes over: a connection that goes both ways, or something that goes one way.

use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, send, sendmsg,
};
use socket2::{Domain, Socket};

use super::oneway::OneWay;
use super::tls::{self, Security, Tls};

/// How long a side that gave up waits for the other one to hear of it.
pub(super) const FAREWELL: Duration = Duration::from_secs(2);
/// What a socket says whose other side has nothing more to say.
const GONE: PollFlags = PollFlags::RDHUP.union(PollFlags::HUP).union(PollFlags::ERR);

/// The bytes' way. Clones are the same way: one thread may read while another one writes.
#[derive(Clone, Debug)]
pub(super) enum Wire {
    /// A connected socket, or one that listens and is here to be interrupted.
    Socket(Arc<Socket>),
    /// A connected socket, with encryption.
    Tls(Arc<Tls>),
    /// A pipe, a file, or one end of a command.
    OneWay(Arc<OneWay>),
}

impl From<Socket> for Wire {
    fn from(socket: Socket) -> Self {
        Wire::Socket(Arc::new(socket))
    }
}

impl From<OneWay> for Wire {
    fn from(way: OneWay) -> Self {
        Wire::OneWay(Arc::new(way))
    }
}

impl Wire {
    /// The pipe or file, if there is no way back.
    pub(super) fn one_way(&self) -> Option<&OneWay> {
        match self {
            Wire::OneWay(way) => Some(way),
            Wire::Socket(_) | Wire::Tls(_) => None,
        }
    }

    /// The socket at the bottom, if there is one.
    fn socket(&self) -> Option<&Socket> {
        match self {
            Wire::Socket(socket) => Some(socket),
            Wire::Tls(tls) => Some(tls.socket()),
            Wire::OneWay(_) => None,
        }
    }

    /// Encrypts what goes over a socket from now on, once both sides have proved who they are. `uri`
    /// is for errors. The other side has `patience` for each of its steps.
    ///
    /// # Errors
    /// When either side does not trust the other one, which has been told.
    pub(super) fn encrypt(
        self,
        security: &Security,
        uri: &str,
        patience: Duration,
    ) -> Result<Wire, tls::Error> {
        let Wire::Socket(socket) = &self else {
            let uri = uri.to_owned();
            return Err(tls::Error::NoSocket { uri });
        };
        let failed = |source| tls::Error::Handshake {
            uri: uri.to_owned(),
            source,
        };
        self.set_patience(patience).map_err(failed)?;
        match security.open(Arc::clone(socket), uri) {
            Ok(tls) => Ok(Wire::Tls(Arc::new(tls))),
            Err(error) => {
                // The other side is to read why, and not that the connection was reset.
                self.linger(FAREWELL);
                Err(error)
            }
        }
    }

    /// Whether descriptors can be passed.
    pub(super) fn passes(&self) -> bool {
        match self {
            Wire::Socket(socket) => socket.domain().is_ok_and(|domain| domain == Domain::UNIX),
            Wire::Tls(_) | Wire::OneWay(_) => false,
        }
    }

    /// Writes `bytes` with a descriptor, if it [passes](Wire::passes) any.
    pub(super) fn write_with(&self, bytes: &[u8], fd: &OwnedFd) -> io::Result<usize> {
        let Wire::Socket(socket) = self else {
            return Err(io::ErrorKind::Unsupported.into());
        };
        let fds = [fd.as_fd()];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut passed = SendAncillaryBuffer::new(&mut space);
        passed.push(SendAncillaryMessage::ScmRights(&fds));
        let parts = [IoSlice::new(bytes)];
        Ok(sendmsg(&**socket, &parts, &mut passed, SendFlags::empty())?)
    }

    /// Takes the descriptor that comes with the next byte, if it [passes](Wire::passes) any and there
    /// is one. Waits for that byte, and leaves it to be read.
    pub(super) fn peek_passed(&self) -> io::Result<Option<OwnedFd>> {
        let Wire::Socket(socket) = self else {
            return Ok(None);
        };
        if !self.passes() {
            return Ok(None);
        }
        let mut byte = [0];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut passed = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::PEEK | RecvFlags::CMSG_CLOEXEC;
        let mut parts = [IoSliceMut::new(&mut byte)];
        recvmsg(&**socket, &mut parts, &mut passed, flags)?;
        let first = |message| match message {
            RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
            _ => None,
        };
        Ok(passed.drain().find_map(first))
    }

    /// Sets how long a read waits, and a write of which the other side takes nothing. Who reads from
    /// something that goes one way waits for as long as it is open: nobody waits for an answer.
    pub(super) fn set_patience(&self, silence: Duration) -> io::Result<()> {
        if let Wire::OneWay(way) = self {
            way.set_patience(silence);
        }
        let Some(socket) = self.socket() else {
            return Ok(());
        };
        socket.set_read_timeout(Some(silence))?;
        socket.set_write_timeout(Some(silence))
    }

    /// Lets a read wait for as long as it takes: something else watches whether the other side is there.
    pub(super) fn read_forever(&self) -> io::Result<()> {
        let socket = self.socket();
        socket.map_or(Ok(()), |socket| socket.set_read_timeout(None))
    }

    /// Whether the other side has closed the connection, or it broke, whatever is left to read.
    /// Does not wait.
    pub(super) fn is_broken(&self) -> bool {
        // Without a socket the next write finds out; nobody is there who could have said why.
        let socket = self.socket();
        socket.is_some_and(|socket| {
            ready(socket, PollFlags::RDHUP, Duration::ZERO)
                .is_ok_and(|ready| ready.intersects(GONE))
        })
    }

    /// Whether a short message can be written without waiting, and may be at any time: a file is to
    /// hold the guest and nothing else.
    pub(super) fn has_room(&self) -> bool {
        match (self.socket(), self.one_way()) {
            (Some(socket), _) => ready(socket, PollFlags::OUT, Duration::ZERO)
                .is_ok_and(|ready| ready.intersects(PollFlags::OUT)),
            (None, way) => way.is_some_and(OneWay::has_room),
        }
    }

    /// Wakes whoever reads or writes, with an error, for good.
    pub(super) fn interrupt(&self) {
        if let Some(way) = self.one_way() {
            way.interrupt();
        }
        if let Some(socket) = self.socket() {
            // It fails on a connection that has broken already, which wakes the thread as well.
            let _ = socket.shutdown(Shutdown::Both);
        }
    }

    /// Ends this side's direction and reads what the other side still has to say, for no longer than
    /// `limit`: a connection that is closed with unread bytes is reset, and the reset may overtake
    /// what was sent last.
    pub(super) fn linger(&self, limit: Duration) {
        let Some(mut socket) = self.socket() else {
            return;
        };
        let _ = socket.shutdown(Shutdown::Write);
        let until = Instant::now() + limit;
        let mut rest = [0; 16 << 10];
        loop {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() || socket.set_read_timeout(Some(left)).is_err() {
                return;
            }
            if !socket.read(&mut rest).is_ok_and(|read| read > 0) {
                return;
            }
        }
    }
}

impl Read for Wire {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        match self {
            Wire::Socket(socket) => (&**socket).read(bytes),
            Wire::Tls(tls) => tls.read(bytes),
            Wire::OneWay(way) => way.read(bytes),
        }
    }
}

impl Write for Wire {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Wire::Socket(socket) => write_patiently(socket, bytes),
            Wire::Tls(tls) => tls.write(bytes),
            Wire::OneWay(way) => way.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// How often a side that does not read is listened to while it may be silent: what it says in between
/// counts from the next look on.
const LOOKS: u32 = 8;

/// Writes what there is room for, and waits for room as long as the socket's timeout says, or for longer
/// while more and more comes from the other side: it may be busy.
///
/// # Errors
/// `WouldBlock` when it neither reads nor speaks, and `BrokenPipe` as soon as it has nothing more to say:
/// a side that has given up goes on reading only to be polite.
pub(super) fn write_patiently(socket: &Socket, bytes: &[u8]) -> io::Result<usize> {
    let silence = socket.write_timeout()?.unwrap_or(Duration::MAX);
    let (mut heard, mut heard_at) = (rustix::io::ioctl_fionread(socket)?, Instant::now());
    loop {
        match send(socket, bytes, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
            Err(Errno::AGAIN) => {}
            sent => return Ok(sent?),
        }
        let ready = ready(socket, PollFlags::OUT | PollFlags::RDHUP, silence / LOOKS)?;
        let unread = rustix::io::ioctl_fionread(socket)?;
        if unread > heard {
            heard_at = Instant::now();
        }
        heard = unread;
        if ready.is_empty() && heard_at.elapsed() >= silence {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        if ready.intersects(GONE) && !ready.intersects(PollFlags::OUT) {
            return Err(Errno::PIPE.into());
        }
    }
}

/// What holds of the socket of what it is asked for, and of what it says unasked; waits no longer than
/// `limit` until any of it does.
fn ready(socket: &Socket, asked: PollFlags, limit: Duration) -> io::Result<PollFlags> {
    let mut fds = [PollFd::new(socket, asked)];
    // A limit that is too long for the type is none.
    let limit = Timespec::try_from(limit).ok();
    loop {
        match poll(&mut fds, limit.as_ref()) {
            Err(Errno::INTR) => {}
            polled => return polled.map(|_| fds[0].revents()).map_err(io::Error::from),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use socket2::Type;

    use super::*;

    /// Writes more than a socket takes, while the other side says `alive` so often, ms, and reads
    /// nothing for a while.
    fn write_to_busy(alive: u64) -> io::Result<usize> {
        let (here, there) = Socket::pair(Domain::UNIX, Type::STREAM, None).unwrap();
        let mut writer = Wire::from(here);
        writer.set_patience(Duration::from_millis(100)).unwrap();
        let busy = thread::spawn(move || {
            let until = Instant::now() + Duration::from_millis(600);
            while Instant::now() < until {
                thread::sleep(Duration::from_millis(alive));
                (&there).write_all(&[0]).unwrap_or_default();
            }
            io::copy(&mut &there, &mut io::sink())
        });
        let bytes = vec![0; 4 << 20];
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

    #[test]
    fn who_has_nothing_more_to_say_is_not_waited_for() {
        let (here, there) = Socket::pair(Domain::UNIX, Type::STREAM, None).unwrap();
        let mut writer = Wire::from(here);
        writer.set_patience(Duration::from_secs(120)).unwrap();
        let began = Instant::now();
        let leaving = thread::spawn(move || {
            thread::sleep(Duration::from_millis(50));
            (&there).write_all(b"failure").unwrap();
            there.shutdown(Shutdown::Write).unwrap();
            there
        });
        let error = writer.write_all(&vec![0; 4 << 20]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::BrokenPipe);
        assert!(began.elapsed() < Duration::from_secs(60));
        drop(leaving.join().unwrap());
    }
}
