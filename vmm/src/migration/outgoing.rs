//! A whole outgoing migration, on its own thread: from the URI to a final status, with the guest on
//! exactly one side.

use std::ffi::CString;
use std::io;

use super::board::{Board, Cancelled, Report};
use super::channel::Patience;
use super::clock::Clock;
use super::commit::{Source, SourceEvent};
use super::connect::{self, Plaintext, Target};
use super::lanes::{LaneError, MAX_LANES};
use super::link::Link;
use super::oneway::{FinishError, OneWay};
use super::pages::{Pages, SendError};
use super::precopy;
use super::predict::{Forecast, Sent};
use super::settings::{Capability, Mode, Parameter};
use super::status::{MigrationStatus, describe};
use super::stop::Stop;
use super::stream;
use super::stream::header::Shape;
use super::stream::mapped::{self, place_behind};
use super::stream::message::Token;
use super::tls;
use super::vm::SourceVm;
use crate::control;
use crate::costs::Costs;
use crate::devices::StateError;
use crate::memory;
use crate::probes::{self, Errno, Guarded};
use crate::runstate::RunState;
use crate::spanlog::{SpanLog, SpanRecord};

/// Ids are random, and small enough for the numbers of JSON, which are exact up to 2^53.
const ID_MASK: u64 = (1 << 53) - 1;

/// How to migrate.
#[derive(Clone, Copy, Debug)]
pub struct Parameters {
    /// Whether to compare a checksum of all RAM at the switchover. It adds to the downtime what
    /// reading all RAM takes, on both sides: for tests.
    pub verify_ram: bool,
    /// When the other side is given up.
    pub patience: Patience,
    /// Whether TCP may leave the host.
    pub plaintext: Plaintext,
}

impl Default for Parameters {
    /// No checksum, and no TCP to other hosts.
    fn default() -> Self {
        Parameters {
            verify_ram: false,
            patience: Patience::default(),
            plaintext: Plaintext::default(),
        }
    }
}

/// An outgoing migration failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// There is no connection.
    #[error(transparent)]
    Connect(#[from] connect::Error),
    /// There is no encryption.
    #[error(transparent)]
    Tls(#[from] tls::Error),
    /// RAM can't be passed there.
    #[error(
        "mode cpr-transfer passes guest RAM to a process of this host: it needs a unix socket, and no \
         tls-creds"
    )]
    NotPassing,
    /// There is no file in which pages could have places of their own.
    #[error("mapped-ram needs a file that can be written to at any place: '{0}' leads to none")]
    NotSeekable(String),
    /// The RAM in that file.
    #[error(transparent)]
    Mapped(#[from] mapped::Error),
    /// There can be but one connection.
    #[error("multifd needs an address that can be connected to again: tcp:, tls: or unix:")]
    NoLanes,
    /// There can't be as many.
    #[error("multifd-channels is {0}, but there are {MAX_LANES} at most")]
    TooManyLanes(u64),
    /// A connection for pages.
    #[error(transparent)]
    Lane(#[from] LaneError),
    /// No random numbers for the id and the session's secret.
    #[error("random numbers for the session")]
    Random(#[source] io::Error),
    /// The stream.
    #[error(transparent)]
    Stream(#[from] stream::Error),
    /// Guest RAM or its dirty log.
    #[error("guest RAM")]
    Memory(#[from] memory::Error),
    /// The guest would not fit the downtime limit.
    #[error(
        "the guest does not converge: after {rounds} rounds {} KiB are dirty still, the destination \
         loads {} KiB/s, and the downtime limit is {limit_ms} ms", dirtied >> 10, rate >> 10
    )]
    NotConverging {
        /// Rounds sent.
        rounds: u32,
        /// Bytes dirtied during the last one.
        dirtied: u64,
        /// Bytes a second that the destination loads.
        rate: u64,
        /// The limit.
        limit_ms: u64,
    },
    /// Stopping the guest and starting it again takes longer than the downtime limit, whatever is left of
    /// its RAM.
    #[error(
        "the downtime limit of {limit_ms} ms is too low for this guest: stopping it, saving and loading \
         its devices and starting it again takes at least {} ms, without a page of RAM: set downtime-limit \
         to {} or more, and to what the RAM takes besides",
        .fixed_ns.div_ceil(1_000_000),
        .fixed_ns.saturating_add(.fixed_ns / 5).div_ceil(1_000_000)
    )]
    LimitTooLow {
        /// What all but the RAM takes at least.
        fixed_ns: u64,
        /// The limit.
        limit_ms: u64,
    },
    /// The stop failed.
    #[error("stopping the guest")]
    Stop(#[from] control::Error),
    /// A device could not be saved.
    #[error("saving the state of {name}")]
    SaveDevice {
        /// The device.
        name: String,
        /// Its error.
        source: StateError,
    },
    /// The machine left the state of a switchover by itself.
    #[error("the VM became {} during the switchover", .0.name())]
    Interrupted(RunState),
    /// All was sent, but it is not certain that it was taken.
    #[error(transparent)]
    Finish(#[from] FinishError),
    /// A person gave up.
    #[error(transparent)]
    Cancelled(#[from] Cancelled),
    /// The migration failed, and then the guest could not be started again.
    #[error("{because}; and the guest, which is paused now, could not go on")]
    Resume {
        /// Why the migration failed.
        because: String,
        /// Why the guest could not.
        source: control::Error,
    },
}

impl From<SendError> for Error {
    fn from(error: SendError) -> Self {
        match error {
            SendError::Stream(source) => source.into(),
            SendError::Memory(source) => source.into(),
            SendError::Lane(source) => source.into(),
            SendError::Mapped(source) => source.into(),
            SendError::Cancelled(cancelled) => cancelled.into(),
        }
    }
}

impl Errno for Error {
    fn errno(&self) -> i32 {
        match self {
            Error::Connect(source) => source.errno(),
            Error::Tls(source) => source.errno(),
            Error::NotSeekable(_) => libc::ESPIPE,
            Error::Mapped(source) => source.errno(),
            Error::NotPassing | Error::NoLanes | Error::TooManyLanes(_) => libc::EINVAL,
            Error::Lane(source) => source.errno(),
            Error::Random(source) => source.errno(),
            Error::Stream(source) => source.errno(),
            Error::Memory(source) => source.errno(),
            Error::NotConverging { .. } | Error::LimitTooLow { .. } => libc::ETIME,
            Error::Stop(source) => source.errno(),
            Error::SaveDevice { source, .. } => source.errno(),
            Error::Interrupted(_) => libc::EINTR,
            Error::Finish(source) => source.errno(),
            Error::Cancelled(_) => libc::ECANCELED,
            Error::Resume { source, .. } => source.errno(),
        }
    }
}

/// What one attempt to migrate has come to.
pub(super) struct Attempt {
    /// Who has the guest.
    pub(super) commit: Source,
    /// What the stop noted.
    pub(super) stop: Stop,
    /// What was expected of it, right before it.
    pub(super) forecast: Option<Forecast>,
    /// Bytes of the pages that were sent after the stop.
    pub(super) ram_bytes: Option<u64>,
    /// The devices in machine order.
    pub(super) devices: Vec<CString>,
    /// The first `KVM_RUN` on the destination, on its clock.
    pub(super) first_run_ns: Option<u64>,
    /// What the destination did, on its clock.
    pub(super) peer_spans: Vec<SpanRecord>,
}

impl Attempt {
    fn new(id: u64, shape: &Shape) -> Self {
        Attempt {
            commit: Source::Live,
            stop: Stop::new(id),
            forecast: None,
            ram_bytes: None,
            devices: shape.device_names(),
            first_run_ns: None,
            peer_spans: Vec::new(),
        }
    }

    /// The migration's id.
    pub(super) fn id(&self) -> u64 {
        self.stop.id
    }

    /// The downtime, ns, when it is over.
    pub(super) fn downtime_ns(&self, clock: &Clock) -> Option<u64> {
        let start_ns = self.stop.downtime_start_ns?;
        let end_ns = clock.at(start_ns)?.to_source(self.first_run_ns?);
        u64::try_from(end_ns).ok()?.checked_sub(start_ns)
    }
}

/// Migrates the guest to `target` and writes the outcome to `board`.
pub(super) fn run(vm: &impl SourceVm, target: Target, parameters: &Parameters, board: &Board) {
    let log = SpanLog::open();
    let secrets = secrets();
    let id = secrets.as_ref().map_or(0, |&(id, _)| id);
    let shape = vm.shape();
    let mut attempt = Attempt::new(id, &shape);
    let mut clock = Clock::default();

    let text = CString::new(target.uri.to_string()).unwrap_or_default();
    let mut span = probes::migrate(id, &text, board.mode().c_name());
    let migrated = secrets.and_then(|(id, token)| {
        let mut link = migration_connect(vm, target, id, token, &shape, parameters, board)?;
        let migrated = precopy::migration_thread(vm, &mut link, &mut attempt, parameters, board);
        clock = link.clock().clone();
        let concluded = conclude(vm, &mut attempt, migrated, board);
        learn(vm, &attempt, &clock, &log.spans());
        match &concluded {
            Ok(()) => link.farewell(vm.costs()),
            Err(error) => link.give_up(describe(error)),
        }
        concluded
    });
    let (status, error) = outcome(&attempt, &migrated, board);
    span.status = status.c_name();
    span.set_rc(
        migrated
            .as_ref()
            .map_or_else(|error| -i64::from(error.errno()), |()| 0),
    );
    drop(span);

    let report = Report {
        id,
        spans: log.finish(),
        peer_spans: attempt.peer_spans,
        clock,
        downtime_start_ns: attempt.stop.downtime_start_ns,
        first_run_ns: attempt.first_run_ns,
        forecast: attempt.forecast,
    };
    board.finish(status, error, report);
}

/// `[2]` Connects and agrees with the destination on the guest.
fn migration_connect(
    vm: &impl SourceVm,
    target: Target,
    id: u64,
    token: Token,
    shape: &Shape,
    parameters: &Parameters,
    board: &Board,
) -> Result<Link, Error> {
    let text = CString::new(target.uri.to_string()).unwrap_or_default();
    probes::migration_connect(&text).run(|_| {
        let (security, uri) = (target.security.clone(), target.uri.to_string());
        let plaintext = match security {
            Some(_) => Plaintext::Allowed,
            None => parameters.plaintext,
        };
        let patience = parameters.patience;
        let again = target.again();
        let dial = |target| {
            let wire = connect::dial(target, plaintext, board)?;
            Ok::<_, Error>(match &security {
                Some(security) => wire.encrypt(security, &uri, patience.silence)?,
                None => wire,
            })
        };
        let wire = dial(target)?;
        let shared = board.mode() == Mode::CprTransfer;
        if shared && !wire.passes() {
            return Err(Error::NotPassing);
        }
        let ram = vm.ram();
        let (multifd, mapped) = (Capability::Multifd, Capability::MappedRam);
        let (pages, lanes) = if shared {
            (Pages::Passed(ram.share()?), 0)
        } else if board.settings().is_on(mapped) {
            let start = wire.one_way().and_then(OneWay::start);
            let start = start.ok_or_else(|| Error::NotSeekable(uri.clone()))?;
            (Pages::Mapped(place_behind(start)), 0)
        } else if board.settings().is_on(multifd) {
            let lanes = lanes(board)?;
            again.as_ref().ok_or(Error::NoLanes)?;
            (Pages::Sent(lanes), lanes)
        } else {
            (Pages::Sent(0), 0)
        };
        let mut link = Link::open(wire.clone(), id, token, shape, (&ram, pages), patience)?;
        let opened = again.map_or(Ok(()), |again| {
            for _ in 0..lanes {
                link.add_lane(dial(again.again().ok_or(Error::NoLanes)?)?, patience)?;
            }
            board.attach(wire)?;
            Ok(link.meet_clock()?)
        });
        match opened {
            Ok(()) => Ok(link),
            Err(error) => {
                link.give_up(describe(&error));
                Err(error)
            }
        }
    })
}

/// How many connections for pages there are to be.
fn lanes(board: &Board) -> Result<u8, Error> {
    let wanted = board.settings().parameter(Parameter::MultifdChannels);
    let lanes = u8::try_from(wanted)
        .ok()
        .filter(|&lanes| lanes <= MAX_LANES);
    lanes.ok_or(Error::TooManyLanes(wanted))
}

/// Puts the guest where the commit rule says that it belongs.
fn conclude(
    vm: &impl SourceVm,
    attempt: &mut Attempt,
    migrated: Result<(), Error>,
    board: &Board,
) -> Result<(), Error> {
    match &migrated {
        Ok(()) => {}
        Err(Error::Stream(stream::Error::Peer { spans, .. })) => {
            attempt.commit = attempt.commit.on(SourceEvent::Refused);
            attempt.peer_spans.clone_from(spans);
        }
        Err(_) => attempt.commit = attempt.commit.on(SourceEvent::Fail),
    }
    vm.cpu_throttle_set(0);
    board.set_cpu_throttle(0);
    let shared = board.mode() == Mode::CprTransfer;
    let concluded = match (attempt.commit, attempt.stop.vm_old_state) {
        (Source::Resumed, Some(old)) => match (vm.resume(old), migrated) {
            (Err(source), Err(error)) => Err(Error::Resume {
                because: describe(&error),
                source,
            }),
            (_, migrated) => migrated,
        },
        (Source::Completed | Source::Unknown, _) => {
            vm.postmigrate(shared && attempt.commit == Source::Completed);
            migrated
        }
        _ => migrated,
    };
    if let Err(error) = vm.set_dirty_log(false) {
        // It costs the guest some speed and nothing else.
        tracing::warn!("the dirty log stays on: {}", describe(&error));
    }
    concluded
}

/// Notes what the stop took, if there was one, for the next one: here, if the migration failed.
fn learn(vm: &impl SourceVm, attempt: &Attempt, clock: &Clock, spans: &[SpanRecord]) {
    let measured = Costs::measured(spans);
    let ram = attempt.ram_bytes.zip(Forecast::ram_span_ns(spans));
    let ram = ram.map(|(bytes, ns)| Sent { bytes, ns });
    match &attempt.forecast {
        Some(forecast) => vm.learn(&forecast.learned(measured, ram, attempt.downtime_ns(clock))),
        None => vm.learn(&measured),
    }
}

fn outcome(
    attempt: &Attempt,
    migrated: &Result<(), Error>,
    board: &Board,
) -> (MigrationStatus, Option<String>) {
    match migrated {
        Ok(()) => (MigrationStatus::Completed, None),
        Err(error) if attempt.commit == Source::Unknown => {
            let unknown = format!(
                "{}; it is unknown whether the destination runs the guest, which stays paused here: \
                 use 'cont' only if it does not",
                describe(error)
            );
            (MigrationStatus::Unknown, Some(unknown))
        }
        Err(_) if board.is_cancelled() => match board.expired() {
            None => (MigrationStatus::Cancelled, None),
            Some(seconds) => {
                let reason = format!(
                    "the guest could not be stopped within migration-timeout, {seconds} s: raise it or \
                     downtime-limit, switch auto-converge on, or set timeout-action to 'force'"
                );
                (MigrationStatus::Failed, Some(reason))
            }
        },
        Err(error) => (MigrationStatus::Failed, Some(describe(error))),
    }
}

/// An id and a secret for a new session.
fn secrets() -> Result<(u64, Token), Error> {
    let random = |source: getrandom::Error| Error::Random(source.into());
    let id = getrandom::u64().map_err(random)? & ID_MASK;
    let mut token = Token::default();
    getrandom::fill(&mut token).map_err(random)?;
    Ok((id, token))
}
