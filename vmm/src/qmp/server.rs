//! The listener, and two threads for each client: one reads and answers, one writes.

use std::io::{self, IoSliceMut, Write};
use std::mem::MaybeUninit;
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver};
use std::thread::{self, JoinHandle};

use nix::sys::socket::{Shutdown, shutdown};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};

use super::address::Address;
use super::commands::Backend;
use super::hub::{BACKLOG, Client, ClientId, Hub, Line};
use super::json::Framer;
use super::session::Session;
use super::wire;
use crate::socket::{self, SocketFile};

/// Clients that may be connected at once; a further one is turned away.
pub(super) const MAX_CLIENTS: usize = 32;

/// Descriptors that are taken from one message, of which only the last can be named; the kernel closes
/// any more.
const MAX_PASSED: usize = 16;

/// The server can't start.
#[derive(Debug, thiserror::Error)]
#[error("QMP")]
pub enum ServerError {
    /// Its socket can't be had.
    Listen(#[from] socket::Error),
    /// Its thread can't be started.
    Thread(#[source] io::Error),
}

/// A listening server. When it is dropped it takes no more clients, lets those that are there have
/// their last lines, cuts their connections and removes the socket.
pub struct Server {
    listener: UnixListener,
    acceptor: Option<JoinHandle<()>>,
    hub: Hub,
    /// Its drop, the last one here, removes the socket.
    _file: SocketFile,
}

impl Server {
    /// Listens on `address` for clients of `backend`; what they are told goes through `hub`. A
    /// socket that a dead process left behind is replaced.
    ///
    /// # Errors
    /// Why the socket or a thread can't be had.
    pub fn start(
        address: &Address,
        backend: Arc<dyn Backend>,
        hub: Hub,
    ) -> Result<Self, ServerError> {
        let (listener, file) = socket::listen(&address.path)?;
        let accepting = listener.try_clone().map_err(ServerError::Thread)?;
        let clients = hub.clone();
        let acceptor = thread::Builder::new()
            .name("qmp-accept".to_owned())
            .spawn(move || accept(&accepting, &backend, &clients))
            .map_err(ServerError::Thread)?;
        Ok(Server {
            listener,
            acceptor: Some(acceptor),
            hub,
            _file: file,
        })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // This makes `accept` return an error; it can't fail on a listening socket.
        let _ = shutdown(self.listener.as_raw_fd(), Shutdown::Both);
        if let Some(acceptor) = self.acceptor.take() {
            // Its panic, if any, is on stderr already.
            let _ = acceptor.join();
        }
        self.hub.close();
    }
}

fn accept(listener: &UnixListener, backend: &Arc<dyn Backend>, hub: &Hub) {
    let places = Arc::new(());
    for id in 0.. {
        let stream = match listener.accept() {
            Ok((stream, _)) => stream,
            Err(error) if is_passing(&error) => {
                thread::sleep(std::time::Duration::from_millis(10));
                continue;
            }
            Err(_) => return,
        };
        let place = Arc::clone(&places);
        if Arc::strong_count(&places) > MAX_CLIENTS + 1 {
            tracing::warn!("{MAX_CLIENTS} QMP clients are connected: one more is turned away");
            continue;
        }
        let (backend, hub) = (Arc::clone(backend), hub.clone());
        let reader = move || {
            let _place = place;
            if let Err(error) = serve(id, stream, backend.as_ref(), &hub) {
                tracing::debug!(client = id, %error, "QMP client lost");
            }
            hub.leave(id);
        };
        if let Err(error) = spawn("qmp-client", reader) {
            tracing::warn!(%error, "no thread for a QMP client: it is turned away");
        }
    }
}

/// Whether `accept` can succeed later: the peer was gone again, or resources ran out.
fn is_passing(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(
            libc::EINTR
                | libc::ECONNABORTED
                | libc::EMFILE
                | libc::ENFILE
                | libc::ENOMEM
                | libc::ENOBUFS
        )
    )
}

fn spawn(name: &str, body: impl FnOnce() + Send + 'static) -> io::Result<()> {
    thread::Builder::new().name(name.to_owned()).spawn(body)?;
    Ok(())
}

/// Greets a client and answers it until it leaves, is dropped or the process ends.
fn serve(id: ClientId, stream: UnixStream, backend: &dyn Backend, hub: &Hub) -> io::Result<()> {
    let (lines, queue) = mpsc::sync_channel(BACKLOG);
    let (alive, writer) = mpsc::channel();
    let mut writing = stream.try_clone()?;
    spawn("qmp-writer", move || {
        let _alive = alive;
        write(&mut writing, &queue);
    })?;
    let client = Client {
        stream: stream.try_clone()?,
        lines,
        writer,
    };
    hub.join(id, client);
    if !hub.answer(id, wire::greeting(), false) {
        return Ok(());
    }
    let (mut framer, mut session) = (Framer::default(), Session::default());
    let mut bytes = [0; 4096];
    loop {
        let count = receive(&stream, &mut bytes, &mut session)?;
        if count == 0 {
            return Ok(());
        }
        for message in framer.feed(bytes.get(..count).unwrap_or_default()) {
            let reply = session.answer(backend, message);
            if !hub.answer(id, reply.line, reply.joined) {
                return Ok(());
            }
            if reply.quit {
                backend.quit();
            }
        }
    }
}

/// Reads what the client sent, and hands the descriptors that came with it to `session`.
fn receive(stream: &UnixStream, bytes: &mut [u8], session: &mut Session) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_PASSED))];
    let mut passed = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::CMSG_CLOEXEC;
    let mut parts = [IoSliceMut::new(bytes)];
    let received = loop {
        match recvmsg(stream, &mut parts, &mut passed, flags) {
            Err(rustix::io::Errno::INTR) => {}
            received => break received?,
        }
    };
    for message in passed.drain() {
        if let RecvAncillaryMessage::ScmRights(fds) = message {
            fds.for_each(|fd| session.pass(fd));
        }
    }
    Ok(received.bytes)
}

/// Writes what the hub queues until it ends the queue or the client is gone.
fn write(stream: &mut UnixStream, queue: &Receiver<Line>) {
    for line in queue {
        if stream.write_all(&line.bytes).is_err() {
            return;
        }
        if let Some(written) = line.written {
            // An error says that the reader has left.
            let _ = written.send(());
        }
    }
}
