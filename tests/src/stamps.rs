//! A vCPU's own clock, laid over the host's by looking at both.
//!
//! A guest that stamps its progress says when it stopped and when it went on more sharply than anybody
//! can who looks from time to time. What each side's clock reads is found by many looks: none finds a
//! stamp before it was made, and the least late ones hardly later.

use std::ops::Range;

use blackout_abi::guest::{GAP_TICKS, Gap};

/// A moment of the host's clock, and how far it may be off, ns.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Moment {
    pub(crate) at_ns: u64,
    pub(crate) error_ns: u64,
}

/// What the host's clock read when a stamp was found, in order.
#[derive(Debug, Default)]
pub(crate) struct Looks {
    looks: Vec<(u64, u64)>,
}

/// Fewer looks than this tell nothing.
const LOOKS: usize = 12;

/// Looks further from a stamp than this do not count for it: a clock's rate is known to some parts in
/// a hundred thousand. 50 ms, in ns.
const NEAR_NS: u64 = 50_000_000;

impl Looks {
    /// Adds a look that found `stamp` and ended at `now_ns`.
    pub(crate) fn add(&mut self, now_ns: u64, stamp: u64) {
        if self.looks.last().is_none_or(|(_, last)| *last != stamp) {
            self.looks.push((now_ns, stamp));
        }
    }

    /// Those of which `wanted` says so of time and stamp.
    fn only(&self, wanted: impl Fn(u64, u64) -> bool) -> Looks {
        let looks = self.looks.iter().copied();
        Looks {
            looks: looks.filter(|&(now, stamp)| wanted(now, stamp)).collect(),
        }
    }

    /// How long they took, ns.
    fn length_ns(&self) -> u64 {
        match (self.looks.first(), self.looks.last()) {
            (Some((first, _)), Some((last, _))) => last - first,
            _ => 0,
        }
    }

    /// A tick, ns: by the least late looks at the begin and at the end.
    fn tick_ns(&self) -> Option<f64> {
        let third = self.looks.len() / 3;
        if self.looks.len() < LOOKS {
            return None;
        }
        let (first, last) = (self.looks.first()?, self.looks.last()?);
        let between = |a: &(u64, u64), b: &(u64, u64)| {
            (b.0 - a.0) as f64 / b.1.wrapping_sub(a.1).cast_signed() as f64
        };
        let rough = between(first, last);
        let late = |look: &&(u64, u64)| {
            let ticks = look.1.wrapping_sub(first.1).cast_signed();
            (look.0 - first.0) as f64 - ticks as f64 * rough
        };
        let least = |looks: &'_ [(u64, u64)]| {
            let least = looks.iter().min_by(|a, b| late(a).total_cmp(&late(b)));
            least.copied()
        };
        let begin = least(&self.looks[..third])?;
        let end = least(&self.looks[self.looks.len() - third..])?;
        Some(between(&begin, &end)).filter(|tick| tick.is_finite() && *tick > 0.0)
    }

    /// When `stamp` was made.
    fn time_of(&self, stamp: u64, tick_ns: f64) -> Option<Moment> {
        let times = self.looks.iter().map(|(now, seen)| {
            let since_ns = seen.wrapping_sub(stamp).cast_signed() as f64 * tick_ns;
            (since_ns, *now as f64 - since_ns)
        });
        let near = times.filter(|(since_ns, _)| since_ns.abs() < NEAR_NS as f64);
        let mut times: Vec<_> = near.map(|(_, at)| at).collect();
        times.sort_by(f64::total_cmp);
        // As far as the third is from the first, the first may be from the truth.
        let [first, _, third, ..] = times[..] else {
            return None;
        };
        Some(Moment {
            at_ns: first as u64,
            error_ns: (third - first) as u64,
        })
    }
}

/// One vCPU, as it was seen at both sides.
#[derive(Debug, Default)]
pub(crate) struct Stamps {
    pub(crate) source: Looks,
    pub(crate) destination: Looks,
    /// Those that may be what is looked for.
    gaps: Vec<Gap>,
}

impl Stamps {
    /// Keeps those of `gaps`, at the destination, that begin with the source's last stamp, and one that
    /// follows on that: a vCPU may be stopped between reading its clock and making a stamp of it.
    pub(crate) fn stood_still(&mut self, last: u64, gaps: &[Gap]) {
        let first = |gap: &&Gap| gap.from.wrapping_sub(last) <= GAP_TICKS;
        let Some(first) = gaps.iter().find(first) else {
            return;
        };
        let next = gaps.iter().find(|gap| gap.from == first.to);
        for gap in [first].into_iter().chain(next) {
            if !self.gaps.contains(gap) {
                self.gaps.push(*gap);
            }
        }
    }

    /// When it stopped at the source and went on at the destination; `None` for a guest that does not
    /// say, or was not looked at enough.
    pub(crate) fn dark(&self) -> Option<(Moment, Moment)> {
        let dark = self.gaps.iter().filter_map(|gap| self.around(gap));
        dark.max_by_key(|(stopped, went_on)| went_on.at_ns.saturating_sub(stopped.at_ns))
    }

    fn around(&self, gap: &Gap) -> Option<(Moment, Moment)> {
        // The source's stamps come with its RAM, and the last one is there until there is a new one.
        let new = |stamp: u64| stamp.wrapping_sub(gap.to).cast_signed() >= 0;
        let destination = self.destination.only(|_, stamp| new(stamp));
        let longest = match self.source.length_ns() > destination.length_ns() {
            true => &self.source,
            false => &destination,
        };
        let tick_ns = longest.tick_ns()?;
        let from = self.source.time_of(gap.from, tick_ns)?;
        Some((from, destination.time_of(gap.to, tick_ns)?))
    }
}

/// One vCPU in RAM that both sides have, as it was seen.
#[derive(Debug, Default)]
pub(crate) struct SharedStamps {
    looks: Looks,
    gaps: Vec<Gap>,
}

impl SharedStamps {
    /// Adds a look that found `stamp` and `gaps` and ended at `now_ns`.
    pub(crate) fn add(&mut self, now_ns: u64, stamp: u64, gaps: &[Gap]) {
        self.looks.add(now_ns, stamp);
        for gap in gaps {
            if !self.gaps.contains(gap) {
                self.gaps.push(*gap);
            }
        }
    }

    /// When it stopped and when it went on, around the middle of `stood`: it ran at one side before all of
    /// that, and after it at the other one, by a clock that may be another one.
    pub(crate) fn dark(&self, stood: &Range<u64>) -> Option<(Moment, Moment)> {
        // It runs for a while after the word to stop.
        let middle = stood.start.midpoint(stood.end);
        self.gaps.iter().find_map(|gap| {
            let stamps = Stamps {
                source: self.looks.only(|now, _| now < stood.start),
                destination: self.looks.only(|now, _| now > stood.end),
                gaps: vec![*gap],
            };
            let dark = stamps.dark()?;
            (dark.0.at_ns..dark.1.at_ns)
                .contains(&middle)
                .then_some(dark)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Looks every 100 us at a clock of 2.5 GHz that shows `ahead` ticks more, each late by another
    /// part of 10 us, and some by none.
    fn looks(from_ns: u64, ahead: u64) -> Looks {
        let mut looks = Looks::default();
        for look in 0..300 {
            let made_ns = from_ns + look * 100_000;
            let stamp = (made_ns * 5 / 2).wrapping_add(ahead);
            looks.add(made_ns + look * 7_919 % 10_000, stamp);
        }
        looks
    }

    #[test]
    fn two_clocks_are_laid_over_one() {
        let ahead = 1 << 40;
        let mut stamps = Stamps {
            source: looks(1_000_000_000, 0),
            destination: looks(1_032_000_000, ahead),
            gaps: Vec::new(),
        };
        let from = 1_030_000_000 * 5 / 2;
        let to = 1_031_500_000 * 5 / 2 + ahead;
        let others = [
            Gap { from: 5, to: 9 },
            Gap {
                from: to,
                to: to + 5,
            },
        ];
        stamps.stood_still(from, &others);
        assert!(stamps.dark().is_none());
        stamps.stood_still(from - 40, &[others[1], Gap { from, to }]);
        // RAM that arrives has the source's stamps, and a guest that has counted none of its own yet.
        let arrived = [(1_029_100_000, from - 2_500_000), (1_031_450_000, from)];
        stamps.destination.looks.splice(..0, arrived);
        let (stopped, went_on) = stamps.dark().unwrap();
        assert!(stopped.at_ns.abs_diff(1_030_000_000) < 300, "{stopped:?}");
        assert!(went_on.at_ns.abs_diff(1_031_500_000) < 300, "{went_on:?}");
        assert!(stopped.error_ns < 300 && went_on.error_ns < 300);

        // The last stamp that was made there is older: it had read its clock again when it was stopped.
        stamps.gaps.clear();
        let before = Gap {
            from: from - 400_000,
            to: from,
        };
        stamps.stood_still(before.from, &[before, Gap { from, to }]);
        let (stopped, _) = stamps.dark().unwrap();
        assert!(stopped.at_ns.abs_diff(1_030_000_000) < 300, "{stopped:?}");
    }

    #[test]
    fn of_a_guest_in_shared_ram_the_gap_around_the_switchover_counts() {
        // The clock stands still from 30.2 to 31.4 ms.
        let late = 1_200_000 * 5 / 2;
        let mut seen = SharedStamps::default();
        let gap = |from_ns: u64, to_ns: u64, late: u64| Gap {
            from: from_ns * 5 / 2,
            to: to_ns * 5 / 2 - late,
        };
        let wanted = gap(1_030_000_000, 1_031_500_000, late);
        let others = [
            gap(1_020_000_000, 1_020_500_000, 0),
            gap(1_040_000_000 - 1_200_000, 1_047_000_000, late),
        ];
        for &(now, stamp) in &looks(1_000_000_000, 0).looks {
            seen.add(now, stamp, &others[..1]);
        }
        let stood = 1_030_100_000..1_031_400_000;
        seen.add(1_031_450_000, wanted.from, &[others[0], wanted]);
        assert!(seen.dark(&stood).is_none());
        for &(now, stamp) in &looks(1_031_500_000, 0_u64.wrapping_sub(late)).looks {
            seen.add(now, stamp, &[wanted, others[1]]);
        }
        let (stopped, went_on) = seen.dark(&stood).unwrap();
        assert!(stopped.at_ns.abs_diff(1_030_000_000) < 300, "{stopped:?}");
        assert!(went_on.at_ns.abs_diff(1_031_500_000) < 300, "{went_on:?}");
    }

    #[test]
    fn a_clock_that_stands_tells_nothing() {
        let mut stamps = Stamps::default();
        for look in 0..1_000 {
            stamps.source.add(look, 0);
            stamps.destination.add(look, 0);
        }
        stamps.stood_still(
            0,
            &[Gap {
                from: 0,
                to: 1 << 30,
            }],
        );
        assert!(stamps.dark().is_none());
    }
}
