//! A connection that nobody on the way can read or change: TLS 1.3 over a socket, both sides of which
//! prove who they are.
//!
//! One thread may read while another one writes, as on the socket itself: the session's lock is held
//! while bytes are encrypted or decrypted, never while the socket is waited for.

use std::borrow::Cow;
use std::io::{self, Read, Write};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustls::pki_types::{InvalidDnsNameError, ServerName};
use rustls::{
    AlertDescription, CertificateError, ClientConnection, Connection, InvalidMessage,
    ServerConnection,
};
use socket2::Socket;

use super::credentials::Credentials;
use super::wire::write_patiently;
use crate::probes::Errno;

/// Bytes that are read from the socket at once.
const INPUT: usize = 256 << 10;

/// There is no session.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is nothing to hold the destination's certificate against.
    #[error(
        "{uri} has no host name that the destination's certificate could be for: set the parameter \
         tls-hostname"
    )]
    NoName {
        /// Where to.
        uri: String,
    },
    /// The parameter, or the host of the URI, is no name.
    #[error("'{name}' is not a name that a certificate could be for")]
    Name {
        /// The name.
        name: String,
        /// What is wrong with it.
        source: InvalidDnsNameError,
    },
    /// The connection takes no encryption.
    #[error("{uri} can't be encrypted: unset tls-creds, or use tcp:, tls: or unix:")]
    NoSocket {
        /// Where to.
        uri: String,
    },
    /// The two sides don't get to trust each other.
    #[error("encrypting {uri}")]
    Handshake {
        /// Where to or from.
        uri: String,
        /// Why not.
        source: io::Error,
    },
}

impl Errno for Error {
    fn errno(&self) -> i32 {
        match self {
            Error::NoName { .. } | Error::Name { .. } | Error::NoSocket { .. } => libc::EINVAL,
            Error::Handshake { source, .. } => source.raw_os_error().unwrap_or(libc::EPROTO),
        }
    }
}

/// A session can't go on, or never began.
#[derive(Debug, thiserror::Error)]
#[error("{}", reason(.0))]
struct Broken(rustls::Error);

/// How a side encrypts: its credentials, and what the other side has to be.
#[derive(Clone, Debug)]
pub(super) struct Security {
    credentials: Credentials,
    /// The name that the destination's certificate is to be for.
    name: Option<ServerName<'static>>,
}

impl Security {
    /// A source's, for a destination that is to have a certificate for `name`; a destination's has no
    /// name.
    ///
    /// # Errors
    /// When that is no name.
    pub(super) fn new(credentials: Credentials, name: Option<&str>) -> Result<Self, Error> {
        let parse = |name: &str| {
            ServerName::try_from(name.to_owned()).map_err(|source| Error::Name {
                name: name.to_owned(),
                source,
            })
        };
        let name = name.map(parse).transpose()?;
        Ok(Security { credentials, name })
    }

    /// Opens a session over `socket`, whose timeouts bound how long that takes. `uri` is for errors.
    ///
    /// # Errors
    /// When either side does not trust the other one, which has been told.
    pub(super) fn open(&self, socket: Arc<Socket>, uri: &str) -> Result<Tls, Error> {
        let failed = |source| Error::Handshake {
            uri: uri.to_owned(),
            source,
        };
        let session = match (&self.credentials, &self.name) {
            (Credentials::Client(config), Some(name)) => {
                ClientConnection::new(Arc::clone(config), name.clone()).map(Connection::from)
            }
            (Credentials::Client(_), None) => {
                let uri = uri.to_owned();
                return Err(Error::NoName { uri });
            }
            (Credentials::Server(config), _) => {
                ServerConnection::new(Arc::clone(config)).map(Connection::from)
            }
        };
        let session = session.map_err(|error| failed(broken(error)))?;
        Tls::open(socket, session).map_err(failed)
    }
}

/// An encrypted connection.
#[derive(Debug)]
pub(super) struct Tls {
    socket: Arc<Socket>,
    /// Locked last, and only while no byte is waited for.
    session: Mutex<Connection>,
    input: Mutex<Input>,
    output: Mutex<Output>,
}

/// What has arrived and is not decrypted yet.
#[derive(Debug)]
struct Input {
    bytes: Box<[u8]>,
    start: usize,
    end: usize,
}

/// What is to be sent.
#[derive(Debug, Default)]
struct Output {
    records: Vec<u8>,
    /// A record was cut: nothing that follows could be read.
    cut: bool,
}

impl Tls {
    fn open(socket: Arc<Socket>, mut session: Connection) -> io::Result<Self> {
        session.set_buffer_limit(None);
        while session.is_handshaking() {
            // Reads and writes as the handshake goes, and sends the reason when it ends.
            session.complete_io(&mut &*socket).map_err(explained)?;
        }
        Ok(Tls {
            socket,
            session: Mutex::new(session),
            input: Mutex::new(Input {
                bytes: vec![0; INPUT].into_boxed_slice(),
                start: 0,
                end: 0,
            }),
            output: Mutex::default(),
        })
    }

    /// What it goes over.
    pub(super) fn socket(&self) -> &Socket {
        &self.socket
    }

    /// Reads what the other side has written; 0 once it writes no more.
    pub(super) fn read(&self, bytes: &mut [u8]) -> io::Result<usize> {
        let mut input = lock(&self.input);
        loop {
            let mut session = lock(&self.session);
            match session.reader().read(bytes) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                // Every stream says where it ends, so one that is cut off is found without TLS.
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(0),
                read => return read,
            }
            let Input { bytes, start, end } = &mut *input;
            let mut records = bytes.get(*start..*end).unwrap_or_default();
            if records.is_empty() {
                drop(session);
                (*start, *end) = (0, (&*self.socket).read(bytes)?);
                if *end == 0 {
                    return Ok(0);
                }
                continue;
            }
            *start += session.read_tls(&mut records)?;
            session.process_new_packets().map_err(broken)?;
        }
    }

    /// Writes all of `bytes`.
    ///
    /// # Errors
    /// When the socket did not take all of it. The other side can read none of a record that was cut,
    /// and as nothing is ever sent after it, this is as if nothing of `bytes`, or of its last 16 KiB,
    /// had been written.
    pub(super) fn write(&self, bytes: &[u8]) -> io::Result<usize> {
        let mut output = lock(&self.output);
        if output.cut {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        let mut session = lock(&self.session);
        session.writer().write_all(bytes)?;
        output.records.clear();
        while session.wants_write() {
            session.write_tls(&mut output.records)?;
        }
        drop(session);
        output.cut = true;
        let mut rest = output.records.as_slice();
        while !rest.is_empty() {
            match write_patiently(&self.socket, rest) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(written) => rest = rest.get(written..).unwrap_or_default(),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        output.cut = false;
        Ok(bytes.len())
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn broken(error: rustls::Error) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, Broken(error))
}

/// rustls's own errors inside of errors of I/O, in our words; a timeout in the kernel's.
fn explained(error: io::Error) -> io::Error {
    if error.kind() == io::ErrorKind::WouldBlock {
        return io::Error::from_raw_os_error(libc::ETIMEDOUT);
    }
    if error.kind() == io::ErrorKind::UnexpectedEof {
        return io::Error::new(error.kind(), "the other side closed the connection");
    }
    let inner = error.get_ref().and_then(|inner| inner.downcast_ref());
    match inner {
        Some(inner) => broken(rustls::Error::clone(inner)),
        None => error,
    }
}

/// What a person who set up the certificates has to know.
fn reason(error: &rustls::Error) -> Cow<'static, str> {
    use CertificateError as Certificate;
    use rustls::Error::{
        AlertReceived, InappropriateHandshakeMessage, InappropriateMessage, InvalidCertificate,
        NoCertificatesPresented,
    };
    let text = match error {
        NoCertificatesPresented => "the other side shows no certificate: it needs client-cert.pem",
        // A CA of the same name has signed it otherwise.
        InvalidCertificate(Certificate::UnknownIssuer | Certificate::BadSignature) => {
            "the other side's certificate is not of this side's CA (ca-cert.pem)"
        }
        InvalidCertificate(Certificate::Expired | Certificate::ExpiredContext { .. }) => {
            "the other side's certificate has expired"
        }
        InvalidCertificate(Certificate::NotValidYet | Certificate::NotValidYetContext { .. }) => {
            "the other side's certificate is not valid yet"
        }
        InvalidCertificate(Certificate::Revoked) => {
            "the other side's certificate was revoked (ca-crl.pem)"
        }
        InvalidCertificate(
            Certificate::InvalidPurpose | Certificate::InvalidPurposeContext { .. },
        ) => {
            "the other side's certificate is not for this use: a source needs one for clients, a \
              destination one for servers"
        }
        AlertReceived(AlertDescription::UnknownCA | AlertDescription::DecryptError) => {
            "the other side refuses this side's certificate: it is not of its CA"
        }
        AlertReceived(AlertDescription::CertificateExpired) => {
            "the other side refuses this side's certificate: it has expired, or is not valid yet"
        }
        AlertReceived(AlertDescription::CertificateRevoked) => {
            "the other side refuses this side's certificate: it was revoked"
        }
        AlertReceived(AlertDescription::CertificateRequired) => {
            "the other side asks for a certificate, and this side has none: it needs \
             client-cert.pem and client-key.pem"
        }
        AlertReceived(
            AlertDescription::BadCertificate | AlertDescription::UnsupportedCertificate,
        ) => "the other side refuses this side's certificate: it is for another name or use",
        rustls::Error::InvalidMessage(InvalidMessage::InvalidContentType)
        | InappropriateMessage { .. }
        | InappropriateHandshakeMessage { .. } => "the other side does not speak TLS",
        InvalidCertificate(Certificate::NotValidForNameContext { expected, .. }) => {
            let name = expected.to_str();
            return format!(
                "the other side's certificate is not for '{name}': set the parameter tls-hostname if \
                 it is right under another name"
            )
            .into();
        }
        other => return format!("TLS: {other}").into(),
    };
    text.into()
}
