//! The blackout as the guest's memory shows it, seen by nobody but a third process.

use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::time::{ClockId, clock_gettime};

use crate::guest_ram::GuestView;

/// What an [`Observer`] saw.
#[derive(Clone, Copy, Debug)]
pub struct Seen {
    /// When a counter last grew on the source. `CLOCK_MONOTONIC`, ns.
    pub last_progress_ns: u64,
    /// When a counter first grew on the destination. `CLOCK_MONOTONIC`, ns.
    pub first_progress_ns: u64,
    /// How far both may be off, because the observer itself was not looking.
    pub error_ns: u64,
}

impl Seen {
    /// The blackout.
    pub fn blackout_ns(&self) -> u64 {
        self.first_progress_ns - self.last_progress_ns
    }
}

/// Samples the counters of a source and a destination, as often as it can, on a thread.
#[derive(Debug)]
pub struct Observer {
    thread: JoinHandle<Result<Seen>>,
}

impl Observer {
    /// Watches `vcpus` counters in both guests until the destination's grow past the source's.
    pub fn start(source: GuestView, destination: GuestView, vcpus: usize, limit: Duration) -> Self {
        let watch = move || watch(&source, &destination, vcpus, limit);
        Observer {
            thread: thread::spawn(watch),
        }
    }

    /// Waits for the end of the blackout.
    pub fn finish(self) -> Result<Seen> {
        self.thread.join().ok().context("the observer panicked")?
    }
}

fn watch(
    source: &GuestView,
    destination: &GuestView,
    vcpus: usize,
    limit: Duration,
) -> Result<Seen> {
    let start = now_ns()?;
    let limit = u64::try_from(limit.as_nanos())?;
    let mut counters = source.counters(vcpus);
    let mut before = start;
    let (mut last_progress_ns, mut last_error) = (start, 0);
    loop {
        let mut progress = false;
        for (index, known) in counters.iter_mut().enumerate() {
            let value = source.counter(index);
            progress |= value != *known;
            *known = value;
        }
        // RAM that arrives carries the source's counters with it: only going past them is life.
        let alive = counters
            .iter()
            .enumerate()
            .any(|(i, &known)| destination.counter(i) > known);
        let now = now_ns()?;
        if progress {
            (last_progress_ns, last_error) = (now, now - before);
        }
        if alive {
            let error_ns = last_error + (now - before);
            return Ok(Seen {
                last_progress_ns,
                first_progress_ns: now,
                error_ns,
            });
        }
        if now - start > limit {
            bail!("the destination made no progress within {limit} ns");
        }
        before = now;
    }
}

fn now_ns() -> Result<u64> {
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC)?;
    Ok(now.tv_sec().unsigned_abs() * 1_000_000_000 + now.tv_nsec().unsigned_abs())
}
