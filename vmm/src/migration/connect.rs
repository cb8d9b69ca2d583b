//! `[2]` The connection: dialled at the source, accepted at the destination.

use std::io;
use std::net::ToSocketAddrs;
use std::time::Duration;

use socket2::{Domain, SockAddr, Socket, Type};

use super::board::{Board, Cancelled};
use super::status::SocketAddress;
use super::uri::Uri;
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
            Error::Connect { source, .. }
            | Error::Listen { source, .. }
            | Error::Accept { source, .. } => source.errno(),
            Error::Socket(socket::Error::Listen { source, .. }) => source.errno(),
            Error::Socket(_) => libc::EADDRINUSE,
            Error::Cancelled(_) => libc::ECANCELED,
        }
    }
}

/// Connects to `uri`, trying each of its addresses in turn. A cancel through `board` interrupts it.
pub(super) fn dial(uri: &Uri, board: &Board) -> Result<Socket, Error> {
    let mut last = io::Error::from(io::ErrorKind::NotFound);
    for address in addresses(uri)? {
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
    board.attach(handle)?;
    let connected = socket.connect_timeout(address, CONNECT_TIMEOUT);
    if board.is_cancelled() {
        return Err(Cancelled);
    }
    Ok(connected.and_then(|()| configure(&socket)).map(|()| socket))
}

/// A socket that listens for one migration.
#[derive(Debug)]
pub(super) struct Listener {
    socket: Socket,
    uri: Uri,
    /// Where it is, with the port that the kernel chose.
    address: Option<SocketAddress>,
    /// Of a unix socket; removed when the listener goes.
    _file: Option<SocketFile>,
}

impl Listener {
    /// Listens on `uri`. A socket that a dead process left at a `unix:` path is replaced.
    pub(super) fn bind(uri: &Uri) -> Result<Listener, Error> {
        let failed = |source| Error::Listen {
            uri: uri.to_string(),
            source,
        };
        if let Uri::Unix(path) = uri {
            let (listener, file) = socket::listen(path)?;
            let address = Some(SocketAddress::Unix {
                path: path.display().to_string(),
            });
            let socket = Socket::from(listener);
            return Ok(Listener {
                socket,
                uri: uri.clone(),
                address,
                _file: Some(file),
            });
        }
        let mut last = io::Error::from(io::ErrorKind::NotFound);
        for address in addresses(uri)? {
            match bind(&address) {
                Ok(socket) => {
                    let address = inet(&socket).map_err(failed)?;
                    return Ok(Listener {
                        socket,
                        uri: uri.clone(),
                        address,
                        _file: None,
                    });
                }
                Err(error) => last = error,
            }
        }
        Err(failed(last))
    }

    /// Where it listens.
    pub(super) fn address(&self) -> Option<SocketAddress> {
        self.address.clone()
    }

    /// Waits for the source, however long it takes, and listens no more.
    ///
    /// # Errors
    /// Also when a cancel through `board` wakes it.
    pub(super) fn accept(self, board: &Board) -> Result<Socket, Error> {
        let failed = |source| Error::Accept {
            uri: self.uri.to_string(),
            source,
        };
        board.attach(self.socket.try_clone().map_err(failed)?)?;
        let accepted = self.socket.accept();
        if board.is_cancelled() {
            return Err(Cancelled.into());
        }
        let (connection, _) = accepted.map_err(failed)?;
        configure(&connection).map_err(failed)?;
        board.attach(connection.try_clone().map_err(failed)?)?;
        Ok(connection)
    }
}

fn bind(address: &SockAddr) -> io::Result<Socket> {
    let socket = Socket::new(address.domain(), Type::STREAM, None)?;
    if address.domain() == Domain::IPV6 {
        socket.set_only_v6(false)?;
    }
    socket.set_reuse_address(true)?;
    socket.bind(address)?;
    socket.listen(1)?;
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

fn addresses(uri: &Uri) -> Result<Vec<SockAddr>, Error> {
    let resolve = |host: &str, port: u16| match (host, port).to_socket_addrs() {
        Ok(found) => Ok(found.map(SockAddr::from)),
        Err(source) => Err(Error::Resolve {
            uri: uri.to_string(),
            source,
        }),
    };
    match uri {
        Uri::Unix(path) => {
            let failed = |source| Error::Connect {
                uri: uri.to_string(),
                source,
            };
            Ok(vec![SockAddr::unix(path).map_err(failed)?])
        }
        Uri::Tcp { host, port } if host.is_empty() => Ok(resolve("::", *port)?
            .chain(resolve("0.0.0.0", *port)?)
            .collect()),
        Uri::Tcp { host, port } => Ok(resolve(host, *port)?.collect()),
    }
}
