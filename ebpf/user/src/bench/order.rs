//! Whose turn it is, and when to look.
//!
//! A machine warms up, slows down and has neighbours: runs of one monitor after those of the other
//! would measure that. In the order ABBA BAAB a drift that is even falls on both alike, and so does
//! half of one that is not.
//!
//! Whoever looks after each run and ends when the answer pleases finds a difference sooner or later,
//! also where there is none. So the looks are few and known beforehand, and share the probabilities
//! of error between them: whenever the series ends, it was wrong as often as a single check may be.

use crate::gate::Settings;

/// Each look has so many times the runs of the one before.
const GROWTH: f64 = 1.6;

/// One of the two monitors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turn {
    /// The one that the other is held against.
    Baseline,
    /// The one that is judged.
    Current,
}

/// Whose turn run `index` is, counted from 0.
pub fn turn(index: usize) -> Turn {
    let inner = matches!(index % 4, 1 | 2);
    let mirrored = index / 4 % 2 == 1;
    if inner == mirrored {
        Turn::Baseline
    } else {
        Turn::Current
    }
}

/// The numbers of runs of each monitor at which to look, ascending: even ones, so that whole blocks
/// of four are done, except for the last.
pub fn looks(first: usize, last: usize) -> Vec<usize> {
    let mut looks = Vec::new();
    let mut next = first.next_multiple_of(2);
    while next < last {
        looks.push(next);
        let grown = (next as f64 * GROWTH) as usize;
        next = grown.max(next + 2).next_multiple_of(2);
    }
    looks.push(last);
    looks
}

/// The settings of one of so many looks: each has its share of α and of the misses.
pub fn shared(settings: &Settings, looks: usize) -> Settings {
    let share = 1.0 / looks.max(1) as f64;
    Settings {
        alpha: settings.alpha * share,
        miss: settings.miss * share,
        ..settings.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn turns_mirror_each_other_and_are_even_after_each_four() {
        let turns: Vec<_> = (0..8)
            .map(|index| match turn(index) {
                Turn::Baseline => 'A',
                Turn::Current => 'B',
            })
            .collect();
        assert_eq!(turns, "ABBABAAB".chars().collect::<Vec<_>>());
    }

    #[test]
    fn looks_are_few_and_end_with_the_last_run() {
        assert_eq!(looks(8, 40), [8, 12, 20, 32, 40]);
        assert_eq!(looks(8, 8), [8]);
        assert_eq!(looks(8, 5), [5]);
        assert_eq!(looks(1, 5), [2, 4, 5]);
    }

    #[test]
    fn looks_share_the_errors() {
        let settings = Settings::default();
        let shared = shared(&settings, 5);
        assert!((shared.alpha * 5.0 - settings.alpha).abs() < 1e-12);
        assert!((shared.miss * 5.0 - settings.miss).abs() < 1e-12);
        assert_eq!(shared.relative, settings.relative);
    }
}
