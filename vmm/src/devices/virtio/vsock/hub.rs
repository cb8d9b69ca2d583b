//! All connections of a vsock, and the unix sockets that they lead to.
//!
//! The protocol on the host's side is Firecracker's. A program of the host connects to the socket
//! `PATH`, writes `CONNECT PORT\n`, and reads `OK PORT\n` once the guest has accepted. A program of
//! the guest that connects to the host's port N reaches whoever listens on the socket `PATH_N`.

use std::collections::{BTreeMap, VecDeque};
use std::io::{self, Read};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use socket2::{Domain, SockAddr, Socket, Type};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::connection::{Connection, Next, Stage};
use super::packet::{Header, Op, Ports};
use crate::memory::transfer::Pieces;
use crate::socket::{self, SocketFile};

/// Connections at a time.
const CONNECTIONS: usize = 1024;

/// Packets without a connection that wait for the guest to have buffers. While there are so many,
/// nothing is taken from it.
const ANSWERS: usize = 256;

/// The first port that the host's connections come from, as with Linux's own.
const FIRST_PORT: u32 = 1 << 30;

/// The longest greeting: `CONNECT 4294967295\n`.
const GREETING: usize = 19;

/// Tokens of the epoll: the listener, then greetings and connections by their descriptors.
const LISTENER: u64 = u64::MAX;

/// The connections.
pub(super) struct Hub {
    path: PathBuf,
    epoll: Epoll,
    listener: Option<(UnixListener, SocketFile)>,
    /// Clients that have not said what they want.
    greeting: BTreeMap<RawFd, (UnixStream, Vec<u8>)>,
    connections: BTreeMap<Ports, Connection>,
    by_fd: BTreeMap<RawFd, Ports>,
    answers: VecDeque<Header>,
    next_port: u32,
    /// Whose turn it is to send.
    turn: Ports,
}

impl Hub {
    /// For the sockets at `path`; it listens with [`Hub::listen`].
    pub(super) fn new(path: &Path) -> io::Result<Self> {
        Ok(Hub {
            path: path.to_owned(),
            epoll: Epoll::new()?,
            listener: None,
            greeting: BTreeMap::new(),
            connections: BTreeMap::new(),
            by_fd: BTreeMap::new(),
            answers: VecDeque::new(),
            next_port: FIRST_PORT,
            turn: Ports { guest: 0, host: 0 },
        })
    }

    /// Readable when [`Hub::wake`] has something to do.
    pub(super) fn fd(&self) -> RawFd {
        self.epoll.as_raw_fd()
    }

    /// Begins to listen; listening already, nothing happens.
    pub(super) fn listen(&mut self) -> io::Result<()> {
        if self.listener.is_none() {
            let (listener, file) = socket::listen(&self.path).map_err(io::Error::other)?;
            listener.set_nonblocking(true)?;
            self.watch(listener.as_raw_fd(), LISTENER)?;
            self.listener = Some((listener, file));
        }
        Ok(())
    }

    /// Listens no more, and removes the socket.
    pub(super) fn close(&mut self) {
        self.listener = None;
    }

    /// Drops all connections.
    pub(super) fn reset(&mut self) {
        self.greeting.clear();
        self.connections.clear();
        self.by_fd.clear();
        self.answers.clear();
    }

    /// Looks what happened on the sockets.
    pub(super) fn wake(&mut self) -> io::Result<()> {
        let mut events = [EpollEvent::default(); 64];
        let count = match self.epoll.wait(0, &mut events) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
            result => result?,
        };
        for event in events.iter().take(count) {
            if event.data() == LISTENER {
                self.accept();
                continue;
            }
            let fd = RawFd::try_from(event.data()).unwrap_or(-1);
            if self.greeting.contains_key(&fd) {
                self.greet(fd);
            } else if let Some(&ports) = self.by_fd.get(&fd)
                && let Some(connection) = self.connections.get_mut(&ports)
            {
                connection.wake();
                if connection.flush().is_err() {
                    self.drop_connection(ports, true);
                }
            }
        }
        Ok(())
    }

    /// Whether packets can be taken from the guest.
    pub(super) fn has_room(&self) -> bool {
        self.answers.len() < ANSWERS
    }

    /// A packet of the guest.
    pub(super) fn receive(&mut self, header: &Header, data: &Pieces) {
        let ports = header.ports;
        let Some(connection) = self.connections.get_mut(&ports) else {
            match header.op {
                Some(Op::Request) => self.connect(header),
                Some(Op::Reset) => {}
                _ => self.answer_reset(ports),
            }
            return;
        };
        connection.hear(header);
        let result = match header.op {
            Some(Op::Response) if connection.stage() == Stage::Asked => {
                connection.accepted(ports.host)
            }
            Some(Op::Data) if connection.stage() != Stage::Asked => {
                connection.take(data, usize::try_from(header.len).unwrap_or(usize::MAX))
            }
            Some(Op::CreditUpdate) => Ok(()),
            Some(Op::CreditRequest) => {
                let answer = connection.header(ports, Op::CreditUpdate, 0, 0);
                self.answers.push_back(answer);
                Ok(())
            }
            Some(Op::Shutdown) => match connection.shut(header.flags) {
                Ok(true) => Err(io::ErrorKind::ConnectionAborted.into()),
                Ok(false) => Ok(()),
                Err(error) => Err(error),
            },
            Some(Op::Reset) => return self.drop_connection(ports, false),
            _ => Err(io::ErrorKind::InvalidData.into()),
        };
        if result.is_err() {
            self.drop_connection(ports, true);
        }
    }

    /// Whether there may be a packet for the guest.
    pub(super) fn has_next(&self) -> bool {
        !self.answers.is_empty() || self.connections.values().any(Connection::has_next)
    }

    /// The next packet for the guest; its data goes into `room`.
    pub(super) fn next(&mut self, room: &mut [u8]) -> Option<Header> {
        if let Some(answer) = self.answers.pop_front() {
            return Some(answer);
        }
        // Each connection in turn, from the one after the last.
        let after = self
            .connections
            .range(self.turn..)
            .skip_while(|(p, _)| **p == self.turn);
        let order: Vec<_> = after
            .chain(self.connections.range(..=self.turn))
            .filter(|(_, connection)| connection.has_next())
            .map(|(&ports, _)| ports)
            .collect();
        for ports in order {
            let Some(connection) = self.connections.get_mut(&ports) else {
                continue;
            };
            let (op, flags, len) = match connection.next(room) {
                Ok(Next::Nothing) => continue,
                Ok(Next::Control(op, flags)) => (op, flags, 0),
                Ok(Next::Data(len)) => (Op::Data, 0, len),
                Err(_) => {
                    self.drop_connection(ports, true);
                    return self.answers.pop_front();
                }
            };
            self.turn = ports;
            return Some(connection.header(ports, op, flags, len));
        }
        None
    }

    /// The guest wants a connection to the host.
    fn connect(&mut self, request: &Header) {
        let ports = request.ports;
        let mut name = self.path.clone().into_os_string();
        name.push(format!("_{}", ports.host));
        let stream = connect(Path::new(&name)).and_then(|stream| {
            self.watch(stream.as_raw_fd(), stream.as_raw_fd() as u64)?;
            Ok(stream)
        });
        match stream {
            Ok(stream) if self.connections.len() < CONNECTIONS => {
                let mut connection = Connection::opened(stream, request);
                self.answers
                    .push_back(connection.header(ports, Op::Response, 0, 0));
                self.by_fd.insert(connection.fd(), ports);
                self.connections.insert(ports, connection);
            }
            _ => self.answer_reset(ports),
        }
    }

    fn accept(&mut self) {
        let Some((listener, _)) = &self.listener else {
            return;
        };
        let mut came = Vec::new();
        while let Ok((stream, _)) = listener.accept() {
            came.push(stream);
        }
        for stream in came {
            let fd = stream.as_raw_fd();
            let ready = stream.set_nonblocking(true);
            let room = self.greeting.len() + self.connections.len() < CONNECTIONS;
            if room && ready.and_then(|()| self.watch(fd, fd as u64)).is_ok() {
                self.greeting.insert(fd, (stream, Vec::new()));
                self.greet(fd);
            }
        }
    }

    /// Reads a client's greeting, a byte at a time: what follows it is the guest's.
    fn greet(&mut self, fd: RawFd) {
        let Some((mut stream, mut line)) = self.greeting.remove(&fd) else {
            return;
        };
        let mut byte = [0];
        loop {
            match stream.read(&mut byte) {
                Ok(1) if byte == *b"\n" => break,
                Ok(1) if line.len() < GREETING => line.push(byte[0]),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.greeting.insert(fd, (stream, line));
                    return;
                }
                // Gone, or talking about something else: it is turned away.
                _ => return,
            }
        }
        let port = str::from_utf8(&line)
            .ok()
            .and_then(|line| line.strip_prefix("CONNECT "));
        let Some(guest) = port.and_then(|port| port.trim().parse().ok()) else {
            return;
        };
        let ports = self.free_ports(guest);
        let mut connection = Connection::asked(stream);
        self.answers
            .push_back(connection.header(ports, Op::Request, 0, 0));
        self.by_fd.insert(fd, ports);
        self.connections.insert(ports, connection);
    }

    /// A port of the host that has no connection to this one of the guest.
    fn free_ports(&mut self, guest: u32) -> Ports {
        loop {
            let host = self.next_port;
            self.next_port = host.checked_add(1).unwrap_or(FIRST_PORT);
            let ports = Ports { guest, host };
            if !self.connections.contains_key(&ports) {
                return ports;
            }
        }
    }

    fn drop_connection(&mut self, ports: Ports, tell: bool) {
        if let Some(connection) = self.connections.remove(&ports) {
            self.by_fd.remove(&connection.fd());
        }
        if tell {
            self.answer_reset(ports);
        }
    }

    fn answer_reset(&mut self, ports: Ports) {
        self.answers.push_back(Header {
            ports,
            len: 0,
            op: Some(Op::Reset),
            flags: 0,
            buf_alloc: 0,
            fwd_cnt: 0,
        });
    }

    fn watch(&self, fd: RawFd, token: u64) -> io::Result<()> {
        let events = EventSet::IN | EventSet::OUT | EventSet::EDGE_TRIGGERED;
        let event = EpollEvent::new(events, token);
        self.epoll.ctl(ControlOperation::Add, fd, event)
    }
}

/// Connects without waiting: a listener whose queue is full refuses.
fn connect(path: &Path) -> io::Result<UnixStream> {
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    socket.set_nonblocking(true)?;
    socket.connect(&SockAddr::unix(path)?)?;
    Ok(socket.into())
}
