//! A whole incoming migration, on its own thread: from the listener to the guest that runs here, or
//! never will.

use std::ffi::CString;
use std::io;
use std::time::{Duration, Instant};

use super::board::{Board, Cancelled, Report};
use super::channel::{Channel, Patience};
use super::connect::{self, Listener};
use super::intake::{self, Intake};
use super::lanes::MAX_LANES;
use super::receiver::Receiver;
use super::status::{MigrationStatus, describe};
use super::stream;
use super::stream::header::Mismatch;
use super::stream::mapped;
use super::stream::message::{Join, Token};
use super::tls;
use super::vm::TargetVm;
use super::wire::Wire;
use crate::control;
use crate::devices::StateError;
use crate::memory::{self, GuestRam};
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
    /// The source has more connections for pages than this side has memory for their buffers.
    #[error("the source wants {0} connections for pages, but there are {MAX_LANES} at most")]
    TooManyLanes(u8),
    /// Connections for pages did not come.
    #[error("{0} of the source's connections for pages did not come")]
    MissingLanes(u8),
    /// A connection for pages.
    #[error(transparent)]
    Intake(#[from] intake::Error),
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
    /// The source had a file.
    #[error(
        "the guest was saved with mapped-ram: it can only be taken in from a file, by 'file:' or 'fd:'"
    )]
    NotSeekable(#[source] io::Error),
    /// The RAM in that file.
    #[error(transparent)]
    Mapped(#[from] mapped::Error),
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
            Error::TooManyLanes(_) => libc::EUSERS,
            Error::MissingLanes(_) => libc::ETIMEDOUT,
            Error::Intake(source) => source.errno(),
            Error::Mismatch(source) => source.errno(),
            Error::NoWayBack | Error::NoRam => libc::EPROTO,
            Error::Checksum { .. } => libc::EBADMSG,
            Error::NotSeekable(source) => source.errno(),
            Error::Mapped(source) => source.errno(),
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
        let channel = Channel::new(wire.clone(), patience).map_err(Error::Session)?;
        let door = Door {
            wire,
            listener,
            uri,
            patience,
        };
        take_in(vm, channel, door, board, &log, &mut report)
    });
    let (status, error) = match &result {
        Ok(()) => (MigrationStatus::Completed, None),
        Err(_) if board.is_cancelled() => (MigrationStatus::Cancelled, None),
        Err(error) => (MigrationStatus::Failed, Some(describe(error))),
    };
    report.spans = log.finish();
    board.finish(status, error, report);
}

/// Where further connections of the same source come in.
pub(super) struct Door<'a> {
    /// The first one, which a cancel interrupts again once all are there.
    wire: Wire,
    listener: Listener,
    uri: &'a str,
    patience: Patience,
}

/// How long whoever connects may take to say who it is: others may wait behind it.
const JOIN: Duration = Duration::from_secs(5);
/// How often who waits for a connection looks whether the source is there still.
const LOOK: Duration = Duration::from_millis(100);

impl Door<'_> {
    /// How long the source may be silent.
    pub(super) fn patience(&self) -> Patience {
        self.patience
    }

    /// Waits for the source's further connections, which echo `token`. Whoever else connects is sent
    /// away. None come any more when the first connection has ended: what came last on it says why.
    ///
    /// # Errors
    /// When they don't come in time.
    pub(super) fn accept(
        self,
        lanes: u8,
        token: Token,
        ram: GuestRam,
        board: &Board,
    ) -> Result<Option<Intake>, Error> {
        let mut intake = Intake::new(ram);
        let until = Instant::now() + self.patience.silence;
        let mut lane = 0;
        while lane < lanes {
            let Some(wire) = self.listener.accept_again(LOOK, board)? else {
                if self.wire.is_broken() {
                    return Ok(None);
                }
                if Instant::now() > until {
                    return Err(Error::MissingLanes(lanes - lane));
                }
                continue;
            };
            match self.join(wire, lane, token) {
                Ok((wire, channel)) => intake.add(wire, channel).map_err(Error::Session)?,
                Err(error) => {
                    tracing::warn!("a connection for pages: {}", describe(&error));
                    continue;
                }
            }
            lane += 1;
        }
        board.attach(self.wire)?;
        Ok(Some(intake))
    }

    /// Hears who has connected.
    fn join(&self, wire: Wire, lane: u8, token: Token) -> Result<(Wire, Channel), Error> {
        let silence = self.patience.silence.min(JOIN);
        let wire = match self.listener.security() {
            Some(security) => wire.encrypt(&security, self.uri, silence)?,
            None => wire,
        };
        let patience = Patience {
            silence,
            ..self.patience
        };
        let mut channel = Channel::new(wire.clone(), patience).map_err(Error::Session)?;
        channel.receive_preface()?;
        let frame = channel.receive()?;
        let join: Join = frame.decode("a connection for pages")?;
        if (join.token, join.lane) != (token, lane) {
            let problem = "it is of another session".to_owned();
            return Err(frame.malformed(problem).into());
        }
        channel.send_preface()?;
        // The first connection watches whether the source is there; this one may have nothing to do.
        wire.set_patience(self.patience.silence)
            .and_then(|()| wire.read_forever())
            .map_err(Error::Session)?;
        Ok((wire, channel))
    }
}

/// The migration itself, from the accepted connection, inside its span.
fn take_in(
    vm: &impl TargetVm,
    channel: Channel,
    door: Door<'_>,
    board: &Board,
    log: &SpanLog,
    report: &mut Report,
) -> Result<(), Error> {
    let text = CString::new(door.uri).unwrap_or_default();
    probes::migrate_incoming(&text).run(|span| {
        let mut token = Token::default();
        getrandom::fill(&mut token).map_err(|e| Error::Session(e.into()))?;
        let mut receiver = Receiver::new(vm, channel, token);
        let result = receiver.run(door, board, log);
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
