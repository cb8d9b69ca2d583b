//! Where the running migration is written down: what `query-migrate` reads, and how `migrate_cancel`
//! reaches the migration's thread.
//!
//! It has a lock of its own, held for no longer than a copy takes, so that it answers while the
//! machine is stopped and its lock taken.

#[cfg(test)]
mod tests;

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::clock::Clock;
use super::predict::Forecast;
use super::settings::{Capability, Mode, Parameter, Settings, TimeoutAction};
use super::status::{
    Blackout, ClockReport, MigrationStatus, QueryMigrate, Ram, Side, SocketAddress, Span,
};
use super::wire::Wire;
use crate::costs::Costs;
use crate::runstate::{Event, EventSender};
use crate::spanlog::{SpanRecord, monotonic_ns};

/// The last migration, under way or over, and the handle on it.
#[derive(Debug)]
pub(super) struct Board {
    state: Mutex<State>,
    /// Told when somebody who waits in `pre-switchover` is to look again.
    changed: Condvar,
    events: EventSender,
    settings: Arc<Settings>,
}

#[derive(Debug, Default)]
struct State {
    migration: Option<Migration>,
    /// Someone asked for an end.
    cancelled: bool,
    /// It was for the reason that it took longer than it may, s.
    expired: Option<u64>,
    /// `migrate-continue` was said.
    goes_on: bool,
    /// It is too late to cancel.
    sealed: bool,
    /// Interrupted to wake the migration's thread.
    wire: Option<Wire>,
}

#[derive(Clone, Debug)]
struct Migration {
    side: Side,
    mode: Mode,
    uri: String,
    status: MigrationStatus,
    started_ns: u64,
    setup_ns: Option<u64>,
    ended_ns: Option<u64>,
    expected_downtime_ns: Option<u64>,
    cpu_throttle: Option<u8>,
    ram: Option<Ram>,
    address: Option<SocketAddress>,
    error: Option<String>,
    blackout: Option<Blackout>,
}

/// What a migration leaves behind.
#[derive(Debug, Default)]
pub(super) struct Report {
    /// Its id, once both sides had one.
    pub(super) id: u64,
    /// This side's spans.
    pub(super) spans: Vec<SpanRecord>,
    /// The other side's spans, on its own clock.
    pub(super) peer_spans: Vec<SpanRecord>,
    /// The other side's clock.
    pub(super) clock: Clock,
    /// Entry of `migration_stop_vm`, ns of this side's clock.
    pub(super) downtime_start_ns: Option<u64>,
    /// The first `KVM_RUN` on the destination, ns of the destination's clock.
    pub(super) first_run_ns: Option<u64>,
    /// What the source expected of the stop.
    pub(super) forecast: Option<Forecast>,
}

/// A person gave the migration up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("cancelled")]
pub struct Cancelled;

impl Board {
    /// An empty one; `events` hears of every change of status, if the settings say so.
    pub(super) fn new(events: EventSender, settings: Arc<Settings>) -> Self {
        Board {
            state: Mutex::default(),
            changed: Condvar::new(),
            events,
            settings,
        }
    }

    /// What clients set.
    pub(super) fn settings(&self) -> &Settings {
        &self.settings
    }

    /// Calls `change` unless a migration is under way.
    pub(super) fn if_idle<T>(&self, change: impl FnOnce(&Settings) -> T) -> Option<T> {
        let state = self.lock();
        let idle = state.migration.as_ref().is_none_or(|m| m.status.is_final());
        idle.then(|| change(&self.settings))
    }

    fn announce(&self, status: MigrationStatus) {
        if self.settings.is_on(Capability::Events) {
            self.events.send(Event::Migration(status.name()));
        }
    }

    /// Writes down a new migration in place of the last one. `false` when that is not over yet.
    pub(super) fn begin(&self, side: Side, uri: String, total_ram: Option<u64>) -> bool {
        let mut state = self.lock();
        if state
            .migration
            .as_ref()
            .is_some_and(|m| !m.status.is_final())
        {
            return false;
        }
        let mode = match side {
            Side::Source => self.settings.mode(),
            // The source will say it.
            Side::Destination => Mode::Normal,
        };
        let migration = Migration {
            side,
            mode,
            uri,
            status: MigrationStatus::Setup,
            started_ns: monotonic_ns(),
            setup_ns: None,
            ended_ns: None,
            expected_downtime_ns: None,
            cpu_throttle: None,
            ram: total_ram.map(Ram::new),
            address: None,
            error: None,
            blackout: None,
        };
        *state = State {
            migration: Some(migration),
            ..State::default()
        };
        self.announce(MigrationStatus::Setup);
        true
    }

    /// Hands over what [`Board::cancel`] interrupts.
    ///
    /// # Errors
    /// When the migration was cancelled before.
    pub(super) fn attach(&self, wire: Wire) -> Result<(), Cancelled> {
        let mut state = self.lock();
        if state.cancelled {
            return Err(Cancelled);
        }
        state.wire = Some(wire);
        Ok(())
    }

    /// Gives the migration up, unless it is past the point of no return. Its thread notices at the
    /// next byte it reads or writes.
    pub(super) fn cancel(&self) {
        self.cancel_locked(&mut self.lock());
    }

    /// Gives it up if it has taken longer than it may and that is what is to be done then. Returns whether
    /// it is cancelled, be it for this reason or another.
    pub(super) fn expire(&self) -> bool {
        let mut state = self.lock();
        let action = self.settings.timeout_action();
        let overdue = self
            .overdue(&state)
            .filter(|_| action == TimeoutAction::Cancel);
        if overdue.is_some() && !state.cancelled {
            state.expired = overdue;
            self.cancel_locked(&mut state);
        }
        state.cancelled
    }

    /// How long it was allowed to take, s, if it was given up because it took longer.
    pub(super) fn expired(&self) -> Option<u64> {
        self.lock().expired
    }

    /// Whether the guest is to be stopped now, since it has taken too long.
    pub(super) fn is_forced(&self) -> bool {
        let action = self.settings.timeout_action();
        action == TimeoutAction::Force && self.overdue(&self.lock()).is_some()
    }

    /// How long the migration may take, s, if it has taken longer.
    fn overdue(&self, state: &State) -> Option<u64> {
        let timeout = self.settings.parameter(Parameter::MigrationTimeout);
        let started_ns = state.migration.as_ref()?.started_ns;
        let took = Duration::from_nanos(monotonic_ns().saturating_sub(started_ns));
        (timeout > 0 && took >= Duration::from_secs(timeout)).then_some(timeout)
    }

    fn cancel_locked(&self, state: &mut State) {
        let Some(migration) = state.migration.as_mut() else {
            return;
        };
        if migration.status.is_final() || state.sealed || state.cancelled {
            return;
        }
        let migration = state.migration.as_mut();
        if let Some(migration) = migration.filter(|m| m.side == Side::Source) {
            migration.status = MigrationStatus::Cancelling;
            self.announce(MigrationStatus::Cancelling);
        }
        state.cancelled = true;
        self.changed.notify_all();
        if let Some(wire) = &state.wire {
            wire.interrupt();
        }
    }

    /// The process is about to end, whoever has the guest: what the migration's thread still waits
    /// for on the connection fails, also past the point of no return. The other side can't tell it
    /// from the end of the process.
    pub(super) fn abandon(&self) {
        self.cancel();
        if let Some(wire) = &self.lock().wire {
            wire.interrupt();
        }
    }

    /// Whether the migration was cancelled.
    pub(super) fn is_cancelled(&self) -> bool {
        self.lock().cancelled
    }

    /// Passes the point of no return: from here on nobody can cancel.
    ///
    /// # Errors
    /// When someone has.
    pub(super) fn seal(&self) -> Result<(), Cancelled> {
        let mut state = self.lock();
        if state.cancelled {
            return Err(Cancelled);
        }
        state.sealed = true;
        Ok(())
    }

    /// Changes the status of a migration that is not being cancelled.
    pub(super) fn set_status(&self, status: MigrationStatus) {
        let mut state = self.lock();
        if state.cancelled {
            return;
        }
        if let Some(migration) = state.migration.as_mut() {
            migration.status = status;
            if status == MigrationStatus::Active {
                migration.setup_ns = Some(monotonic_ns().saturating_sub(migration.started_ns));
            }
            self.announce(status);
        }
    }

    /// Lets a migration go on that waits in `state`, the one state in which one does.
    ///
    /// # Errors
    /// When it is in another, which is returned.
    pub(super) fn go_on(&self, expected: MigrationStatus) -> Result<(), Option<MigrationStatus>> {
        let mut state = self.lock();
        let status = state.migration.as_ref().map(|m| m.status);
        if status != Some(expected) {
            return Err(status);
        }
        state.goes_on |= expected == MigrationStatus::PreSwitchover;
        self.changed.notify_all();
        Ok(())
    }

    /// Waits until the migration is to go on, for no longer than `limit`. Returns whether it is.
    ///
    /// # Errors
    /// When it was cancelled.
    pub(super) fn wait_go_on(&self, limit: Duration) -> Result<bool, Cancelled> {
        let waits = |state: &mut State| !state.goes_on && !state.cancelled;
        let (state, _) = self
            .changed
            .wait_timeout_while(self.lock(), limit, waits)
            .unwrap_or_else(PoisonError::into_inner);
        if state.cancelled {
            return Err(Cancelled);
        }
        Ok(state.goes_on)
    }

    /// Lets the migration's thread rest for `time`.
    ///
    /// # Errors
    /// At once when the migration is cancelled.
    pub(super) fn sleep(&self, time: Duration) -> Result<(), Cancelled> {
        let (state, _) = self
            .changed
            .wait_timeout_while(self.lock(), time, |state| !state.cancelled)
            .unwrap_or_else(PoisonError::into_inner);
        match state.cancelled {
            true => Err(Cancelled),
            false => Ok(()),
        }
    }

    /// Lets the events go that the stop held back.
    pub(super) fn release_events(&self) {
        self.events.release();
    }

    /// How the migration that is under way is done.
    pub(super) fn mode(&self) -> Mode {
        let state = self.lock();
        state.migration.as_ref().map_or(Mode::Normal, |m| m.mode)
    }

    /// The source has said how.
    pub(super) fn set_mode(&self, mode: Mode) {
        if let Some(migration) = self.lock().migration.as_mut() {
            migration.mode = mode;
        }
    }

    /// Changes the figures on RAM.
    pub(super) fn update_ram(&self, update: impl FnOnce(&mut Ram)) {
        if let Some(ram) = self.lock().migration.as_mut().and_then(|m| m.ram.as_mut()) {
            update(ram);
        }
    }

    /// Says what stopping now would cost.
    pub(super) fn set_expected_downtime(&self, ns: Option<u64>) {
        if let Some(migration) = self.lock().migration.as_mut() {
            migration.expected_downtime_ns = ns;
        }
    }

    /// By how much the guest is slowed down; 0 is not at all any more.
    pub(super) fn set_cpu_throttle(&self, percentage: u8) {
        if let Some(migration) = self.lock().migration.as_mut() {
            migration.cpu_throttle = Some(percentage).filter(|&percentage| percentage > 0);
        }
    }

    /// Says where this side listens.
    pub(super) fn set_address(&self, address: Option<SocketAddress>) {
        if let Some(migration) = self.lock().migration.as_mut() {
            migration.address = address;
        }
    }

    /// The migration is over: `status` is final. Keeps the breakdown until the next one.
    pub(super) fn finish(&self, status: MigrationStatus, error: Option<String>, report: Report) {
        let mut state = self.lock();
        state.wire = None;
        if let Some(migration) = state.migration.as_mut() {
            migration.ended_ns = Some(monotonic_ns());
            migration.blackout = Some(migration.blackout(report));
            migration.error = error;
            migration.address = None;
            migration.status = status;
            self.announce(status);
        }
        // What a stop held back must not wait for the next event.
        self.events.release();
    }

    /// The migration failed before its thread ran.
    pub(super) fn fail(&self, error: String) {
        self.finish(MigrationStatus::Failed, Some(error), Report::default());
    }

    /// The answer to `query-migrate`.
    pub(super) fn query(&self) -> QueryMigrate {
        self.lock()
            .migration
            .as_ref()
            .map(Migration::query)
            .unwrap_or_default()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Migration {
    fn query(&self) -> QueryMigrate {
        let now = self.ended_ns.unwrap_or_else(monotonic_ns);
        let downtime_ns = self.blackout.as_ref().and_then(|b| b.downtime_ns);
        QueryMigrate {
            status: Some(self.status),
            total_time: Some(to_ms(now.saturating_sub(self.started_ns))),
            setup_time: self.setup_ns.map(to_ms),
            expected_downtime: self.expected_downtime_ns.map(to_ms),
            cpu_throttle_percentage: self.cpu_throttle,
            downtime: downtime_ns.map(to_ms),
            ram: self.ram.clone(),
            socket_address: self.address.clone().map(|address| vec![address]),
            error_desc: self.error.clone(),
            blackout: self.blackout.clone(),
        }
    }

    fn blackout(&self, report: Report) -> Blackout {
        let relative = |ns: i64| ns.saturating_sub_unsigned(self.started_ns);
        let own = |ns: u64| relative(i64::try_from(ns).unwrap_or(i64::MAX));
        let clock = report
            .clock
            .at(report.downtime_start_ns.unwrap_or_else(monotonic_ns));
        let destination = |ns: u64| match self.side {
            Side::Source => clock.map(|clock| relative(clock.to_source(ns))),
            Side::Destination => Some(own(ns)),
        };

        let downtime_start_ns = report.downtime_start_ns.map(own);
        let first_run_ns = report.first_run_ns.and_then(destination);
        let downtime_ns = downtime_start_ns.zip(first_run_ns);
        let downtime_ns = downtime_ns.and_then(|(start, end)| u64::try_from(end - start).ok());

        let prediction = report.forecast.map(|forecast| {
            let ram_ns = Forecast::ram_span_ns(&report.spans);
            forecast.beside(&Costs::measured(&report.spans), ram_ns, downtime_ns)
        });
        let here = report.spans.into_iter().map(|s| {
            let start = own(s.start_ns);
            Span::new(self.side, s, start)
        });
        let there = report.peer_spans.into_iter().filter_map(|s| {
            let start = destination(s.start_ns)?;
            Some(Span::new(Side::Destination, s, start))
        });
        Blackout {
            id: report.id,
            side: self.side,
            uri: self.uri.clone(),
            mode: self.mode.name(),
            start_ns: self.started_ns,
            downtime_ns,
            downtime_start_ns,
            first_run_ns,
            prediction,
            clock: clock.map(|clock| ClockReport::new(clock, report.clock.samples())),
            spans: here.chain(there).collect(),
        }
    }
}

/// Milliseconds, rounded up: a downtime that was is never 0.
fn to_ms(ns: u64) -> u64 {
    ns.div_ceil(1_000_000)
}
