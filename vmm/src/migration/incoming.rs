//! A whole incoming migration, on its own thread: from the listener to the guest that runs here, or
//! never will.

use std::ffi::CString;
use std::io;

use super::board::{Board, Cancelled, Report};
use super::channel::{Channel, Patience};
use super::connect::{self, Listener};
use super::receiver::Receiver;
use super::status::{MigrationStatus, describe};
use super::stream;
use super::stream::header::Mismatch;
use super::stream::message::Token;
use super::tls;
use super::vm::TargetVm;
use crate::control;
use crate::devices::StateError;
use crate::memory;
use crate::probes::{self, Errno, Guarded};
use crate::spanlog::{SpanLog, SpanRecord, monotonic_ns};

/// An incoming migration failed. The guest has not run here and never will.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// There is no connection.
    #[error(transparent)]
    Connect(#[from] connect::Error),
    /// There is no encryption.
    #[error(transparent)]
    Tls(#[from] tls::Error),
    /// The socket can't be used, or there are no random numbers for the session's secret.
    #[error("setting up the session")]
    Session(#[source] io::Error),
    /// The stream.
    #[error(transparent)]
    Stream(#[from] stream::Error),
    /// The source waits for a destination that it can't hear.
    #[error(
        "the guest was sent over a connection that is answered: it can't come from a file, a pipe or a \
         command"
    )]
    NoWayBack,
    /// The source's guest does not fit this VM.
    #[error(transparent)]
    Mismatch(#[from] Mismatch),
    /// The source says that it has passed its RAM.
    #[error("the source shares its RAM, but no descriptor of it came")]
    NoRam,
    /// The pages that arrived are not those that were sent.
    #[error("guest RAM has checksum {here:#010x} here and {there:#010x} at the source")]
    Checksum {
        /// Of this side's RAM.
        here: u32,
        /// The source's.
        there: u32,
    },
    /// Guest RAM.
    #[error("guest RAM")]
    Memory(#[from] memory::Error),
    /// A device refused its state.
    #[error("loading the state of {name}")]
    LoadDevice {
        /// The device.
        name: String,
        /// Its error.
        source: StateError,
    },
    /// The guest is this side's and could not be started.
    #[error("starting the guest")]
    Start(#[from] control::Error),
    /// A person gave up.
    #[error(transparent)]
    Cancelled(#[from] Cancelled),
}

impl Errno for Error {
    fn errno(&self) -> i32 {
        match self {
            Error::Connect(source) => source.errno(),
            Error::Tls(source) => source.errno(),
            Error::Session(source) => source.errno(),
            Error::Stream(source) => source.errno(),
            Error::Mismatch(source) => source.errno(),
            Error::NoWayBack | Error::NoRam => libc::EPROTO,
            Error::Checksum { .. } => libc::EBADMSG,
            Error::Memory(source) => source.errno(),
            Error::LoadDevice { source, .. } => source.errno(),
            Error::Start(source) => source.errno(),
            Error::Cancelled(_) => libc::ECANCELED,
        }
    }
}

/// Waits for the source on `listener`, takes the guest in, and writes the outcome to `board`.
pub(super) fn run(
    vm: &impl TargetVm,
    listener: Listener,
    uri: &str,
    patience: Patience,
    board: &Board,
) {
    let security = listener.security();
    let accepted = listener.accept(board).map_err(Error::from);
    let log = SpanLog::open();
    let mut report = Report::default();
    let result = accepted.and_then(|wire| {
        let wire = match security {
            Some(security) => wire.encrypt(&security, uri, patience.silence)?,
            None => wire,
        };
        let channel = Channel::new(wire, patience).map_err(Error::Session)?;
        take_in(vm, channel, uri, board, &log, &mut report)
    });
    let (status, error) = match &result {
        Ok(()) => (MigrationStatus::Completed, None),
        Err(_) if board.is_cancelled() => (MigrationStatus::Cancelled, None),
        Err(error) => (MigrationStatus::Failed, Some(describe(error))),
    };
    report.spans = log.finish();
    board.finish(status, error, report);
}

/// The migration itself, from the accepted connection, inside its span.
fn take_in(
    vm: &impl TargetVm,
    channel: Channel,
    uri: &str,
    board: &Board,
    log: &SpanLog,
    report: &mut Report,
) -> Result<(), Error> {
    let text = CString::new(uri).unwrap_or_default();
    probes::migrate_incoming(&text).run(|span| {
        let mut token = Token::default();
        getrandom::fill(&mut token).map_err(|e| Error::Session(e.into()))?;
        let mut receiver = Receiver::new(vm, channel, token);
        let result = receiver.run(board, log);
        let (id, first_run_ns) = (receiver.id(), receiver.first_run_ns());
        (report.id, report.first_run_ns) = (id, first_run_ns);
        (span.id, span.status) = (id, c"completed");
        if let Err(error) = &result {
            span.status = c"failed";
            receiver.give_up(describe(error), finished(log));
        }
        result
    })
}

/// The spans so far, as a message shows them: what is still open has lasted until now.
pub(super) fn finished(log: &SpanLog) -> Vec<SpanRecord> {
    let now = monotonic_ns();
    let mut spans = log.spans();
    for span in spans
        .iter_mut()
        .filter(|s| s.rc == probes::UNFINISHED && s.duration_ns == 0)
    {
        span.duration_ns = now.saturating_sub(span.start_ns);
        span.rc = 0;
    }
    spans
}
