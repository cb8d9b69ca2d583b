//! `[6]` `vm_state_notify`: one list of handlers, walked forward on a start and in reverse on a stop.
//!
//! QEMU keeps the same list (`system/runstate.c`, `qdev_vm_state_handlers`). Two things differ:
//! each callback is a span of its own, and an error is not just printed: the walk goes on to the
//! end, and the first error is returned.

use std::error::Error as StdError;
use std::ffi::CStr;

use super::RunState;
use crate::probes::{self, Errno, Guarded};

/// Something that must do its part when the VM starts or stops. `machine.rs` lists them all.
///
/// Both callbacks run with no vCPU in `KVM_RUN`. There are no default methods: a handler says what
/// it does, also where that is nothing.
pub trait StateHandler: Send {
    /// Its name in probes, reports and errors.
    fn name(&self) -> &'static CStr;

    /// Where it stands on the list: low numbers start first and stop last. Handlers of one
    /// priority keep the order in which they were registered.
    fn priority(&self) -> i32;

    /// Runs for every handler before any [`StateHandler::change`] does: stop or start what others
    /// may still ask this handler for.
    fn prepare(&mut self, running: bool, state: RunState) -> Result<(), CallbackError>;

    /// The change itself.
    fn change(&mut self, running: bool, state: RunState) -> Result<(), CallbackError>;
}

/// What a handler's callback returns when it fails: any error, with the errno that its span shows.
#[derive(Debug)]
pub struct CallbackError {
    source: Box<dyn StdError + Send + Sync>,
    errno: i32,
}

impl<E: Errno + StdError + Send + Sync + 'static> From<E> for CallbackError {
    fn from(error: E) -> Self {
        CallbackError {
            errno: error.errno(),
            source: Box::new(error),
        }
    }
}

impl Errno for CallbackError {
    fn errno(&self) -> i32 {
        self.errno
    }
}

/// The first handler that failed in a walk.
#[derive(Debug, thiserror::Error)]
#[error("state handler {handler} failed in {phase}")]
pub struct HandlerError {
    /// The handler's name.
    pub handler: String,
    /// `prepare` or `main`.
    pub phase: &'static str,
    /// Its positive errno.
    pub errno: i32,
    /// What it returned.
    pub source: Box<dyn StdError + Send + Sync>,
}

impl Errno for HandlerError {
    fn errno(&self) -> i32 {
        self.errno
    }
}

/// The list of handlers, sorted by ascending priority.
#[derive(Default)]
pub struct NotifyList {
    handlers: Vec<Box<dyn StateHandler>>,
}

impl NotifyList {
    /// Puts `handler` behind those of its own priority.
    pub fn register(&mut self, handler: Box<dyn StateHandler>) {
        let at = self
            .handlers
            .partition_point(|other| other.priority() <= handler.priority());
        self.handlers.insert(at, handler);
    }

    /// `[6]` Tells every handler: all `prepare` callbacks first, then all main ones, both walks
    /// forward when `running`, in reverse otherwise. The vCPUs must be paused.
    ///
    /// # Errors
    /// The first callback that failed; every other one has run all the same.
    pub fn vm_state_notify(&mut self, running: bool, state: RunState) -> Result<(), HandlerError> {
        let count = self.handlers.len() as u64;
        probes::vm_state_notify(u64::from(running), state.c_name(), count).run(|_| {
            let prepared = self.walk(running, c"prepare", |h| h.prepare(running, state));
            let changed = self.walk(running, c"main", |h| h.change(running, state));
            prepared.and(changed)
        })
    }

    fn walk(
        &mut self,
        running: bool,
        phase: &'static CStr,
        callback: impl Fn(&mut dyn StateHandler) -> Result<(), CallbackError>,
    ) -> Result<(), HandlerError> {
        let mut first = Ok(());
        let mut call = |(index, handler): (usize, &mut Box<dyn StateHandler>)| {
            let (name, priority) = (handler.name(), i64::from(handler.priority()));
            let result = probes::vm_state_handler(name, index as u64, priority, phase)
                .run(|_| callback(handler.as_mut()));
            if let (Err(CallbackError { source, errno }), Ok(())) = (result, &first) {
                let handler = name.to_string_lossy().into_owned();
                let phase = phase.to_str().unwrap_or_default();
                first = Err(HandlerError {
                    handler,
                    phase,
                    errno,
                    source,
                });
            }
        };
        let handlers = self.handlers.iter_mut().enumerate();
        if running {
            handlers.for_each(&mut call)
        } else {
            handlers.rev().for_each(&mut call)
        }
        first
    }
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::sync::{Arc, Mutex};

    use super::*;

    struct Spy {
        name: &'static CStr,
        priority: i32,
        fails: bool,
        calls: Arc<Mutex<Vec<String>>>,
    }

    impl Spy {
        fn call(&self, phase: &str) -> Result<(), CallbackError> {
            let name = self.name.to_str().unwrap();
            self.calls.lock().unwrap().push(format!("{name} {phase}"));
            if self.fails {
                return Err(io::Error::from_raw_os_error(libc::EINVAL).into());
            }
            Ok(())
        }
    }

    impl StateHandler for Spy {
        fn name(&self) -> &'static CStr {
            self.name
        }
        fn priority(&self) -> i32 {
            self.priority
        }
        fn prepare(&mut self, _: bool, _: RunState) -> Result<(), CallbackError> {
            self.call("prepare")
        }
        fn change(&mut self, _: bool, _: RunState) -> Result<(), CallbackError> {
            self.call("main")
        }
    }

    fn walk(running: bool, failing: &[&CStr]) -> (Result<(), HandlerError>, Vec<String>) {
        let calls = Arc::new(Mutex::new(Vec::new()));
        let mut list = NotifyList::default();
        for (name, priority) in [(c"its", 20), (c"timer", 0), (c"gic", 10), (c"rtc", 0)] {
            let (fails, calls) = (failing.contains(&name), Arc::clone(&calls));
            list.register(Box::new(Spy {
                name,
                priority,
                fails,
                calls,
            }));
        }
        let result = list.vm_state_notify(running, RunState::Paused);
        let calls = calls.lock().unwrap().clone();
        (result, calls)
    }

    #[test]
    fn a_stop_walks_in_reverse_and_prepares_everyone_first() {
        assert_eq!(
            walk(false, &[]).1,
            [
                "its prepare",
                "gic prepare",
                "rtc prepare",
                "timer prepare",
                "its main",
                "gic main",
                "rtc main",
                "timer main",
            ]
        );
    }

    #[test]
    fn a_start_walks_forward_and_equal_priorities_keep_their_order() {
        assert_eq!(
            walk(true, &[]).1,
            [
                "timer prepare",
                "rtc prepare",
                "gic prepare",
                "its prepare",
                "timer main",
                "rtc main",
                "gic main",
                "its main",
            ]
        );
    }

    #[test]
    fn every_handler_runs_after_a_failure_and_the_first_error_is_returned() {
        let (result, calls) = walk(false, &[c"its", c"timer"]);
        assert_eq!(calls.len(), 8);
        let error = result.unwrap_err();
        assert_eq!((error.handler.as_str(), error.phase), ("its", "prepare"));
        assert_eq!(error.errno(), libc::EINVAL);
    }
}
