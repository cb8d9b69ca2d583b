//! The host's clocks.

use rustix::time::{ClockId, DynamicClockId, Timespec, clock_gettime, clock_gettime_dynamic};

use crate::recording::ClockAnchor;

const SECOND: i64 = 1_000_000_000;

/// `CLOCK_MONOTONIC`, ns: the clock of every record.
pub fn monotonic() -> u64 {
    u64::try_from(ns(clock_gettime(ClockId::Monotonic))).unwrap_or(0)
}

/// CPU time of this process, ns.
pub(super) fn own_cpu() -> u64 {
    u64::try_from(ns(clock_gettime(ClockId::ProcessCPUTime))).unwrap_or(0)
}

/// All clocks at one moment: of several readings the one that took least.
pub(super) fn anchor() -> ClockAnchor {
    let read = || {
        let before = monotonic();
        let realtime = ns(clock_gettime(ClockId::Realtime));
        let after = monotonic();
        (after - before, before + (after - before) / 2, realtime)
    };
    let (_, monotonic_ns, realtime) = (0..8).map(|_| read()).min().unwrap_or_else(read);
    ClockAnchor {
        monotonic_ns,
        realtime_ns: u64::try_from(realtime).unwrap_or(0),
        tai_offset_ns: tai_offset(),
    }
}

/// TAI is ahead of UTC by whole seconds, so the time between two readings does not matter.
fn tai_offset() -> i64 {
    let tai = clock_gettime_dynamic(DynamicClockId::Tai).map_or(0, ns);
    let offset = tai - ns(clock_gettime(ClockId::Realtime));
    if tai == 0 {
        0
    } else {
        (offset + SECOND / 2).div_euclid(SECOND) * SECOND
    }
}

fn ns(time: Timespec) -> i64 {
    time.tv_sec
        .saturating_mul(SECOND)
        .saturating_add(time.tv_nsec)
}
