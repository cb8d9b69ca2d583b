//! The other side's clock, read as NTP reads it (RFC 5905, section 8): four timestamps a sample.

/// How fast two monotonic clocks drift apart at most, in parts per million: twice the tolerance
/// that NTP assumes of one crystal (RFC 5905, PHI = 15 ppm). A sample ages by this much.
const DRIFT_PPM: i128 = 30;

/// One two-way reading of both clocks, ns of each side's `CLOCK_MONOTONIC`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Sample {
    /// Request sent, source.
    pub(super) t1: u64,
    /// Request received, destination.
    pub(super) t2: u64,
    /// Answer sent, destination.
    pub(super) t3: u64,
    /// Answer received, source.
    pub(super) t4: u64,
}

/// What the samples say of the destination's clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Estimate {
    /// Destination minus source, ns.
    pub(super) offset_ns: i64,
    /// The offset is off by no more than this, ns: half the round trip, and drift since.
    pub(super) error_ns: u64,
}

impl Estimate {
    /// A time of the destination's clock on the source's.
    pub(super) fn to_source(self, destination_ns: u64) -> i64 {
        clamp(i128::from(destination_ns) - i128::from(self.offset_ns))
    }
}

/// Keeps the sample that bounds the offset best.
#[derive(Clone, Debug, Default)]
pub(super) struct Clock {
    best: Option<(Estimate, u64)>,
    samples: u64,
}

impl Clock {
    /// Takes one sample into account. Timestamps that run backwards come from a peer that is
    /// broken or lies; such a sample is ignored and `false` returned.
    pub(super) fn add(&mut self, sample: Sample) -> bool {
        let [t1, t2, t3, t4] = [sample.t1, sample.t2, sample.t3, sample.t4].map(i128::from);
        let round_trip = (t4 - t1) - (t3 - t2);
        let offset = ((t2 - t1) + (t3 - t4)) / 2;
        let (Ok(offset_ns), Ok(error)) = (i64::try_from(offset), u64::try_from(round_trip)) else {
            return false;
        };
        if t3 < t2 {
            return false;
        }
        self.samples += 1;
        let fresh = Estimate {
            offset_ns,
            error_ns: error.div_ceil(2),
        };
        if self
            .at(sample.t4)
            .is_none_or(|old| fresh.error_ns <= old.error_ns)
        {
            self.best = Some((fresh, sample.t4));
        }
        true
    }

    /// The estimate as it stands at `now_ns` of the source's clock, or `None` without a sample.
    pub(super) fn at(&self, now_ns: u64) -> Option<Estimate> {
        let (estimate, taken_ns) = self.best?;
        let age = i128::from(now_ns.saturating_sub(taken_ns));
        let drift = u64::try_from(age * DRIFT_PPM / 1_000_000).unwrap_or(u64::MAX);
        Some(Estimate {
            error_ns: estimate.error_ns.saturating_add(drift),
            ..estimate
        })
    }

    /// How many samples were taken into account.
    pub(super) fn samples(&self) -> u64 {
        self.samples
    }
}

fn clamp(value: i128) -> i64 {
    i64::try_from(value).unwrap_or(if value < 0 { i64::MIN } else { i64::MAX })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(t1: u64, t2: u64, t3: u64, t4: u64) -> Sample {
        Sample { t1, t2, t3, t4 }
    }

    #[test]
    fn the_offset_is_within_the_stated_error_however_the_delay_is_split() {
        for (out, back) in [(50, 50), (100, 0), (0, 100)] {
            let mut clock = Clock::default();
            // The destination is 1 s ahead and takes 7 ns to answer.
            let t2 = 1_000 + out + 1_000_000_000;
            assert!(clock.add(sample(1_000, t2, t2 + 7, 1_000 + out + 7 + back)));
            let estimate = clock.at(1_000).unwrap();
            assert_eq!(estimate.error_ns, 50);
            assert!(estimate.offset_ns.abs_diff(1_000_000_000) <= estimate.error_ns);
        }
    }

    #[test]
    fn a_shorter_round_trip_wins_until_it_has_aged() {
        let mut clock = Clock::default();
        clock.add(sample(0, 10, 10, 20));
        clock.add(sample(100, 200, 200, 300));
        assert_eq!(
            clock.at(300).unwrap(),
            Estimate {
                offset_ns: 0,
                error_ns: 10
            }
        );
        // After ten seconds the first sample is worth ±300 µs, and ±100 ns is better again.
        let later = 10_000_000_000;
        assert_eq!(clock.at(later).unwrap().error_ns, 10 + 299_999);
        clock.add(sample(later, later + 105, later + 105, later + 200));
        assert_eq!(
            clock.at(later + 200).unwrap(),
            Estimate {
                offset_ns: 5,
                error_ns: 100
            }
        );
        assert_eq!(clock.samples(), 3);
    }

    #[test]
    fn timestamps_that_make_no_sense_are_ignored() {
        let mut clock = Clock::default();
        assert!(
            !clock.add(sample(10, 5, 5, 9)),
            "the answer came before the request"
        );
        assert!(!clock.add(sample(0, 9, 5, 9)), "the peer's clock went back");
        assert!(
            !clock.add(sample(0, 0, u64::MAX, 9)),
            "the peer held it for longer than we waited"
        );
        assert!(clock.add(sample(0, u64::MAX / 2, u64::MAX / 2, 9)));
        assert!(
            !clock.add(sample(0, u64::MAX, u64::MAX, 9)),
            "the offset does not fit"
        );
    }

    #[test]
    fn a_time_of_the_destination_is_mapped_to_the_source() {
        let estimate = Estimate {
            offset_ns: -5,
            error_ns: 0,
        };
        assert_eq!(estimate.to_source(10), 15);
        assert_eq!(
            Estimate {
                offset_ns: i64::MIN,
                error_ns: 0
            }
            .to_source(u64::MAX),
            i64::MAX
        );
    }
}
