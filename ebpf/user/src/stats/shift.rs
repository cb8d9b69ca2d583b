//! By how much the second sample is larger: the Hodges–Lehmann estimate and its interval.

use fastrand::Rng;

use super::z_above;

/// Resamplings for an interval, where the samples are not too large for so many.
const RESAMPLES: usize = 1_000;

/// The fewest resamplings.
const RESAMPLES_MIN: usize = 400;

/// Values that one interval may draw.
const DRAWS: usize = 400_000;

/// Up to so many differences are written down and sorted in part, which for few is quicker.
const FEW: usize = 4_096;

/// Any seed will do, but always the same: the same recordings give the same verdict.
const SEED: u64 = 0x00b1_ac00_7000_0000;

/// A shift and the interval that holds the true one with the confidence that was asked for.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Shift {
    /// The estimate: the median of all differences between a value of the second sample and one of
    /// the first.
    pub estimate: i64,
    /// The interval's lower end.
    pub low: i64,
    /// Its upper end.
    pub high: i64,
    /// The estimate's standard error.
    pub error: f64,
}

/// The shift from `first` to `second`, both sorted, with its bootstrap interval (percentiles) of
/// `confidence`, such as 0.95. `None` if either is empty.
pub fn estimate(first: &[i64], second: &[i64], confidence: f64) -> Option<Shift> {
    let estimate = hodges_lehmann(first, second)?;
    let draws = (first.len() + second.len()).max(1);
    let resamples = (DRAWS / draws).clamp(RESAMPLES_MIN, RESAMPLES);
    let mut rng = Rng::with_seed(SEED);
    let mut drawn = (Vec::new(), Vec::new());
    let mut differences = Vec::new();
    let mut estimates = Vec::with_capacity(resamples);
    for _ in 0..resamples {
        resample(&mut rng, first, &mut drawn.0);
        resample(&mut rng, second, &mut drawn.1);
        if first.len() * second.len() <= FEW {
            estimates.extend(of_few(&drawn.0, &drawn.1, &mut differences));
        } else {
            drawn.0.sort_unstable();
            drawn.1.sort_unstable();
            estimates.extend(hodges_lehmann(&drawn.0, &drawn.1));
        }
    }
    estimates.sort_unstable();
    let outside = (1.0 - confidence) / 2.0;
    let (low, high) = (
        super::quantile(&estimates, outside)?,
        super::quantile(&estimates, 1.0 - outside)?,
    );
    // From the interval's width rather than the estimates' variance: one wild value among few would
    // dominate that.
    let error = high.saturating_sub(low) as f64 / (2.0 * z_above(outside));
    Some(Shift {
        estimate,
        low,
        high,
        error,
    })
}

/// The median of all differences `second[j] - first[i]` of two sorted samples.
pub fn hodges_lehmann(first: &[i64], second: &[i64]) -> Option<i64> {
    let pairs = first.len() as u64 * second.len() as u64;
    let upper = nth_difference(first, second, pairs / 2)?;
    if pairs % 2 == 1 {
        return Some(upper);
    }
    Some(nth_difference(first, second, pairs / 2 - 1)?.midpoint(upper))
}

/// The same of samples in any order, with the differences written into `all`.
fn of_few(first: &[i64], second: &[i64], all: &mut Vec<i64>) -> Option<i64> {
    all.clear();
    for second in second {
        all.extend(first.iter().map(|first| second.saturating_sub(*first)));
    }
    let middle = all.len() / 2;
    if middle >= all.len() {
        return None;
    }
    let (below, upper, _) = all.select_nth_unstable(middle);
    let upper = *upper;
    if first.len() * second.len() % 2 == 1 {
        return Some(upper);
    }
    Some(below.iter().max()?.midpoint(upper))
}

/// The difference with exactly `n` before it in order. Found by halving the range of values, so it
/// needs no memory for the pairs.
fn nth_difference(first: &[i64], second: &[i64], n: u64) -> Option<i64> {
    let mut low = second.first()?.saturating_sub(*first.last()?);
    let mut high = second.last()?.saturating_sub(*first.first()?);
    while low < high {
        let middle = low.midpoint(high);
        // `midpoint` rounds towards zero, which of negative numbers may be the upper one.
        let middle = if middle == high { middle - 1 } else { middle };
        if up_to(first, second, middle) > n {
            high = middle;
        } else {
            low = middle + 1;
        }
    }
    Some(low)
}

/// How many differences are at most `bound`.
fn up_to(first: &[i64], second: &[i64], bound: i64) -> u64 {
    let mut below = 0;
    let mut count = 0;
    for value in second {
        // The larger the value, the more of the first sample are too small for the bound.
        let least = value.saturating_sub(bound);
        while first.get(below).is_some_and(|first| *first < least) {
            below += 1;
        }
        count += (first.len() - below) as u64;
    }
    count
}

fn resample(rng: &mut Rng, from: &[i64], into: &mut Vec<i64>) {
    into.clear();
    into.extend((0..from.len()).filter_map(|_| from.get(rng.usize(..from.len()))));
}

#[cfg(test)]
mod tests {
    use super::*;

    fn by_hand(first: &[i64], second: &[i64]) -> i64 {
        let mut all: Vec<_> = second
            .iter()
            .flat_map(|s| first.iter().map(move |f| s - f))
            .collect();
        all.sort_unstable();
        super::super::median(&all).unwrap()
    }

    #[test]
    fn the_estimate_is_the_median_of_all_differences() {
        let mut rng = Rng::with_seed(1);
        for _ in 0..200 {
            let mut sample = |most: usize| {
                let mut values: Vec<i64> = (0..rng.usize(1..most))
                    .map(|_| rng.i64(-50..1_000))
                    .collect();
                values.sort_unstable();
                values
            };
            let (first, second) = (sample(9), sample(12));
            assert_eq!(
                hodges_lehmann(&first, &second),
                Some(by_hand(&first, &second)),
                "{first:?} {second:?}"
            );
            assert_eq!(
                of_few(&first, &second, &mut Vec::new()),
                Some(by_hand(&first, &second))
            );
        }
        assert_eq!(hodges_lehmann(&[], &[1]), None);
    }

    #[test]
    fn the_interval_holds_the_shift_and_repeats() {
        let first: Vec<i64> = (0..20).map(|i| 1_000 + i * i).collect();
        let second: Vec<i64> = first.iter().map(|value| value + 500).collect();
        let shift = estimate(&first, &second, 0.95).unwrap();
        assert_eq!(shift.estimate, 500);
        assert!(shift.low < 500 && 500 < shift.high, "{shift:?}");
        assert!(shift.error > 0.0);
        assert_eq!(estimate(&first, &second, 0.95), Some(shift));
    }

    #[test]
    fn what_never_varies_has_no_error() {
        let shift = estimate(&[7; 5], &[9; 5], 0.95).unwrap();
        assert_eq!((shift.estimate, shift.low, shift.high), (2, 2, 2));
        assert!(shift.error.abs() < 1e-12);
    }
}
