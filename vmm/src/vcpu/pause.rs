//! [5] `pause_all_vcpus`: out of the guest and out of `KVM_RUN`, all at once.
//!
//! The order of the stores makes a kick impossible to lose. The pausing thread says what it wants,
//! then sets `immediate_exit`, then sends the signal. A vCPU thread clears `immediate_exit`, then
//! looks at what is wanted, then enters `KVM_RUN`. Whichever comes first, either the thread sees
//! the wish or `KVM_RUN` sees `immediate_exit`.

use std::convert::Infallible;
use std::io;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

use super::{Thread, Vcpus};
use crate::probes::{self, Guarded};

impl Vcpus {
    /// [5] Kicks every vCPU, then waits until each one's thread is out of `KVM_RUN` with its last
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

    /// Called by a vCPU thread that is out of `KVM_RUN`: counts it as paused until something else
    /// than a pause is wanted, and returns that.
    pub(super) fn pause(&self) -> Want {
        let mut state = self.lock();
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
