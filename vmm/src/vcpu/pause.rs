//! `[5]` `pause_all_vcpus`: out of the guest and out of `KVM_RUN`, all at once.
//!
//! The order of the stores makes a kick impossible to lose. The pausing thread says what it wants,
//! then sets `immediate_exit`, then sends the signal. A vCPU thread clears `immediate_exit`, then
//! looks at what is wanted, then enters `KVM_RUN`. Whichever comes first, either the thread sees
//! the wish or `KVM_RUN` sees `immediate_exit`.

use std::convert::Infallible;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

use super::{Thread, Vcpus};
use crate::probes::{self, Guarded};
use crate::spanlog::monotonic_ns;

/// How long a woken vCPU thread is waited for; one that is not scheduled for longer is on its own.
const WAKE: Duration = Duration::from_millis(100);

/// How often it is looked for.
const LOOK: Duration = Duration::from_micros(10);

impl Vcpus {
    /// `[5]` Kicks every vCPU, then waits until each one's thread is out of `KVM_RUN` with its last
    /// exit complete. From then on nobody holds a vCPU's lock until [`Vcpus::resume_all_vcpus`].
    pub fn pause_all_vcpus(&self) {
        let paused: Result<(), Never> = probes::pause_all_vcpus(self.len() as u64).run(|_| {
            self.gate.set(Want::Pause);
            for (index, thread) in (0..).zip(&self.threads.list) {
                kick(thread);
                probes::vcpu_kicked(index);
            }
            self.gate.wait_paused(self.len());
            Ok(())
        });
        let Ok(()) = paused;
    }

    /// Lets every vCPU enter the guest; returns when the first is about to. The span therefore
    /// shows what the scheduler takes to wake a thread, which is a part of every blackout.
    pub fn resume_all_vcpus(&self) {
        let resumed: Result<(), Never> = probes::resume_all_vcpus(self.len() as u64).run(|_| {
            self.gate.open();
            Ok(())
        });
        let Ok(()) = resumed;
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

/// Asks every few microseconds until there is an answer or `limit` has passed.
fn look_until<T>(limit: Duration, answer: impl Fn() -> Option<T>) -> Option<T> {
    let deadline = Instant::now() + limit;
    loop {
        let now = answer();
        if now.is_some() || Instant::now() >= deadline {
            return now;
        }
        thread::sleep(LOOK);
    }
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
    /// How often a thread has left the gate. It and `first_run_ns` are looked at now and then, not
    /// waited for: to wake somebody would cost the vCPU a system call before its first instruction.
    left: AtomicU64,
    /// 0 until a vCPU has run.
    first_run_ns: AtomicU64,
    /// Until when nobody enters the guest, though nobody is paused; 0 most of the time.
    rest_until_ns: AtomicU64,
}

#[derive(Debug, Default)]
struct State {
    want: Want,
    paused: usize,
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
        self.left.fetch_add(1, Ordering::Relaxed);
        state.want
    }

    /// Says until when the throttle lets nobody enter the guest; 0 is at once. Threads that are in it are
    /// to be kicked.
    pub(super) fn rest_until(&self, ns: u64) {
        let resting = self.lock();
        self.rest_until_ns.store(ns, Ordering::Relaxed);
        drop(resting);
        self.changed.notify_all();
    }

    /// Called by a vCPU thread about to enter the guest: waits for as long as the throttle says, but not
    /// when something else than to run is wanted.
    pub(super) fn rest(&self) {
        if self.rest_until_ns.load(Ordering::Relaxed) == 0 {
            return;
        }
        let mut state = self.lock();
        while state.want == Want::Run {
            let until_ns = self.rest_until_ns.load(Ordering::Relaxed);
            let left_ns = until_ns.saturating_sub(monotonic_ns());
            if left_ns == 0 {
                return;
            }
            let waited = self
                .changed
                .wait_timeout(state, Duration::from_nanos(left_ns));
            (state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Lets every thread run, and waits until the first of them has left the gate: then a vCPU is
    /// about to enter the guest.
    fn open(&self) {
        let before = self.left.load(Ordering::Relaxed);
        self.set(Want::Run);
        look_until(WAKE, || {
            (self.left.load(Ordering::Relaxed) != before).then_some(())
        });
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
        let none = 0;
        // Another vCPU was first: its time stays.
        let _ =
            self.first_run_ns
                .compare_exchange(none, now_ns, Ordering::Relaxed, Ordering::Relaxed);
    }

    /// When the first vCPU entered `KVM_RUN`, once that has happened; waits for it up to `limit`.
    fn wait_first_run(&self, limit: Duration) -> Option<u64> {
        look_until(limit, || {
            Some(self.first_run_ns.load(Ordering::Relaxed)).filter(|&ns| ns != 0)
        })
    }

    /// When the last vCPU left `KVM_RUN` for a pause.
    fn last_exit_ns(&self) -> Option<u64> {
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
