//! The verbs' real backend: the machine and its main loop.

use std::sync::mpsc::Sender;
use std::sync::{MutexGuard, PoisonError};

use super::commands::{Backend, Change};
use super::wire::Error;
use crate::control::{system_reset, vm_start, vm_stop};
use crate::costs::Costs;
use crate::machine::{Machine, SharedMachine};
use crate::migration::Migrations;
use crate::migration::descriptors::Descriptors;
use crate::migration::settings::{Capability, Settings};
use crate::migration::status::{MigrationStatus, QueryMigrate};
use crate::runstate::{Request, RunState};
use crate::spanlog::SpanLog;

/// A machine under control.
pub struct Monitor {
    /// The machine.
    pub machine: SharedMachine,
    /// Its migrations.
    pub migrations: Migrations,
    /// The VM's name.
    pub name: Option<String>,
    /// To the main loop.
    pub requests: Sender<Request>,
}

impl Monitor {
    fn machine(&self) -> MutexGuard<'_, Machine> {
        self.machine.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Backend for Monitor {
    fn name(&self) -> Option<&str> {
        self.name.as_deref()
    }

    fn run_state(&self) -> RunState {
        self.machine().run_state()
    }

    fn change(&self, decide: fn(RunState) -> Result<Change, Error>) -> Result<(), Error> {
        let mut machine = self.machine();
        match decide(machine.run_state())? {
            Change::Nothing => {}
            Change::Start => vm_start(&mut machine)?,
            Change::Stop => {
                let log = SpanLog::open();
                vm_stop(&mut machine, RunState::Paused, false)?;
                // What it took is what the stop of a migration will take.
                machine.learn(&Costs::measured(&log.finish()));
            }
            Change::Autostart(on) => machine.set_autostart(on),
        }
        Ok(())
    }

    fn migrate(&self, uri: &str, descriptors: &mut Descriptors) -> Result<(), Error> {
        Ok(self.migrations.start(uri, descriptors)?)
    }

    fn migrate_incoming(&self, uri: &str, descriptors: &mut Descriptors) -> Result<(), Error> {
        Ok(self.migrations.incoming(uri, descriptors)?)
    }

    fn settings(&self) -> &Settings {
        self.migrations.settings()
    }

    fn set_capabilities(&self, changes: &[(Capability, bool)]) -> Result<(), Error> {
        Ok(self.migrations.set_capabilities(changes)?)
    }

    fn migrate_continue(&self, state: MigrationStatus) -> Result<(), Error> {
        Ok(self.migrations.go_on(state)?)
    }

    fn migrate_cancel(&self) {
        self.migrations.cancel();
    }

    fn query_migrate(&self) -> QueryMigrate {
        self.migrations.query()
    }

    fn system_reset(&self) -> Result<(), Error> {
        let reason = "host-qmp-system-reset";
        Ok(system_reset(&mut self.machine(), false, reason)?)
    }

    fn system_powerdown(&self) -> Result<(), Error> {
        self.machine().system_powerdown().map_err(Error::Powerdown)
    }

    fn quit(&self) {
        // The main loop only goes away with the process.
        let _ = self.requests.send(Request::Quit);
    }
}
