//! How two hosts' clocks relate.

use super::load::Loaded;
use super::spans::Point;
use crate::recording::{ClockAnchor, Header, Relation};

pub use crate::recording::Basis;

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

    /// The relation seen from the other side.
    #[must_use]
    pub fn reversed(self) -> Self {
        Self {
            offset_ns: self.offset_ns.saturating_neg(),
            ..self
        }
    }
}

impl From<Relation> for Clock {
    fn from(relation: Relation) -> Self {
        let Relation {
            offset_ns,
            error_ns,
            basis,
        } = relation;
        Self {
            offset_ns,
            error_ns,
            basis,
        }
    }
}

/// Whether two recordings tell the time by one clock: they are one, or of one boot of one host.
pub fn same_host(a: &Loaded, b: &Loaded) -> bool {
    std::ptr::eq(a, b) || same_boot(&a.header, &b.header)
}

fn same_boot(a: &Header, b: &Header) -> bool {
    !a.boot_id.is_empty() && a.boot_id == b.boot_id
}

/// The clock of `destination` against that of `source`, without a look at what happened: they are of
/// one host, or were joined.
pub fn told(source: &Loaded, destination: &Loaded) -> Option<Clock> {
    if same_host(source, destination) {
        return Some(Clock::SAME);
    }
    let joined = |to: &Loaded, it: &Loaded| {
        let (first, relation) = it.joined.as_ref()?;
        (*first == to.header || same_boot(first, &to.header)).then(|| Clock::from(*relation))
    };
    joined(source, destination).or_else(|| Some(joined(destination, source)?.reversed()))
}

/// The clock of `destination` against that of `source`: as somebody gave it, or by the
/// `clock_sample` moments among `points` (of the source's process, while it migrates), or as it was
/// told when the two were joined, or by the clocks that all the world shares.
pub fn relate<'a>(
    source: &Loaded,
    destination: &Loaded,
    points: impl Iterator<Item = &'a Point>,
) -> Clock {
    let told = told(source, destination);
    if let Some(clock) = told
        && matches!(clock.basis, Basis::OneHost | Basis::Given)
    {
        return clock;
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
    told.unwrap_or_else(|| by_world(source, destination))
}

fn by_world(source: &Loaded, destination: &Loaded) -> Clock {
    let (source, destination) = (source.header.clock, destination.header.clock);
    let has_tai = source.tai_offset_ns != 0 && destination.tai_offset_ns != 0;
    let boot_ns = |clock: ClockAnchor| {
        let tai = if has_tai { clock.tai_offset_ns } else { 0 };
        i128::from(clock.realtime_ns) + i128::from(tai) - i128::from(clock.monotonic_ns)
    };
    Clock {
        offset_ns: i64::try_from(boot_ns(source) - boot_ns(destination)).unwrap_or(0),
        error_ns: None,
        basis: if has_tai {
            Basis::Tai
        } else {
            Basis::WallClock
        },
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
    use crate::recording::{ArgDef, ProbeDef, Reader, Value, ValueKind, Writer};

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
        .remove(0)
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

    #[test]
    fn what_was_given_outranks_what_was_sampled_and_that_what_was_told() {
        let relation = |basis| Relation {
            offset_ns: 77,
            error_ns: Some(3),
            basis,
        };
        let (source, mut destination) = (host("a", 0), host("b", 0));
        let points = samples(&[[0, 1_050, 1_060, 100]]);
        for (basis, expected) in [(Basis::Given, 77), (Basis::Samples, 1_005)] {
            destination.joined = Some((source.header.clone(), relation(basis)));
            let clock = relate(&source, &destination, points.iter());
            assert_eq!(clock.offset_ns, expected, "{basis:?}");
            let back = relate(&destination, &source, [].iter());
            assert_eq!((back.offset_ns, back.error_ns), (-77, Some(3)));
        }
        destination.joined = Some((host("c", 0).header, relation(Basis::Given)));
        assert_eq!(told(&source, &destination), None);
    }

    #[test]
    fn atomic_time_is_better_than_civil_time() {
        let (mut source, mut destination) = (host("a", 900), host("b", 400));
        source.header.clock.tai_offset_ns = 37;
        destination.header.clock.tai_offset_ns = 36;
        let clock = relate(&source, &destination, [].iter());
        assert_eq!((clock.offset_ns, clock.basis), (501, Basis::Tai));
    }
}
