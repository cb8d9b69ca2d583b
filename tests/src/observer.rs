//! The blackout as the guest's memory shows it, seen by nobody but a third process.
//!
//! A guest that stamps its progress by its own clock is looked at in no hurry: the stamps tell when it
//! stopped and went on. Of any other guest, its counter has to be seen growing, and the looks are what
//! the blackout may be wrong by.

use std::ops::Range;
use std::process::Command;
use std::sync::{Arc, OnceLock};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use nix::sys::prctl::set_timerslack;
use nix::time::{ClockId, clock_gettime};
use nix::unistd::gettid;

use crate::cpus::RunDelay;
use crate::guest_ram::GuestView;
use crate::skip::emulated;
use crate::stamps::{Moment, SharedStamps, Stamps};

/// Between two looks. A sleep that is over before the thread is off its CPU is none, and takes the
/// CPU from what is watched: this one is long enough.
const NAP: Duration = Duration::from_micros(20);

/// The same where a look and a sleep cost some 50 us, on one of few emulated CPUs, and what is looked at
/// takes a hundred times as long.
const EMULATED_NAP: Duration = Duration::from_micros(500);

/// The same of a guest that stamps its progress, and how long it is looked at after it went on.
const LONG_NAP: Duration = Duration::from_micros(150);
const AFTERWARDS_NS: u64 = 30_000_000;

/// What an [`Observer`] saw.
#[derive(Clone, Copy, Debug)]
pub struct Seen {
    /// When a counter last grew on the source. `CLOCK_MONOTONIC`, ns.
    pub last_progress_ns: u64,
    /// When a counter first grew on the destination. `CLOCK_MONOTONIC`, ns.
    pub first_progress_ns: u64,
    /// How far both may be off, because the observer itself was not looking.
    pub error_ns: u64,
    /// How long vCPUs were kept off their CPUs meanwhile. A guest that is entered and set aside
    /// before it has counted looks dark from here and is not.
    pub set_aside_ns: u64,
}

/// An observer that was itself not looking for longer than this, at both edges together, can't
/// judge a migration: on a kernel that does not preempt itself, it waits for the threads that do the
/// switchover.
const SHARP_NS: u64 = 150_000;

/// Nor can it where the host had vCPUs wait for a CPU for longer than this.
const UNDISTURBED_NS: u64 = 50_000;

impl Seen {
    /// Whether a monitor or a tool that says something else is to be blamed for it.
    pub fn is_fair(&self) -> bool {
        self.error_ns <= SHARP_NS && self.set_aside_ns <= UNDISTURBED_NS
    }

    /// The blackout.
    pub fn blackout_ns(&self) -> u64 {
        self.first_progress_ns - self.last_progress_ns
    }
}

/// One side of a migration, as it is watched.
#[derive(Debug)]
pub struct Watched {
    guest: GuestView,
    delay: RunDelay,
}

impl Watched {
    /// The guest of the monitor `pid`.
    pub fn open(pid: u32) -> Result<Self> {
        Ok(Watched {
            guest: GuestView::open(pid)?,
            delay: RunDelay::open(pid)?,
        })
    }
}

/// Looks at the counters of a source and a destination about every 50 us, on a thread, or at the stamps
/// of a guest that makes some, a quarter as often. In a testbed that
/// would be all that one of its CPUs does: there it looks 2000 times a second, before all other threads.
#[derive(Debug)]
pub struct Observer {
    thread: JoinHandle<Result<Seen>>,
}

impl Observer {
    /// Watches `vcpus` counters in both guests until the destination's grow past the source's.
    pub fn start(source: Watched, destination: Watched, vcpus: usize, limit: Duration) -> Self {
        let watch = move || watch(&source, &destination, vcpus, limit);
        Observer {
            thread: thread::spawn(watch),
        }
    }

    /// Watches `vcpus` counters in RAM that both monitors share until `over` is set to a time, of
    /// `CLOCK_MONOTONIC`, ns, at which the guest ran nowhere. The blackout is how long it made no progress
    /// around that, or, of a guest that makes no stamps, the longest time without progress.
    pub fn start_shared(
        source: Watched,
        destination: Watched,
        vcpus: usize,
        over: Arc<OnceLock<Range<u64>>>,
    ) -> Result<Self> {
        // Here and not on the thread, which may get a CPU only when it is all over.
        let (start_ns, counters) = (now_ns()?, source.guest.counters(vcpus));
        let watch = move || watch_shared(&source, &destination.delay, start_ns, counters, &over);
        Ok(Observer {
            thread: thread::spawn(watch),
        })
    }

    /// Waits for the end of the blackout.
    pub fn finish(self) -> Result<Seen> {
        self.thread.join().ok().context("the observer panicked")?
    }
}

/// What one look that saw progress at the source found.
struct Progress {
    at_ns: u64,
    error_ns: u64,
    delay_ns: u64,
}

fn watch(source: &Watched, destination: &Watched, vcpus: usize, limit: Duration) -> Result<Seen> {
    let nap = nap(source)?;
    let limit = u64::try_from(limit.as_nanos())?;
    let start = now_ns()?;
    let waited_ns = destination.delay.ns()?;
    let mut counters = source.guest.counters(vcpus);
    let mut stamps: Vec<_> = counters.iter().map(|_| Stamps::default()).collect();
    let mut before = start;
    let mut last = Progress {
        at_ns: start,
        error_ns: 0,
        delay_ns: source.delay.ns()?,
    };
    let mut delay_ns = last.delay_ns;
    loop {
        let mut progress = false;
        for (index, (known, stamps)) in counters.iter_mut().zip(&mut stamps).enumerate() {
            let (value, stamp) = (source.guest.counter(index), source.guest.stamp(index));
            progress |= value != *known;
            *known = value;
            stamps.source.add(now_ns()?, stamp);
        }
        // RAM that arrives carries the source's counters with it: only going past them is life.
        let alive = counters
            .iter()
            .enumerate()
            .any(|(i, &known)| destination.guest.counter(i) > known);
        let now = now_ns()?;
        if progress {
            // As of the look before: the progress may be from then, and all the waiting since.
            last = Progress {
                at_ns: now,
                error_ns: now - before,
                delay_ns,
            };
        }
        delay_ns = source.delay.ns()?;
        if alive {
            let source_ns = source.delay.ns()? - last.delay_ns;
            let destination_ns = destination.delay.ns()? - waited_ns;
            let seen = Seen {
                last_progress_ns: last.at_ns,
                first_progress_ns: now,
                error_ns: last.error_ns + (now - before),
                set_aside_ns: source_ns + destination_ns,
            };
            return sharpen(seen, source, destination, stamps);
        }
        if now - start > limit {
            bail!("the destination made no progress within {limit} ns");
        }
        before = now;
        thread::sleep(nap);
    }
}

/// What the guest's own stamps say of what was `seen`, if it makes any.
fn sharpen(
    seen: Seen,
    source: &Watched,
    destination: &Watched,
    mut stamps: Vec<Stamps>,
) -> Result<Seen> {
    if source.guest.stamp(0) == 0 {
        return Ok(seen);
    }
    let until = now_ns()? + AFTERWARDS_NS;
    while now_ns()? < until {
        for (index, stamps) in stamps.iter_mut().enumerate() {
            let stamp = destination.guest.stamp(index);
            stamps.destination.add(now_ns()?, stamp);
            let (last, gaps) = (source.guest.stamp(index), destination.guest.gaps(index));
            stamps.stood_still(last, &gaps);
        }
        thread::sleep(LONG_NAP);
    }
    let dark = stamps.iter().map(Stamps::dark);
    let sharp = sharpened(seen, dark.collect());
    // The counters were seen to stand still for that long, whatever the stamps say.
    let stood_ns = seen.blackout_ns().saturating_sub(seen.error_ns);
    Ok(match sharp.blackout_ns() + sharp.error_ns >= stood_ns {
        true => sharp,
        false => seen,
    })
}

/// What was `seen` with the moments at which each vCPU stopped and went on, if all of them tell, and
/// nothing that can't be.
fn sharpened(seen: Seen, dark: Option<Vec<(Moment, Moment)>>) -> Seen {
    let dark = dark.unwrap_or_default();
    let last = dark.iter().map(|(stopped, _)| stopped);
    let first = dark.iter().map(|(_, went_on)| went_on);
    let (Some(last), Some(first)) = (
        last.max_by_key(|moment| moment.at_ns),
        first.min_by_key(|moment| moment.at_ns),
    ) else {
        return seen;
    };
    let error_ns = last.error_ns + first.error_ns;
    if first.at_ns + error_ns < last.at_ns {
        return seen;
    }
    Seen {
        last_progress_ns: last.at_ns,
        first_progress_ns: first.at_ns.max(last.at_ns),
        error_ns,
        ..seen
    }
}

fn watch_shared(
    source: &Watched,
    destination: &RunDelay,
    start_ns: u64,
    mut counters: Vec<u64>,
    over: &OnceLock<Range<u64>>,
) -> Result<Seen> {
    let nap = nap(source)?;
    let delay_ns = || Ok::<_, anyhow::Error>(source.delay.ns()? + destination.ns()?);
    let vcpus = counters.len();
    let mut stamps: Vec<_> = counters.iter().map(|_| SharedStamps::default()).collect();
    let mut look = || {
        for (index, stamps) in stamps.iter_mut().enumerate() {
            let (stamp, gaps) = (source.guest.stamp(index), source.guest.gaps(index));
            stamps.add(now_ns()?, stamp, &gaps);
        }
        anyhow::Ok(())
    };
    let mut before = start_ns;
    let mut last = Progress {
        at_ns: before,
        error_ns: 0,
        delay_ns: delay_ns()?,
    };
    let mut longest: Option<Seen> = None;
    let stood = loop {
        // The last look comes after the end: what went on while nobody looked is seen by it.
        let last_look = over.get();
        let values = source.guest.counters(vcpus);
        let now = now_ns()?;
        if values != counters {
            let progress = Progress {
                at_ns: now,
                error_ns: now - before,
                delay_ns: delay_ns()?,
            };
            let seen = Seen {
                last_progress_ns: last.at_ns,
                first_progress_ns: now,
                error_ns: last.error_ns + progress.error_ns,
                set_aside_ns: progress.delay_ns - last.delay_ns,
            };
            if longest.is_none_or(|longest| seen.blackout_ns() > longest.blackout_ns()) {
                longest = Some(seen);
            }
            (counters, last) = (values, progress);
        }
        look()?;
        if let Some(stood) = last_look {
            break stood;
        }
        before = now;
        thread::sleep(nap);
    };
    let seen = longest.context("the guest made no progress")?;
    if source.guest.stamp(0) == 0 {
        return Ok(seen);
    }
    let until = now_ns()? + AFTERWARDS_NS;
    while now_ns()? < until {
        thread::sleep(LONG_NAP);
        look()?;
    }
    let dark = stamps.iter().map(|stamps| stamps.dark(stood));
    Ok(sharpened(seen, dark.collect()))
}

/// Makes this thread one that looks at `source` on time; returns how long it is to sleep between two looks.
fn nap(source: &Watched) -> Result<Duration> {
    let nap = prepare()?;
    Ok(match source.guest.stamp(0) {
        0 => nap,
        _ => nap.max(LONG_NAP),
    })
}

/// Makes this thread one that looks on time; returns how long it is to sleep between two looks.
fn prepare() -> Result<Duration> {
    set_timerslack(1)?;
    if !emulated() {
        return Ok(NAP);
    }
    let thread = gettid().to_string();
    let mut renice = Command::new("renice");
    let status = renice.args(["-n", "-20", "-p", &thread]).status();
    let status = status.context("renice")?;
    ensure!(status.success(), "renice ended with {status}");
    Ok(EMULATED_NAP)
}

fn now_ns() -> Result<u64> {
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC)?;
    Ok(now.tv_sec().unsigned_abs() * 1_000_000_000 + now.tv_nsec().unsigned_abs())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stamps_that_can_not_be_sharpen_nothing() {
        let seen = Seen {
            last_progress_ns: 1_000,
            first_progress_ns: 9_000,
            error_ns: 500,
            set_aside_ns: 0,
        };
        let moment = |at_ns| Moment {
            at_ns,
            error_ns: 10,
        };
        let sharp = |stopped, went_on| {
            let dark = Some(vec![(moment(stopped), moment(went_on))]);
            let sharp = sharpened(seen, dark);
            (sharp.last_progress_ns, sharp.first_progress_ns)
        };
        assert_eq!(sharp(1_100, 8_900), (1_100, 8_900));
        assert_eq!(sharp(5_000, 4_990), (5_000, 5_000));
        assert_eq!(sharp(5_000, 4_000), (1_000, 9_000));
    }
}
