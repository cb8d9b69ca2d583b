//! What a side of an encrypted migration shows and what it trusts: QEMU's `tls-creds-x509` objects.
//!
//! One is a folder with files of fixed names, as QEMU's users have them: `ca-cert.pem`, for a
//! destination `server-cert.pem` and `server-key.pem`, for a source `client-cert.pem` and
//! `client-key.pem`, and for either `ca-crl.pem` if there is one. Both sides always prove who they
//! are; nothing but TLS 1.3 is spoken.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustls::client::{Resumption, WebPkiServerVerifier};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, CertificateRevocationListDer, PrivateKeyDer};
use rustls::server::{VerifierBuilderError, WebPkiClientVerifier};
use rustls::{ClientConfig, RootCertStore, ServerConfig, version};

use crate::probes::Errno;

/// Credentials can't be had. Where QEMU has the same error, the text is QEMU's.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file can't be read.
    #[error("Unable to access credentials {}", path.display())]
    Access {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// A file is not what its name says.
    #[error("{} is no PEM file of {what}", path.display())]
    Pem {
        /// The file.
        path: PathBuf,
        /// What it should have.
        what: &'static str,
        /// What is wrong with it.
        source: pem::Error,
    },
    /// A file has none of what it should have.
    #[error("{} has no {what}", path.display())]
    Empty {
        /// The file.
        path: PathBuf,
        /// What it should have.
        what: &'static str,
    },
    /// The files don't make credentials.
    #[error("the TLS credentials in {}", dir.display())]
    Unfit {
        /// Their folder.
        dir: PathBuf,
        /// What is wrong.
        source: rustls::Error,
    },
    /// The CA's files don't make a judge of certificates.
    #[error("the CA of the TLS credentials in {}", dir.display())]
    Authority {
        /// Their folder.
        dir: PathBuf,
        /// What is wrong.
        source: VerifierBuilderError,
    },
    /// The processor is too old for the cryptography.
    #[error(
        "TLS needs a CPU with AES, PCLMULQDQ, BMI1, ADX and AVX2 (x86-64), or AES, PMULL and SHA2 \
         (arm64): this one lacks some of them; use a tunnel, as unix: or exec: by ssh"
    )]
    Cpu,
    /// The name is taken.
    #[error("attempt to add duplicate property '{0}' to object (type 'container')")]
    Duplicate(String),
    /// `object-del`.
    #[error("object '{0}' not found")]
    NotFound(String),
    /// The parameter `tls-creds` names none.
    #[error("No TLS credentials with id '{0}'")]
    NoCredentials(String),
    /// They are for the other side.
    #[error("Expected TLS credentials for a {} endpoint", .0.name())]
    Endpoint(Endpoint),
    /// `tls:` without a parameter `tls-creds`, and no object that must be meant.
    #[error(
        "tls: needs credentials: there is no one object tls-creds-x509 for a {} endpoint, and the \
         parameter tls-creds names none", .0.name()
    )]
    Unnamed(Endpoint),
}

impl Errno for Error {
    fn errno(&self) -> i32 {
        match self {
            Error::Access { source, .. } => source.errno(),
            Error::Cpu => libc::ENOTSUP,
            Error::Duplicate(_) => libc::EEXIST,
            Error::NotFound(_) | Error::NoCredentials(_) | Error::Unnamed(_) => libc::ENOENT,
            _ => libc::EINVAL,
        }
    }
}

/// Which side of a connection credentials are for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Endpoint {
    /// The source, which connects.
    Client,
    /// The destination, which listens.
    Server,
}

impl Endpoint {
    /// QEMU's name of it.
    pub fn name(self) -> &'static str {
        match self {
            Endpoint::Client => "client",
            Endpoint::Server => "server",
        }
    }

    /// The one that QEMU calls `name`.
    pub fn from_name(name: &str) -> Option<Endpoint> {
        let all = [Endpoint::Client, Endpoint::Server];
        all.into_iter().find(|endpoint| endpoint.name() == name)
    }
}

/// What `--object tls-creds-x509` and `object-add` say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// What the parameter `tls-creds` calls them.
    pub id: String,
    /// The folder.
    pub dir: PathBuf,
    /// Which side they are for.
    pub endpoint: Endpoint,
}

/// Credentials that were read, ready for a session.
#[derive(Clone, Debug)]
pub(super) enum Credentials {
    /// A source's.
    Client(Arc<ClientConfig>),
    /// A destination's.
    Server(Arc<ServerConfig>),
}

impl Credentials {
    fn load(dir: &Path, endpoint: Endpoint) -> Result<Self, Error> {
        if !graviola::util::is_cpu_supported() {
            return Err(Error::Cpu);
        }
        let unfit = |source| Error::Unfit {
            dir: dir.to_owned(),
            source,
        };
        let authority = |source| Error::Authority {
            dir: dir.to_owned(),
            source,
        };
        let provider = Arc::new(rustls_graviola::default_provider());
        let roots = Arc::new(roots(dir)?);
        let crls = revoked(&dir.join("ca-crl.pem"))?;
        match endpoint {
            Endpoint::Client => {
                let judge = WebPkiServerVerifier::builder_with_provider(roots, provider.clone());
                let judge = judge.with_crls(crls).build().map_err(authority)?;
                let config = ClientConfig::builder_with_provider(provider)
                    .with_protocol_versions(&[&version::TLS13])
                    .map_err(unfit)?
                    .with_webpki_verifier(judge);
                // As with QEMU a client may have none. No destination of ours lets it in then.
                let mut config = match identity(dir, endpoint)? {
                    Some((chain, key)) => {
                        config.with_client_auth_cert(chain, key).map_err(unfit)?
                    }
                    None => config.with_no_client_auth(),
                };
                config.resumption = Resumption::disabled();
                Ok(Credentials::Client(Arc::new(config)))
            }
            Endpoint::Server => {
                let judge = WebPkiClientVerifier::builder_with_provider(roots, provider.clone());
                let judge = judge.with_crls(crls).build().map_err(authority)?;
                let (chain, key) = match identity(dir, endpoint)? {
                    Some(identity) => identity,
                    None => return Err(missing(dir.join("server-cert.pem"))),
                };
                let config = server(provider, judge).map_err(unfit)?;
                let mut config = config.with_single_cert(chain, key).map_err(unfit)?;
                config.send_tls13_tickets = 0;
                Ok(Credentials::Server(Arc::new(config)))
            }
        }
    }

    fn endpoint(&self) -> Endpoint {
        match self {
            Credentials::Client(_) => Endpoint::Client,
            Credentials::Server(_) => Endpoint::Server,
        }
    }
}

fn server(
    provider: Arc<CryptoProvider>,
    judge: Arc<dyn rustls::server::danger::ClientCertVerifier>,
) -> Result<rustls::ConfigBuilder<ServerConfig, rustls::server::WantsServerCert>, rustls::Error> {
    let config = ServerConfig::builder_with_provider(provider);
    let config = config.with_protocol_versions(&[&version::TLS13])?;
    Ok(config.with_client_cert_verifier(judge))
}

/// The credentials of one machine, by id.
#[derive(Debug, Default)]
pub struct Keyring(Mutex<BTreeMap<String, Credentials>>);

impl Keyring {
    /// Reads credentials and keeps them. Files that change later change nothing: what a client wants
    /// renewed it deletes and adds.
    ///
    /// # Errors
    /// When the files are no credentials, or the id is taken.
    pub fn add(&self, options: Options) -> Result<(), Error> {
        let Options { id, dir, endpoint } = options;
        let credentials = Credentials::load(&dir, endpoint)?;
        let mut all = self.lock();
        if all.contains_key(&id) {
            return Err(Error::Duplicate(id));
        }
        all.insert(id, credentials);
        Ok(())
    }

    /// Forgets some. A connection that has them goes on.
    ///
    /// # Errors
    /// When there are none of that id.
    pub fn remove(&self, id: &str) -> Result<(), Error> {
        let removed = self.lock().remove(id);
        removed.map(drop).ok_or(Error::NotFound(id.to_owned()))
    }

    /// The credentials that `id` means on the side of `endpoint`. An empty one means those that there
    /// are, if there is no choice.
    ///
    /// # Errors
    /// When there are none.
    pub(super) fn find(&self, id: &str, endpoint: Endpoint) -> Result<Credentials, Error> {
        let all = self.lock();
        if id.is_empty() {
            let mut fit = all.values().filter(|c| c.endpoint() == endpoint);
            return match (fit.next(), fit.next()) {
                (Some(only), None) => Ok(only.clone()),
                _ => Err(Error::Unnamed(endpoint)),
            };
        }
        let found = all.get(id).ok_or(Error::NoCredentials(id.to_owned()))?;
        match found.endpoint() == endpoint {
            true => Ok(found.clone()),
            false => Err(Error::Endpoint(endpoint)),
        }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Credentials>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The CA, or the CAs.
fn roots(dir: &Path) -> Result<RootCertStore, Error> {
    let path = dir.join("ca-cert.pem");
    let mut roots = RootCertStore::empty();
    for certificate in certificates(&path)? {
        roots.add(certificate).map_err(|source| Error::Unfit {
            dir: dir.to_owned(),
            source,
        })?;
    }
    Ok(roots)
}

/// What this side shows; none if it has neither file of it.
fn identity(
    dir: &Path,
    endpoint: Endpoint,
) -> Result<Option<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>)>, Error> {
    let [chain, key] =
        ["cert", "key"].map(|what| dir.join(format!("{}-{what}.pem", endpoint.name())));
    if !chain.exists() && !key.exists() {
        return Ok(None);
    }
    let chain = certificates(&chain)?;
    let parsed = PrivateKeyDer::from_pem_slice(&contents(&key)?);
    let parsed = parsed.map_err(|source| match source {
        pem::Error::NoItemsFound => Error::Empty {
            path: key,
            what: "private key",
        },
        source => Error::Pem {
            path: key,
            what: "a private key",
            source,
        },
    })?;
    Ok(Some((chain, parsed)))
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, Error> {
    let contents = contents(path)?;
    let read: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&contents).collect();
    let read = read.map_err(|source| Error::Pem {
        path: path.to_owned(),
        what: "certificates",
        source,
    })?;
    match read.is_empty() {
        true => Err(Error::Empty {
            path: path.to_owned(),
            what: "certificate",
        }),
        false => Ok(read),
    }
}

/// The certificates that the CA has taken back, if it has said so.
fn revoked(path: &Path) -> Result<Vec<CertificateRevocationListDer<'static>>, Error> {
    if !path.exists() {
        return Ok(Vec::new());
    }
    let contents = contents(path)?;
    let read: Result<Vec<_>, _> = CertificateRevocationListDer::pem_slice_iter(&contents).collect();
    read.map_err(|source| Error::Pem {
        path: path.to_owned(),
        what: "revoked certificates",
        source,
    })
}

fn contents(path: &Path) -> Result<Vec<u8>, Error> {
    std::fs::read(path).map_err(|source| Error::Access {
        path: path.to_owned(),
        source,
    })
}

fn missing(path: PathBuf) -> Error {
    let source = io::Error::from_raw_os_error(libc::ENOENT);
    Error::Access { path, source }
}
