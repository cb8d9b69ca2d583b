//! `[2]` The connection: dialled at the source, accepted at the destination. Or what stands in for
//! one: a file, a command, a descriptor that somebody passed.

use std::fs::File;
use std::io;
use std::net::{IpAddr, ToSocketAddrs};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileTypeExt;
use std::time::Duration;

use socket2::{Domain, SockAddr, Socket, Type};

use super::board::{Board, Cancelled};
use super::descriptors::{self, Descriptors};
use super::lanes::MAX_LANES;
use super::oneway::{Direction, OneWay};
use super::status::SocketAddress;
use super::tls::Security;
use super::uri::Uri;
use super::wire::Wire;
use crate::probes::Errno;
use crate::socket::{self, SocketFile};

/// How long one address has to answer.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// There is no connection.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The host's name has no address.
    #[error("looking up the host of {uri}")]
    Resolve {
        /// Where to.
        uri: String,
        /// What the resolver said.
        source: io::Error,
    },
    /// Nobody answers, or not in time. With several addresses, the last one's error.
    #[error("connecting to {uri}")]
    Connect {
        /// Where to.
        uri: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// The address can't be listened on.
    #[error("listening on {uri}")]
    Listen {
        /// Where.
        uri: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// The listener failed.
    #[error("waiting for a migration on {uri}")]
    Accept {
        /// Where.
        uri: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// The file, the command or the descriptor can't be used.
    #[error("opening {uri}")]
    Open {
        /// Which.
        uri: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// Everybody on the way could read and change the guest.
    #[error(
        "{uri} is not loopback ({address}), and tcp: sends the guest unencrypted: use tls:, or \
         start the monitor with --allow-plaintext"
    )]
    Plaintext {
        /// Where.
        uri: String,
        /// The address that it means.
        address: IpAddr,
    },
    /// There is no such descriptor.
    #[error(transparent)]
    Descriptor(#[from] descriptors::Error),
    /// The path of a unix socket can't be had.
    #[error(transparent)]
    Socket(#[from] socket::Error),
    /// A person gave up before there was a connection.
    #[error(transparent)]
    Cancelled(#[from] Cancelled),
}

impl Errno for Error {
    fn errno(&self) -> i32 {
        match self {
            Error::Resolve { .. } => libc::EADDRNOTAVAIL,
            Error::Plaintext { .. } => libc::EPERM,
            Error::Connect { source, .. }
            | Error::Listen { source, .. }
            | Error::Open { source, .. }
            | Error::Accept { source, .. } => source.errno(),
            Error::Descriptor(error) => error.errno(),
            Error::Socket(socket::Error::Listen { source, .. }) => source.errno(),
            Error::Socket(_) => libc::EADDRINUSE,
            Error::Cancelled(_) => libc::ECANCELED,
        }
    }
}

/// Where a guest is to go: a URI, and the descriptor that it means if it is one.
#[derive(Debug)]
pub(super) struct Target {
    /// The URI.
    pub(super) uri: Uri,
    /// How it is encrypted, if it is.
    pub(super) security: Option<Security>,
    passed: Option<OwnedFd>,
}

impl Target {
    /// What `uri` means to the client that has `descriptors`.
    ///
    /// # Errors
    /// When it names one that is not among them.
    pub(super) fn new(uri: Uri, descriptors: &mut Descriptors) -> Result<Self, Error> {
        let passed = match &uri {
            Uri::Fd(name) => Some(descriptors.take(name)?),
            _ => None,
        };
        Ok(Target {
            uri,
            security: None,
            passed,
        })
    }

    /// The same place once more, for a further connection; none if there can't be another one.
    pub(super) fn again(&self) -> Option<Target> {
        let address = matches!(self.uri, Uri::Tcp { .. } | Uri::Unix(_));
        address.then(|| Target {
            uri: self.uri.clone(),
            security: self.security.clone(),
            passed: None,
        })
    }

    /// The same, encrypted if there is a `security`.
    pub(super) fn secured(self, security: Option<Security>) -> Self {
        Target { security, ..self }
    }
}

/// Whether a guest may go over TCP to and from other hosts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Plaintext {
    /// Loopback only.
    #[default]
    Refused,
    /// A person said that the network is to be trusted.
    Allowed,
}

/// Connects to `target`, trying each of its addresses in turn, or opens it. A cancel through `board`
/// interrupts it.
pub(super) fn dial(target: Target, plaintext: Plaintext, board: &Board) -> Result<Wire, Error> {
    let Target { uri, passed, .. } = target;
    if let Some(opened) = open(&uri, passed, Direction::Out)? {
        board.attach(opened.clone())?;
        return Ok(opened);
    }
    let socket = connect(&uri, plaintext, board)?;
    Ok(Wire::from(socket))
}

/// Opens what takes no connecting.
fn open(uri: &Uri, passed: Option<OwnedFd>, way: Direction) -> Result<Option<Wire>, Error> {
    let opened = match (uri, passed) {
        (Uri::File { path, offset }, _) => OneWay::open(path, *offset, way).map(Wire::from),
        (Uri::Exec(command), _) => OneWay::spawn(command, way).map(Wire::from),
        (_, Some(fd)) => adopt(fd),
        _ => return Ok(None),
    };
    let uri = uri.to_string();
    opened
        .map(Some)
        .map_err(|source| Error::Open { uri, source })
}

/// Takes what a client has passed for what it is.
fn adopt(fd: OwnedFd) -> io::Result<Wire> {
    let file = File::from(fd);
    if !file.metadata()?.file_type().is_socket() {
        return OneWay::new(file).map(Wire::from);
    }
    let socket = Socket::from(OwnedFd::from(file));
    if socket.r#type()? != Type::STREAM {
        return Err(io::Error::from_raw_os_error(libc::EPROTOTYPE));
    }
    // A descriptor may have been made not to block, which it then does not for both of its owners.
    socket.set_nonblocking(false)?;
    configure(&socket)?;
    Ok(Wire::from(socket))
}

fn connect(uri: &Uri, plaintext: Plaintext, board: &Board) -> Result<Socket, Error> {
    let mut last = io::Error::from(io::ErrorKind::NotFound);
    for address in addresses(uri, plaintext)? {
        match try_dial(&address, board)? {
            Ok(socket) => return Ok(socket),
            Err(error) => last = error,
        }
    }
    Err(Error::Connect {
        uri: uri.to_string(),
        source: last,
    })
}

fn try_dial(address: &SockAddr, board: &Board) -> Result<io::Result<Socket>, Cancelled> {
    let made = Socket::new(address.domain(), Type::STREAM, None)
        .and_then(|socket| Ok((socket.try_clone()?, socket)));
    let (handle, socket) = match made {
        Ok(made) => made,
        Err(error) => return Ok(Err(error)),
    };
    board.attach(handle.into())?;
    let connected = socket.connect_timeout(address, CONNECT_TIMEOUT);
    if board.is_cancelled() {
        return Err(Cancelled);
    }
    Ok(connected.and_then(|()| configure(&socket)).map(|()| socket))
}

/// Where one migration is to come from.
#[derive(Debug)]
pub(super) struct Listener {
    from: Origin,
    uri: Uri,
    /// Where it listens, with the port that the kernel chose.
    address: Option<SocketAddress>,
    security: Option<Security>,
    /// Of a unix socket; removed when the listener goes.
    _file: Option<SocketFile>,
}

#[derive(Debug)]
enum Origin {
    /// Whoever connects to this.
    Socket(Socket),
    /// What is there already.
    Opened(Wire),
}

impl Listener {
    /// Listens on `uri`, or opens it. A socket that a dead process left at a `unix:` path is
    /// replaced; `fd:` is one of `descriptors`.
    pub(super) fn bind(
        uri: &Uri,
        descriptors: &mut Descriptors,
        plaintext: Plaintext,
    ) -> Result<Listener, Error> {
        let Target { uri, passed, .. } = Target::new(uri.clone(), descriptors)?;
        if let Some(opened) = open(&uri, passed, Direction::In)? {
            return Ok(Listener {
                from: Origin::Opened(opened),
                uri,
                address: None,
                security: None,
                _file: None,
            });
        }
        let uri = &uri;
        let failed = |source| Error::Listen {
            uri: uri.to_string(),
            source,
        };
        if let Uri::Unix(path) = uri {
            let (listener, file) = socket::listen(path)?;
            let address = Some(SocketAddress::Unix {
                path: path.display().to_string(),
            });
            return Ok(Listener {
                from: Origin::Socket(listener.into()),
                uri: uri.clone(),
                address,
                security: None,
                _file: Some(file),
            });
        }
        let mut last = io::Error::from(io::ErrorKind::NotFound);
        for address in addresses(uri, plaintext)? {
            match bind(&address) {
                Ok(socket) => {
                    let address = inet(&socket).map_err(failed)?;
                    return Ok(Listener {
                        from: Origin::Socket(socket),
                        uri: uri.clone(),
                        address,
                        security: None,
                        _file: None,
                    });
                }
                Err(error) => last = error,
            }
        }
        Err(failed(last))
    }

    /// The same, encrypted if there is a `security`.
    pub(super) fn secured(self, security: Option<Security>) -> Self {
        Listener { security, ..self }
    }

    /// How the connection is to be encrypted, if it is.
    pub(super) fn security(&self) -> Option<Security> {
        self.security.clone()
    }

    /// Where it listens.
    pub(super) fn address(&self) -> Option<SocketAddress> {
        self.address.clone()
    }

    /// Waits for the source, however long it takes.
    ///
    /// # Errors
    /// Also when a cancel through `board` wakes it.
    pub(super) fn accept(&self, board: &Board) -> Result<Wire, Error> {
        let connection = match &self.from {
            Origin::Socket(socket) => self.next(socket, board)?,
            Origin::Opened(opened) => opened.clone(),
        };
        board.attach(connection.clone())?;
        Ok(connection)
    }

    /// Waits for a further connection, for no longer than `limit`.
    ///
    /// # Errors
    /// As [`Listener::accept`].
    pub(super) fn accept_again(
        &self,
        limit: Duration,
        board: &Board,
    ) -> Result<Option<Wire>, Error> {
        let failed = |source| Error::Accept {
            uri: self.uri.to_string(),
            source,
        };
        let Origin::Socket(socket) = &self.from else {
            return Err(failed(io::ErrorKind::Unsupported.into()));
        };
        socket.set_read_timeout(Some(limit)).map_err(failed)?;
        match self.next(socket, board) {
            Err(Error::Accept { source, .. }) if source.kind() == io::ErrorKind::WouldBlock => {
                Ok(None)
            }
            accepted => accepted.map(Some),
        }
    }

    fn next(&self, socket: &Socket, board: &Board) -> Result<Wire, Error> {
        let failed = |source| Error::Accept {
            uri: self.uri.to_string(),
            source,
        };
        board.attach(socket.try_clone().map_err(failed)?.into())?;
        let accepted = socket.accept();
        if board.is_cancelled() {
            return Err(Cancelled.into());
        }
        let (connection, _) = accepted.map_err(failed)?;
        configure(&connection).map_err(failed)?;
        Ok(Wire::from(connection))
    }
}

fn bind(address: &SockAddr) -> io::Result<Socket> {
    let socket = Socket::new(address.domain(), Type::STREAM, None)?;
    if address.domain() == Domain::IPV6 {
        socket.set_only_v6(false)?;
    }
    socket.set_reuse_address(true)?;
    socket.bind(address)?;
    socket.listen(MAX_LANES.into())?;
    Ok(socket)
}

fn inet(socket: &Socket) -> io::Result<Option<SocketAddress>> {
    let address = socket.local_addr()?.as_socket();
    Ok(address.map(|a| SocketAddress::Inet {
        host: a.ip().to_string(),
        port: a.port().to_string(),
    }))
}

/// What both ends of a connection set. The buffers are left to the kernel, which sizes those of TCP
/// by what the path needs; what lies in them is not counted as sent.
fn configure(socket: &Socket) -> io::Result<()> {
    if socket.domain()? != Domain::UNIX {
        socket.set_tcp_nodelay(true)?;
    }
    Ok(())
}

/// The addresses of `uri`, all of which must be allowed: which of them is used is not known yet.
fn addresses(uri: &Uri, plaintext: Plaintext) -> Result<Vec<SockAddr>, Error> {
    let resolve = |host: &str, port: u16| match (host, port).to_socket_addrs() {
        Ok(found) => Ok(found),
        Err(source) => Err(Error::Resolve {
            uri: uri.to_string(),
            source,
        }),
    };
    let found: Vec<_> = match uri {
        Uri::Unix(path) => {
            let failed = |source| Error::Connect {
                uri: uri.to_string(),
                source,
            };
            return Ok(vec![SockAddr::unix(path).map_err(failed)?]);
        }
        Uri::Tcp { host, port, .. } if host.is_empty() => resolve("::", *port)?
            .chain(resolve("0.0.0.0", *port)?)
            .collect(),
        Uri::Tcp { host, port, .. } => resolve(host, *port)?.collect(),
        Uri::Fd(_) | Uri::Exec(_) | Uri::File { .. } => Vec::new(),
    };
    let far = found.iter().map(|address| address.ip());
    match far.into_iter().find(|ip| !ip.to_canonical().is_loopback()) {
        Some(address) if plaintext == Plaintext::Refused => Err(Error::Plaintext {
            uri: uri.to_string(),
            address,
        }),
        _ => Ok(found.into_iter().map(SockAddr::from).collect()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tcp_leaves_the_host_only_when_it_was_allowed() {
        let rows = [
            ("127.0.0.1", true),
            ("127.8.9.1", true),
            ("::1", true),
            ("::ffff:127.0.0.1", true),
            ("", false),
            ("0.0.0.0", false),
            ("::", false),
            ("192.0.2.1", false),
            ("2001:db8::1", false),
            ("::ffff:192.0.2.1", false),
        ];
        for (host, near) in rows {
            let host = host.to_owned();
            let uri = Uri::Tcp {
                host,
                port: 1,
                tls: false,
            };
            let found = addresses(&uri, Plaintext::Refused);
            assert_eq!(found.is_ok(), near, "{uri}");
            if let Err(error) = found {
                assert!(error.to_string().contains("--allow-plaintext"), "{error}");
            }
            assert!(addresses(&uri, Plaintext::Allowed).is_ok(), "{uri}");
        }
    }
}
