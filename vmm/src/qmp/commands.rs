//! `[1]` The verbs: one function each, and the table that finds them.

use std::ffi::CStr;

use serde_json::{Value, json};

use super::arguments::Arguments;
use super::objects;
use super::settings;
use super::wire::{self, Error};
use crate::migration::descriptors::Descriptors;
use crate::migration::settings::{Capability, Settings};
use crate::migration::status::{MigrationStatus, QueryMigrate};
use crate::runstate::RunState;

/// What the verbs ask of the monitor behind them.
///
/// There is one real implementation, [`Monitor`](super::monitor::Monitor). The trait is here so
/// that everything a client can send is tested without KVM.
pub trait Backend: Send + Sync {
    /// The VM's name, if it was given one.
    fn name(&self) -> Option<&str>;

    /// The VM's run state.
    fn run_state(&self) -> RunState;

    /// Looks at the run state and does what `decide` makes of it, as one step: nothing can change
    /// the state in between.
    ///
    /// # Errors
    /// `decide`'s, or why the VM can't be started or stopped.
    fn change(&self, decide: fn(RunState) -> Result<Change, Error>) -> Result<(), Error>;

    /// Starts an outgoing migration to `uri`, which may be one of `descriptors`, and returns at once.
    ///
    /// # Errors
    /// When it can't be begun.
    fn migrate(&self, uri: &str, descriptors: &mut Descriptors) -> Result<(), Error>;

    /// Listens on `uri`, which may be one of `descriptors`, for an incoming migration.
    ///
    /// # Errors
    /// Why it can't.
    fn migrate_incoming(&self, uri: &str, descriptors: &mut Descriptors) -> Result<(), Error>;

    /// What clients set of migrations.
    fn settings(&self) -> &Settings;

    /// Switches capabilities of migrations.
    ///
    /// # Errors
    /// While a migration is under way.
    fn set_capabilities(&self, changes: &[(Capability, bool)]) -> Result<(), Error>;

    /// Lets a migration go on that waits in `state`.
    ///
    /// # Errors
    /// When it is not in that state.
    fn migrate_continue(&self, state: MigrationStatus) -> Result<(), Error>;

    /// Gives up the outgoing migration that is under way, if there is one.
    fn migrate_cancel(&self);

    /// The migration that is under way, or the last one.
    fn query_migrate(&self) -> QueryMigrate;

    /// Makes the machine boot again.
    ///
    /// # Errors
    /// When its state does not allow it, or it can't.
    fn system_reset(&self) -> Result<(), Error>;

    /// Presses the power button.
    ///
    /// # Errors
    /// When the host can't.
    fn system_powerdown(&self) -> Result<(), Error>;

    /// Ends the process, soon.
    fn quit(&self);
}

/// What `stop` and `cont` make of a run state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// Leave it as it is.
    Nothing,
    /// Start the vCPUs.
    Start,
    /// Stop them; the VM is paused then.
    Stop,
    /// Run, or don't, once the migration that is coming in is complete.
    Autostart(bool),
}

/// What a verb may use: the monitor, and what is to happen after its answer.
pub(super) struct Context<'a> {
    /// The monitor.
    pub backend: &'a dyn Backend,
    /// What the client has passed.
    pub descriptors: &'a mut Descriptors,
    /// Set by `quit`: the process ends once the answer is on its way.
    pub quit: bool,
}

/// A verb.
pub(super) struct Verb {
    /// Its name, as its probe carries it.
    pub name: &'static CStr,
    /// Checks the arguments and runs it.
    pub run: fn(&mut Context<'_>, Arguments) -> Result<Value, Error>,
}

/// Every verb, in alphabetical order.
pub(super) const VERBS: &[Verb] = &[
    verb(c"closefd", closefd),
    verb(c"cont", cont),
    verb(c"getfd", getfd),
    verb(c"migrate", migrate),
    verb(c"migrate-continue", settings::migrate_continue),
    verb(c"migrate-incoming", migrate_incoming),
    verb(
        c"migrate-set-capabilities",
        settings::migrate_set_capabilities,
    ),
    verb(c"migrate-set-parameters", settings::migrate_set_parameters),
    verb(c"migrate_cancel", migrate_cancel),
    verb(c"object-add", objects::object_add),
    verb(c"object-del", objects::object_del),
    verb(c"qmp_capabilities", qmp_capabilities),
    verb(c"query-commands", query_commands),
    verb(c"query-kvm", query_kvm),
    verb(c"query-migrate", query_migrate),
    verb(
        c"query-migrate-capabilities",
        settings::query_migrate_capabilities,
    ),
    verb(
        c"query-migrate-parameters",
        settings::query_migrate_parameters,
    ),
    verb(c"query-name", query_name),
    verb(c"query-status", query_status),
    verb(c"query-target", query_target),
    verb(c"query-version", query_version),
    verb(c"quit", quit),
    verb(c"stop", stop),
    verb(c"system_powerdown", system_powerdown),
    verb(c"system_reset", system_reset),
];

/// The verb called `name`.
///
/// # Errors
/// When there is none.
pub(super) fn find(name: String) -> Result<&'static Verb, Error> {
    let verb = VERBS
        .iter()
        .find(|verb| verb.name.to_bytes() == name.as_bytes());
    verb.ok_or(Error::NotFound(name))
}

/// The name that every client says first; the session sees to its meaning.
pub(super) const QMP_CAPABILITIES: &str = "qmp_capabilities";

const fn verb(
    name: &'static CStr,
    run: fn(&mut Context<'_>, Arguments) -> Result<Value, Error>,
) -> Verb {
    Verb { name, run }
}

/// What a verb returns.
pub(super) type Answer = Result<Value, Error>;

/// What a verb without a result returns.
pub(super) fn done() -> Answer {
    Ok(json!({}))
}

fn qmp_capabilities(_: &mut Context<'_>, mut arguments: Arguments) -> Answer {
    let enable = arguments.strings("enable")?;
    arguments.finish()?;
    match enable.into_iter().next() {
        Some(capability) => Err(Error::NoCapability(capability)),
        None => done(),
    }
}

fn query_version(_: &mut Context<'_>, arguments: Arguments) -> Answer {
    arguments.finish()?;
    Ok(wire::version())
}

fn query_commands(_: &mut Context<'_>, arguments: Arguments) -> Answer {
    arguments.finish()?;
    let names = VERBS.iter().map(|verb| verb.name.to_string_lossy());
    Ok(names.map(|name| json!({ "name": name })).collect())
}

fn query_kvm(_: &mut Context<'_>, arguments: Arguments) -> Answer {
    arguments.finish()?;
    Ok(json!({ "enabled": true, "present": true }))
}

fn query_name(context: &mut Context<'_>, arguments: Arguments) -> Answer {
    arguments.finish()?;
    match context.backend.name() {
        Some(name) => Ok(json!({ "name": name })),
        None => done(),
    }
}

fn query_target(_: &mut Context<'_>, arguments: Arguments) -> Answer {
    arguments.finish()?;
    Ok(json!({ "arch": std::env::consts::ARCH }))
}

fn query_status(context: &mut Context<'_>, arguments: Arguments) -> Answer {
    arguments.finish()?;
    let state = context.backend.run_state();
    Ok(json!({ "status": state.name(), "running": state.is_running() }))
}

fn stop(context: &mut Context<'_>, arguments: Arguments) -> Answer {
    arguments.finish()?;
    context.backend.change(|state| {
        Ok(match state {
            RunState::Running => Change::Stop,
            RunState::Inmigrate => Change::Autostart(false),
            _ => Change::Nothing,
        })
    })?;
    done()
}

fn cont(context: &mut Context<'_>, arguments: Arguments) -> Answer {
    arguments.finish()?;
    context.backend.change(|state| match state {
        RunState::Running => Ok(Change::Nothing),
        RunState::Inmigrate => Ok(Change::Autostart(true)),
        RunState::Prelaunch | RunState::Paused | RunState::Postmigrate => Ok(Change::Start),
        RunState::FinishMigrate => Err(Error::State("Migration is not finalized yet")),
        RunState::Shutdown | RunState::InternalError => {
            Err(Error::State("Resetting the Virtual Machine is required"))
        }
    })?;
    done()
}

fn getfd(context: &mut Context<'_>, mut arguments: Arguments) -> Answer {
    let name = arguments.string("fdname")?;
    arguments.finish()?;
    context.descriptors.name(name)?;
    done()
}

fn closefd(context: &mut Context<'_>, mut arguments: Arguments) -> Answer {
    let name = arguments.string("fdname")?;
    arguments.finish()?;
    context.descriptors.close(&name)?;
    done()
}

fn quit(context: &mut Context<'_>, arguments: Arguments) -> Answer {
    arguments.finish()?;
    context.quit = true;
    done()
}

fn system_powerdown(context: &mut Context<'_>, arguments: Arguments) -> Answer {
    arguments.finish()?;
    context.backend.system_powerdown()?;
    done()
}

fn system_reset(context: &mut Context<'_>, arguments: Arguments) -> Answer {
    arguments.finish()?;
    context.backend.system_reset()?;
    done()
}

fn migrate(context: &mut Context<'_>, mut arguments: Arguments) -> Answer {
    let uri = arguments.string("uri")?;
    // QEMU's QMP takes `detach` and ignores it: a migration is always in the background.
    arguments.flag("detach")?;
    let resume = arguments.flag("resume")?;
    arguments.finish()?;
    if resume {
        // What can be resumed is a postcopy that lost its connection.
        return Err(Error::State(
            "Cannot resume if there is no paused migration",
        ));
    }
    context.backend.migrate(&uri, context.descriptors)?;
    done()
}

fn migrate_incoming(context: &mut Context<'_>, mut arguments: Arguments) -> Answer {
    let uri = arguments.string("uri")?;
    arguments.finish()?;
    context
        .backend
        .migrate_incoming(&uri, context.descriptors)?;
    done()
}

fn migrate_cancel(context: &mut Context<'_>, arguments: Arguments) -> Answer {
    arguments.finish()?;
    context.backend.migrate_cancel();
    done()
}

fn query_migrate(context: &mut Context<'_>, arguments: Arguments) -> Answer {
    arguments.finish()?;
    Ok(json!(context.backend.query_migrate()))
}
