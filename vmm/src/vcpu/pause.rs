//! `[5]` `pause_all_vcpus`: out of the guest and out of `KVM_RUN`, all at once.
//!
//! The order of the stores makes a kick impossible to lose. The pausing thread says what it wants,
//! then sets `immediate_exit`, then sends the signal. A vCPU thread clears `immediate_exit`, then
//! looks at what is wanted, then enters `KVM_RUN`. Whichever comes first, either the thread sees
//! the wish or `KVM_RUN` sees `immediate_exit`.

use std::convert::Infallible;
use std::io;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

use super::{Thread, Vcpus};
use crate::probes::{self, Guarded};

impl Vcpus {
    /// `[5]` Kicks every vCPU, then waits until each one's thread is out of `KVM_RUN` with its last
    /// exit complete. From then on nobody holds a vCPU's lock until [`Vcpus::resume_all`].
    pub fn pause_all_vcpus(&self) {
        let paused: Result<(), Never> =
            probes::pause_all_vcpus(self.threads.len() as u64).run(|_| {
                self.gate.set(Want::Pause);
                for (index, thread) in (0..).zip(&self.threads) {
                    kick(thread);
                    probes::vcpu_kicked(index);
                }
                self.gate.wait_paused(self.threads.len());
                Ok(())
            });
        let Ok(()) = paused;
    }

    /// When the last vCPU left `KVM_RUN` for the pause that is on, or the one before: the blackout
    /// starts here. `CLOCK_MONOTONIC`, ns.
    pub fn last_exit_ns(&self) -> Option<u64> {
        self.gate.last_exit_ns()
    }

    /// When the first vCPU of this process entered `KVM_RUN` for the first time: on a destination
    /// the downtime ends here. Waits for that up to `limit`. `CLOCK_MONOTONIC`, ns.
    pub fn wait_first_run(&self, limit: Duration) -> Option<u64> {
        self.gate.wait_first_run(limit)
    }
}

/// Makes the kick's signal harmless: its handler does nothing, the interrupted `KVM_RUN` is the
/// effect.
pub(super) fn handle_kick_signal() -> io::Result<()> {
    extern "C" fn ignore(_: i32, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}
    register_signal_handler(SIGRTMIN(), ignore).map_err(|e| io::Error::from_raw_os_error(e.errno()))
}

/// Gets one vCPU thread out of `KVM_RUN`, or keeps it from getting in.
pub(super) fn kick(thread: &Thread) {
    thread.kick.set();
    // This can only fail for a thread that has ended, which is out of KVM_RUN for good.
    let _ = thread.handle.kill(SIGRTMIN());
}

/// The error of what can't fail, for spans that have a result all the same.
pub(crate) struct Never(Infallible);

impl probes::Errno for Never {
    fn errno(&self) -> i32 {
        match self.0 {}
    }
}

/// What the vCPU threads are to do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Want {
    /// Stay out of the guest.
    #[default]
    Pause,
    /// Run the guest.
    Run,
    /// End the thread.
    Exit,
}

/// Where every vCPU thread stops before it enters the guest.
#[derive(Debug, Default)]
pub(super) struct Gate {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    want: Want,
    paused: usize,
    first_run_ns: Option<u64>,
    last_exit_ns: Option<u64>,
}

impl Gate {
    /// What is wanted now.
    pub(super) fn want(&self) -> Want {
        self.lock().want
    }

    /// Says what is wanted from now on.
    pub(super) fn set(&self, want: Want) {
        self.lock().want = want;
        self.changed.notify_all();
    }

    /// Called by a vCPU thread that left `KVM_RUN` at `exit_ns`, if it was ever in it: counts it as
    /// paused until something else than a pause is wanted, and returns that.
    pub(super) fn pause(&self, exit_ns: Option<u64>) -> Want {
        let mut state = self.lock();
        state.last_exit_ns = state.last_exit_ns.max(exit_ns);
        state.paused += 1;
        self.changed.notify_all();
        while state.want == Want::Pause {
            state = self
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
        state.paused -= 1;
        state.want
    }

    /// Called by a vCPU thread whose guest can't go on: waits for a pause or the end.
    pub(super) fn wait_while_running(&self) {
        let mut state = self.lock();
        while state.want == Want::Run {
            state = self
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Called by a vCPU thread about to enter `KVM_RUN` for the first time, at `now_ns`.
    pub(super) fn note_first_run(&self, now_ns: u64) {
        self.lock().first_run_ns.get_or_insert(now_ns);
        self.changed.notify_all();
    }

    /// When the first vCPU entered `KVM_RUN`, once that has happened; waits for it up to `limit`.
    pub(super) fn wait_first_run(&self, limit: Duration) -> Option<u64> {
        let waiting = |state: &mut State| state.first_run_ns.is_none();
        let waited = self.changed.wait_timeout_while(self.lock(), limit, waiting);
        waited
            .unwrap_or_else(PoisonError::into_inner)
            .0
            .first_run_ns
    }

    /// When the last vCPU left `KVM_RUN` for a pause.
    pub(super) fn last_exit_ns(&self) -> Option<u64> {
        self.lock().last_exit_ns
    }

    /// Waits until `count` threads are paused.
    pub(super) fn wait_paused(&self, count: usize) {
        let mut state = self.lock();
        while state.paused < count {
            state = self
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
