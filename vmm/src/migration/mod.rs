//! `[2]` Live migration: connect → precopy → `[3]` stop → switchover, and the incoming side.
//!
//! One thread carries an outgoing migration, one an incoming one. `connect.rs` makes the
//! connection, `stream/` is what goes over it, `precopy.rs` sends RAM while the guest runs,
//! `predict.rs` and `converge.rs` say when,
//! `stop.rs` stops the guest, `switchover.rs` hands it over by the rule in `commit.rs`;
//! `incoming.rs` and `receiver.rs` are the other side. `outgoing.rs` holds the source's whole way
//! together and puts the guest back when it fails. `board.rs` is what the threads write down for
//! `query-migrate`, `status.rs` its form.

mod board;
mod channel;
mod clock;
mod commit;
mod connect;
mod converge;
pub mod credentials;
pub mod descriptors;
mod flow;
#[cfg(fuzzing)]
pub mod fuzz;
mod incoming;
mod intake;
mod lanes;
mod link;
mod loaders;
mod oneway;
mod outgoing;
mod pace;
mod pages;
mod precopy;
pub mod predict;
mod receiver;
pub mod settings;
pub mod status;
mod stop;
mod stream;
mod switchover;
mod throttle;
mod timeout;
mod tls;
pub mod uri;
mod vm;
mod wire;
mod work;

#[cfg(test)]
mod tests;

use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};

use crate::machine::SharedMachine;
use crate::probes::Errno;
use crate::runstate::{EventSender, RunState};
use board::Board;
pub use channel::Patience;
pub use connect::Plaintext;
use connect::{Listener, Target};
use credentials::Endpoint;
use descriptors::Descriptors;
pub use outgoing::Parameters;
use settings::{Capability, Settings, Text};
use status::{MigrationStatus, QueryMigrate, Side};
use tls::Security;
use uri::{Incoming, Uri};
use vm::{MigrationVm, lock};

/// A migration could not be begun.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The URI is none of ours.
    #[error(transparent)]
    Uri(#[from] uri::Error),
    /// One is under way; QEMU's words.
    #[error("There's a migration process in progress")]
    Busy,
    /// `migrate-continue` at another time than the client thought; QEMU's words.
    #[error("Migration not in expected state: {}", .0.map_or("none", MigrationStatus::name))]
    NotInState(Option<MigrationStatus>),
    /// The machine waits for a guest of its own; QEMU's words.
    #[error("Guest is waiting for an incoming migration")]
    Inmigrate,
    /// The guest has been handed over; QEMU's words.
    #[error("Can't migrate the vm that was paused due to previous migration")]
    Postmigrate,
    /// The machine has a guest, or part of one that never arrived.
    #[error("a VM that is {} can't take in a migration: start one with '--incoming'", .0.name())]
    NotIncoming(RunState),
    /// Pages can only have places of their own in a file; QEMU's words.
    #[error("Migration requires seekable transport (e.g. file)")]
    NotSeekable,
    /// The address can't be listened on, or the client has no such descriptor.
    #[error(transparent)]
    Listen(#[from] connect::Error),
    /// There are no credentials to encrypt with.
    #[error(transparent)]
    Credentials(#[from] credentials::Error),
    /// They are of no use there.
    #[error(transparent)]
    Tls(#[from] tls::Error),
    /// Nobody here can say who may and who may not.
    #[error(
        "the parameter tls-authz names '{0}', but there are no such objects: whoever the CA in \
         ca-cert.pem vouches for may migrate, so unset it and use a CA for migrations only"
    )]
    Authz(String),
    /// The thread could not be started.
    #[error("the migration's thread")]
    Thread(#[source] io::Error),
}

impl Errno for Error {
    fn errno(&self) -> i32 {
        match self {
            Error::Uri(source) => source.errno(),
            Error::Busy => libc::EBUSY,
            Error::NotInState(_)
            | Error::Inmigrate
            | Error::Postmigrate
            | Error::NotSeekable
            | Error::NotIncoming(_) => libc::EINVAL,
            Error::Listen(source) => source.errno(),
            Error::Credentials(source) => source.errno(),
            Error::Tls(source) => source.errno(),
            Error::Authz(_) => libc::EACCES,
            Error::Thread(source) => source.errno(),
        }
    }
}

/// The migrations of one machine, one at a time. What QMP and the command line use.
///
/// Dropping it ends what is under way, as the end of the process does, and waits for the thread.
pub struct Migrations {
    machine: SharedMachine,
    parameters: Parameters,
    board: Arc<Board>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Migrations {
    /// No migration yet. `events` hears of each change of status.
    pub fn new(machine: SharedMachine, parameters: Parameters, events: EventSender) -> Self {
        let board = Arc::new(Board::new(events, Arc::default()));
        Migrations {
            machine,
            parameters,
            board,
            thread: Mutex::default(),
        }
    }

    /// Starts to migrate the guest to `uri`, and returns at once: how it goes on is in
    /// [`Migrations::query`].
    ///
    /// `fd:` is one of `descriptors`, which it is taken from.
    ///
    /// # Errors
    /// When it can't even be begun.
    pub fn start(&self, uri: &str, descriptors: &mut Descriptors) -> Result<(), Error> {
        let uri = Uri::outgoing(uri)?;
        self.check_seekable(&uri)?;
        match lock(&self.machine).run_state() {
            RunState::Inmigrate => return Err(Error::Inmigrate),
            RunState::Postmigrate => return Err(Error::Postmigrate),
            _ => {}
        }
        let size = self.machine.ram().size();
        if !self.board.begin(Side::Source, uri.to_string(), Some(size)) {
            return Err(Error::Busy);
        }
        let failed = |error: &Error| self.board.fail(status::describe(error));
        let security = self.security(&uri, Endpoint::Client).inspect_err(failed)?;
        let target = Target::new(uri, descriptors).map_err(Error::from);
        let target = target.inspect_err(failed)?.secured(security);
        let (machine, board) = (Arc::clone(&self.machine), Arc::clone(&self.board));
        let parameters = self.parameters;
        self.spawn(move || outgoing::run(&machine, target, &parameters, &board))
    }

    /// Listens on `uri` for a migration to take in, and returns at once. `defer` changes nothing:
    /// the machine goes on waiting for a call with an address. `fd:` is one of `descriptors`.
    ///
    /// # Errors
    /// When the machine is not waiting for a guest, or the address can't be listened on.
    pub fn incoming(&self, uri: &str, descriptors: &mut Descriptors) -> Result<(), Error> {
        let Incoming::Listen(uri) = Incoming::parse(uri)? else {
            return Ok(());
        };
        self.check_seekable(&uri)?;
        match lock(&self.machine).run_state() {
            RunState::Inmigrate => {}
            other => return Err(Error::NotIncoming(other)),
        }
        if !self.board.begin(Side::Destination, uri.to_string(), None) {
            return Err(Error::Busy);
        }
        let failed = |error: &Error| self.board.fail(status::describe(error));
        let security = self.security(&uri, Endpoint::Server).inspect_err(failed)?;
        let plaintext = match security {
            Some(_) => Plaintext::Allowed,
            None => self.parameters.plaintext,
        };
        let listener = Listener::bind(&uri, descriptors, plaintext).map_err(Error::from);
        let listener = listener.inspect_err(failed)?.secured(security);
        self.board.set_address(listener.address());
        let (machine, board) = (Arc::clone(&self.machine), Arc::clone(&self.board));
        let patience = self.parameters.patience;
        self.spawn(move || incoming::run(&machine, listener, &uri.to_string(), patience, &board))
    }

    /// Whether `uri` may be a file, if it is to be one.
    fn check_seekable(&self, uri: &Uri) -> Result<(), Error> {
        let may_be = matches!(uri, Uri::File { .. } | Uri::Fd(_));
        match self.settings().is_on(Capability::MappedRam) && !may_be {
            true => Err(Error::NotSeekable),
            false => Ok(()),
        }
    }

    /// How a migration to or from `uri` is encrypted, if it is to be.
    fn security(&self, uri: &Uri, endpoint: Endpoint) -> Result<Option<Security>, Error> {
        let settings = self.settings();
        let id = settings.text(Text::TlsCreds);
        let (host, tls) = match uri {
            Uri::Tcp { host, tls, .. } => (Some(host.clone()), *tls),
            _ => (None, false),
        };
        if id.is_empty() && !tls {
            return Ok(None);
        }
        let authz = settings.text(Text::TlsAuthz);
        if endpoint == Endpoint::Server && !authz.is_empty() {
            return Err(Error::Authz(authz));
        }
        let credentials = settings.keyring().find(&id, endpoint)?;
        let name = Some(settings.text(Text::TlsHostname)).filter(|name| !name.is_empty());
        let name = match endpoint {
            Endpoint::Client => name.or(host),
            Endpoint::Server => None,
        };
        Ok(Some(Security::new(credentials, name.as_deref())?))
    }

    /// Gives up the migration that is under way, unless the guest was handed over already. Returns
    /// at once; the status becomes `cancelled` when everything is as it was before.
    pub fn cancel(&self) {
        self.board.cancel();
    }

    /// What clients set.
    pub fn settings(&self) -> &Settings {
        self.board.settings()
    }

    /// Switches capabilities for the migrations to come.
    ///
    /// # Errors
    /// While one is under way.
    pub fn set_capabilities(&self, changes: &[(Capability, bool)]) -> Result<(), Error> {
        let switched = self
            .board
            .if_idle(|settings| settings.set_capabilities(changes));
        switched.ok_or(Error::Busy)
    }

    /// Lets a migration go on that waits in `state`.
    ///
    /// # Errors
    /// When it is not in that state.
    pub fn go_on(&self, state: MigrationStatus) -> Result<(), Error> {
        self.board.go_on(state).map_err(Error::NotInState)
    }

    /// The migration that is under way, or the last one. Answers also while the machine is stopped.
    pub fn query(&self) -> QueryMigrate {
        self.board.query()
    }

    fn spawn(&self, run: impl FnOnce() + Send + 'static) -> Result<(), Error> {
        let mut thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner);
        join(thread.take());
        let spawned = thread::Builder::new()
            .name("migration".to_owned())
            .spawn(run);
        let spawned = spawned.map_err(Error::Thread);
        *thread = Some(spawned.inspect_err(|error| self.board.fail(status::describe(error)))?);
        Ok(())
    }
}

impl Drop for Migrations {
    fn drop(&mut self) {
        self.board.abandon();
        join(
            self.thread
                .get_mut()
                .unwrap_or_else(PoisonError::into_inner)
                .take(),
        );
    }
}

fn join(thread: Option<JoinHandle<()>>) {
    // A thread that panicked has already said why on stderr.
    let _ = thread.map(JoinHandle::join);
}
