//! When events were lost, and so what may lack a part of what was inside it.

use std::ptr;

use super::load::Loaded;
use super::party::{Party, Side};

/// Events that found no room, and when that was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Loss {
    /// All that came before this arrived; 0 where the recorder does not say. Its host's clock, ns.
    pub since_ns: u64,
    /// When the recorder noticed.
    pub until_ns: u64,
    /// How many.
    pub count: u64,
}

impl Loss {
    /// Whether a part of it lies between the two times.
    pub fn meets(&self, start_ns: u64, end_ns: u64) -> bool {
        self.since_ns <= end_ns && start_ns <= self.until_ns
    }
}

/// At most so many losses are told apart in a recording, and in a migration.
pub(super) const MOST: usize = 1 << 16;
const MOST_OF_ONE: usize = 1 << 10;

/// Adds a loss. Where there are `most`, neighbours become one, which is what was lost between the
/// begin of the first and the end of the last.
pub(super) fn add(all: &mut Vec<Loss>, loss: Loss, most: usize) {
    all.push(loss);
    if all.len() < most {
        return;
    }
    all.sort_by_key(|loss| loss.since_ns);
    let two = |two: &[Loss]| {
        two.iter().copied().reduce(|one, next| Loss {
            since_ns: one.since_ns,
            until_ns: one.until_ns.max(next.until_ns),
            count: one.count.saturating_add(next.count),
        })
    };
    *all = all.chunks(2).filter_map(two).collect();
}

/// A loss on a migration's axis.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Placed {
    /// Whose recorder lost them; the source's, where one recorded both sides.
    pub side: Side,
    /// Its begin, or the axis', ns.
    pub start_ns: i64,
    /// When the recorder noticed, ns.
    pub end_ns: i64,
    /// How many.
    pub count: u64,
}

/// What was lost of the recordings of `parties` up to `end_ns` on the axis: each is one side's.
pub(super) fn of<'a>(parties: impl Iterator<Item = &'a Party<'a>>, end_ns: i64) -> Vec<Placed> {
    let mut seen: Vec<&Loaded> = Vec::new();
    let mut lost = Vec::new();
    for party in parties {
        if seen.iter().any(|other| ptr::eq(*other, party.recording)) {
            continue;
        }
        seen.push(party.recording);
        let window = (party.place.back(0), party.place.back(end_ns));
        let mut losses = Vec::new();
        for loss in party.recording.lost.iter() {
            if loss.meets(window.0, window.1) {
                add(&mut losses, *loss, MOST_OF_ONE);
            }
        }
        lost.extend(losses.into_iter().map(|loss| Placed {
            side: party.side,
            start_ns: party.place.at(loss.since_ns).max(0),
            end_ns: party.place.at(loss.until_ns),
            count: loss.count,
        }));
    }
    lost
}

/// All losses of a recording.
#[derive(Clone, Debug, Default)]
pub struct Losses {
    all: Vec<Loss>,
    /// The times that they cover: in order, and apart.
    covered: Vec<(u64, u64)>,
}

impl Losses {
    /// In any order.
    pub(super) fn new(mut all: Vec<Loss>) -> Self {
        all.sort_by_key(|loss| loss.since_ns);
        let mut covered: Vec<(u64, u64)> = Vec::new();
        for loss in &all {
            match covered.last_mut() {
                Some((_, until)) if loss.since_ns <= *until => *until = loss.until_ns.max(*until),
                _ => covered.push((loss.since_ns, loss.until_ns.max(loss.since_ns))),
            }
        }
        Self { all, covered }
    }

    /// Each, by its begin.
    pub fn iter(&self) -> impl Iterator<Item = &Loss> {
        self.all.iter()
    }

    /// All events that were lost.
    pub fn events(&self) -> u64 {
        self.all
            .iter()
            .fold(0, |sum, loss| sum.saturating_add(loss.count))
    }

    /// Whether events were lost between the two times.
    pub fn meet(&self, start_ns: u64, end_ns: u64) -> bool {
        let next = self.covered.partition_point(|(_, until)| *until < start_ns);
        self.covered
            .get(next)
            .is_some_and(|(since, _)| *since <= end_ns)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_ran_meanwhile_is_met() {
        let loss = |since_ns, until_ns, count| Loss {
            since_ns,
            until_ns,
            count,
        };
        let losses = Losses::new(vec![
            loss(50, 60, 2),
            loss(10, 30, 1),
            loss(20, 25, u64::MAX),
        ]);
        assert_eq!(losses.events(), u64::MAX);
        let met = |start, end| losses.meet(start, end);
        assert!(met(0, 10) && met(30, 40) && met(12, 13) && met(0, 100) && met(55, 55));
        assert!(!met(0, 9) && !met(31, 49) && !met(61, u64::MAX));
        // A recorder of old tells only when it noticed.
        assert!(Losses::new(vec![loss(0, 9, 1)]).meet(3, 4));
        assert!(!Losses::default().meet(0, u64::MAX));
    }
}
