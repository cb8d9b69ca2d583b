//! The run states and the transitions between them, as a table (QEMU: `runstate.c`).

use std::ffi::CStr;

/// What a VM is doing. Names and meaning are QEMU's `RunState`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RunState {
    /// Built, never started.
    Prelaunch,
    /// Waits for an incoming migration, or takes one in.
    Inmigrate,
    /// The vCPUs run.
    Running,
    /// Stopped by a person.
    Paused,
    /// Stopped for a switchover that is not committed.
    FinishMigrate,
    /// Migrated away: another process has the guest now, or may have.
    Postmigrate,
    /// The guest switched itself off.
    Shutdown,
    /// KVM or a device failed in a way that the guest cannot run on from.
    InternalError,
}

use RunState::{
    FinishMigrate, Inmigrate, InternalError, Paused, Postmigrate, Prelaunch, Running, Shutdown,
};

/// Every legal change of state.
const TRANSITIONS: &[(RunState, RunState)] = &[
    (Prelaunch, Running),
    (Prelaunch, Inmigrate),
    (Prelaunch, FinishMigrate),
    (Prelaunch, InternalError),
    (Inmigrate, Running),
    (Inmigrate, Paused),
    (Inmigrate, Shutdown),
    (Inmigrate, InternalError),
    (Inmigrate, Prelaunch),
    (Running, Paused),
    (Running, FinishMigrate),
    (Running, Shutdown),
    (Running, InternalError),
    (Paused, Running),
    (Paused, Prelaunch),
    (Paused, InternalError),
    (Paused, FinishMigrate),
    (Paused, Postmigrate),
    (FinishMigrate, Postmigrate),
    (FinishMigrate, Running),
    (FinishMigrate, Paused),
    (FinishMigrate, Prelaunch),
    (FinishMigrate, Shutdown),
    (FinishMigrate, InternalError),
    (Postmigrate, Running),
    (Postmigrate, Paused),
    (Postmigrate, FinishMigrate),
    (Shutdown, Paused),
    (Shutdown, Prelaunch),
    (Shutdown, InternalError),
    (Shutdown, FinishMigrate),
    (InternalError, Paused),
    (InternalError, Prelaunch),
    (InternalError, FinishMigrate),
];

/// A change of state that the table does not have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a VM that is {} can't become {}", from.name(), to.name())]
pub struct IllegalTransition {
    /// The state that the VM is in.
    pub from: RunState,
    /// The state that was asked for.
    pub to: RunState,
}

impl RunState {
    /// The state after the change to `to`.
    ///
    /// # Errors
    /// When the table has no such change. Staying in a state is legal.
    pub fn change(self, to: RunState) -> Result<RunState, IllegalTransition> {
        if self == to || TRANSITIONS.contains(&(self, to)) {
            Ok(to)
        } else {
            Err(IllegalTransition { from: self, to })
        }
    }

    /// Whether the vCPUs run in this state.
    pub fn is_running(self) -> bool {
        self == Running
    }

    /// QEMU's name of the state, as QMP writes it.
    pub fn name(self) -> &'static str {
        self.c_name().to_str().unwrap_or_default()
    }

    /// The same name for a probe.
    pub fn c_name(self) -> &'static CStr {
        match self {
            Prelaunch => c"prelaunch",
            Inmigrate => c"inmigrate",
            Running => c"running",
            Paused => c"paused",
            FinishMigrate => c"finish-migrate",
            Postmigrate => c"postmigrate",
            Shutdown => c"shutdown",
            InternalError => c"internal-error",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: [RunState; 8] = [
        Prelaunch,
        Inmigrate,
        Running,
        Paused,
        FinishMigrate,
        Postmigrate,
        Shutdown,
        InternalError,
    ];

    #[test]
    fn a_failed_switchover_can_go_back_to_whatever_the_vm_was_before_it() {
        for before in ALL.into_iter().filter(|s| s.change(FinishMigrate).is_ok()) {
            let back = FinishMigrate.change(before);
            assert!(
                back.is_ok() || before == Postmigrate,
                "{before:?}: {back:?}"
            );
        }
    }

    #[test]
    fn a_guest_that_was_handed_over_needs_a_person_to_run_again() {
        let into_running: Vec<_> = ALL
            .into_iter()
            .filter(|s| s.change(Running).is_ok())
            .collect();
        assert_eq!(
            into_running,
            [
                Prelaunch,
                Inmigrate,
                Running,
                Paused,
                FinishMigrate,
                Postmigrate
            ]
        );
        assert!(Shutdown.change(Running).is_err());
    }

    #[test]
    fn an_illegal_change_says_what_was_wrong() {
        let error = Prelaunch.change(Shutdown).unwrap_err();
        assert_eq!(
            error.to_string(),
            "a VM that is prelaunch can't become shutdown"
        );
    }
}
