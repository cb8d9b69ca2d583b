//! `cpu_throttle`: keeps a guest that dirties its RAM faster than it can be sent out of `KVM_RUN` for a share
//! of its time, as QEMU's `system/cpu-throttle.c` does.
//!
//! vCPUs run for a [`TIMESLICE`], all rest together, and run again. One that rests waits at the gate, where a
//! pause finds it at once: a throttle makes no downtime longer. What a vCPU has rested right before the stop
//! is a part of its blackout, as the guest was dark then.

use std::io;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use super::{Threads, Vcpus, pause};
use crate::spanlog::monotonic_ns;

/// How long vCPUs run between two rests: QEMU's `CPU_THROTTLE_TIMESLICE_NS`.
const TIMESLICE: Duration = Duration::from_millis(10);
/// What QEMU throttles at most, per cent.
const MOST: u8 = 99;

/// The thread that lets vCPUs rest, while there is one.
#[derive(Default)]
pub(super) struct Throttle(Mutex<Option<Rests>>);

struct Rests {
    percentage: Arc<AtomicU8>,
    /// Dropped, it ends the thread.
    end: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Vcpus {
    /// Lets vCPUs rest for `percentage` of the time, 99 at most; 0 lets them run.
    ///
    /// # Errors
    /// When the thread that does it can't be started.
    pub fn cpu_throttle_set(&self, percentage: u8) -> io::Result<()> {
        let rests = self.throttle.0.lock();
        let mut rests = rests.unwrap_or_else(PoisonError::into_inner);
        match (&*rests, percentage) {
            (_, 0) => {
                rests.take();
                self.gate.rest_until(0);
            }
            (Some(rests), _) => rests.percentage.store(percentage, Ordering::Relaxed),
            (None, _) => *rests = Some(Rests::start(percentage, Arc::clone(&self.threads))?),
        }
        Ok(())
    }
}

impl Rests {
    fn start(percentage: u8, threads: Arc<Threads>) -> io::Result<Self> {
        let share = Arc::new(AtomicU8::new(percentage));
        let percentage = Arc::clone(&share);
        let (end, ended) = channel::<()>();
        let body = move || {
            let wait = |time| ended.recv_timeout(time) == Err(RecvTimeoutError::Timeout);
            while wait(TIMESLICE) {
                let rest = rest(percentage.load(Ordering::Relaxed));
                threads.rest(rest);
                if !wait(rest) {
                    return;
                }
            }
        };
        let thread = thread::Builder::new().name("throttle".into()).spawn(body)?;
        Ok(Rests {
            percentage: share,
            end: Some(end),
            thread: Some(thread),
        })
    }
}

impl Drop for Rests {
    fn drop(&mut self) {
        drop(self.end.take());
        // A thread that panicked has said why on stderr, and lets nobody rest any more.
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

impl Threads {
    /// Gets all out of the guest for so long.
    fn rest(&self, rest: Duration) {
        let ns = u64::try_from(rest.as_nanos()).unwrap_or(u64::MAX);
        self.gate.rest_until(monotonic_ns().saturating_add(ns));
        self.list.iter().for_each(pause::kick);
    }
}

/// How long vCPUs rest after a [`TIMESLICE`], so that it is `percentage` of the time.
fn rest(percentage: u8) -> Duration {
    let share = u32::from(percentage.min(MOST));
    TIMESLICE * share / (100 - share)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rest_is_the_share_that_was_asked_for() {
        let ms = |percentage| rest(percentage).as_micros() as f64 / 1e3;
        assert_eq!((ms(0), ms(20), ms(50)), (0.0, 2.5, 10.0));
        assert_eq!((ms(99), ms(255)), (990.0, 990.0));
    }
}
