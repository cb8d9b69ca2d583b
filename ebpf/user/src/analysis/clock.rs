//! How two hosts' clocks relate.

use super::load::Loaded;
use super::spans::Point;

/// How the destination's clock was laid onto the source's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Basis {
    /// Both sides are on one host, or only one side was recorded: one clock.
    OneHost,
    /// The monitor read both clocks in a two-way exchange.
    Samples,
    /// By the wall clocks of both hosts, whose error is unknown.
    WallClock,
}

/// The relation of the destination's monotonic clock to the source's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Clock {
    /// What the destination's shows more, ns.
    pub offset_ns: i64,
    /// How wrong that can be at most, ns, where it can be told.
    pub error_ns: Option<u64>,
    /// Where it is from.
    pub basis: Basis,
}

impl Clock {
    /// The same clock.
    pub const SAME: Self = Self {
        offset_ns: 0,
        error_ns: Some(0),
        basis: Basis::OneHost,
    };
}

/// Whether two recordings tell the time by one clock: they are one, or of one boot of one host.
pub fn same_host(a: &Loaded, b: &Loaded) -> bool {
    std::ptr::eq(a, b) || (!a.header.boot_id.is_empty() && a.header.boot_id == b.header.boot_id)
}

/// The clock of `destination` against that of `source`, by the `clock_sample` moments among
/// `points` (of the source's process, while it migrates).
pub fn relate<'a>(
    source: &Loaded,
    destination: &Loaded,
    points: impl Iterator<Item = &'a Point>,
) -> Clock {
    if same_host(source, destination) {
        return Clock::SAME;
    }
    // The shortest exchange binds the offset most tightly.
    let samples = points
        .filter(|point| point.name() == "clock_sample")
        .filter_map(sample);
    if let Some((error_ns, offset_ns)) = samples.min() {
        return Clock {
            offset_ns,
            error_ns: Some(error_ns),
            basis: Basis::Samples,
        };
    }
    let boot_ns = |loaded: &Loaded| {
        let clock = loaded.header.clock;
        i128::from(clock.realtime_ns) - i128::from(clock.monotonic_ns)
    };
    let offset_ns = i64::try_from(boot_ns(source) - boot_ns(destination)).unwrap_or(0);
    Clock {
        offset_ns,
        error_ns: None,
        basis: Basis::WallClock,
    }
}

/// A sample's error bound and offset, as NTP computes them; `None` if it contradicts itself.
fn sample(point: &Point) -> Option<(u64, i64)> {
    let time = |name| point.args.u64(name).map(i128::from);
    let (t1, t2, t3, t4) = (time("t1")?, time("t2")?, time("t3")?, time("t4")?);
    let delay = (t4 - t1) - (t3 - t2);
    if t4 < t1 || t3 < t2 || delay < 0 {
        return None;
    }
    let offset = ((t2 - t1) + (t3 - t4)) / 2;
    // Half the delay, rounded up: a bound.
    Some((
        u64::try_from((delay + 1) / 2).ok()?,
        i64::try_from(offset).ok()?,
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::analysis::spans::{Event, Meaning, pair};
    use crate::recording::{
        ArgDef, ClockAnchor, Header, ProbeDef, Reader, Value, ValueKind, Writer,
    };

    fn host(name: &str, boot_ns: u64) -> Loaded {
        let clock = ClockAnchor {
            monotonic_ns: 7,
            realtime_ns: boot_ns + 7,
            tai_offset_ns: 0,
        };
        let header = Header {
            boot_id: name.into(),
            clock,
            ..Header::default()
        };
        let bytes = Writer::new(name.into(), Vec::new(), header)
            .unwrap()
            .finish(9)
            .unwrap();
        Loaded::read(
            name.into(),
            Reader::new(name.into(), bytes.as_slice()).unwrap(),
        )
        .unwrap()
    }

    fn samples(samples: &[[u64; 4]]) -> Vec<Point> {
        let arg = |name: &str| ArgDef {
            name: name.into(),
            kind: ValueKind::U64,
        };
        let args = ["t1", "t2", "t3", "t4"].map(arg).to_vec();
        let def = ProbeDef {
            id: 0,
            provider: "vmm".into(),
            name: "clock_sample".into(),
            args,
        };
        let meaning = std::sync::Arc::new(Meaning::of(&def));
        let event = |sample: &[u64; 4]| {
            let values = sample.map(Value::U64).to_vec();
            Event {
                ts_ns: 0,
                meaning: meaning.clone(),
                values,
            }
        };
        pair(samples.iter().map(event).collect()).points
    }

    #[test]
    fn one_boot_is_one_clock() {
        let points = samples(&[[0, 100, 100, 10]]);
        assert_eq!(
            relate(&host("a", 0), &host("a", 5), points.iter()),
            Clock::SAME
        );
    }

    #[test]
    fn the_shortest_exchange_counts_and_bounds_the_error() {
        // The destination shows 1,000 more; the second exchange is quicker, and one-sided.
        let points = samples(&[
            [0, 1_050, 1_060, 100],
            [200, 1_209, 1_210, 211],
            [300, 1, 0, 400],
        ]);
        let clock = relate(&host("a", 0), &host("b", 0), points.iter());
        assert_eq!((clock.offset_ns, clock.error_ns), (1_004, Some(5)));
        assert!(clock.offset_ns.abs_diff(1_000) <= clock.error_ns.unwrap());
        assert_eq!(clock.basis, Basis::Samples);
    }

    #[test]
    fn without_a_sample_the_wall_clocks_are_all_there_is() {
        let points = samples(&[[u64::MAX, 0, u64::MAX, 0]]);
        let clock = relate(&host("a", 900), &host("b", 400), points.iter());
        // The host that booted later shows less.
        let expected = Clock {
            offset_ns: 500,
            error_ns: None,
            basis: Basis::WallClock,
        };
        assert_eq!(clock, expected);
    }
}
