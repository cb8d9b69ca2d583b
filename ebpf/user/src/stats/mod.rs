//! Two samples of durations: is the second slower, by how much, and how sure is that?
//!
//! Durations of a blackout are few, skewed and have outliers, so nothing here assumes a
//! distribution or removes a value: [`rank`] compares by ranks, [`shift`] estimates by medians of
//! differences. [`family`] keeps many comparisons at once honest. Values are ns (or, in counting
//! mode, instructions) as `i64`; all of it is deterministic.

pub mod family;
pub mod rank;
pub mod shift;

use statrs::distribution::{ContinuousCDF, Normal};

/// Values above this are taken for it, so that sums and differences of two cannot overflow: 73
/// years in ns.
pub const LARGEST: i64 = 1 << 61;

/// A duration as the functions here take it.
pub fn value(ns: u64) -> i64 {
    i64::try_from(ns).unwrap_or(LARGEST).min(LARGEST)
}

/// The quantile `q`, from 0 to 1, of sorted values: the smallest of them that at least `q` of them
/// do not exceed. `None` of nothing.
pub fn quantile(sorted: &[i64], q: f64) -> Option<i64> {
    let rank = (q * sorted.len() as f64).ceil() as usize;
    sorted.get(rank.max(1) - 1).or(sorted.last()).copied()
}

/// The median of sorted values; between the two in the middle of an even number.
pub fn median(sorted: &[i64]) -> Option<i64> {
    let middle = sorted.len() / 2;
    let upper = *sorted.get(middle)?;
    if sorted.len() % 2 == 1 {
        return Some(upper);
    }
    Some(sorted.get(middle.checked_sub(1)?)?.midpoint(upper))
}

/// How many standard deviations above the mean a normal variable is with probability `p`.
pub(crate) fn z_above(p: f64) -> f64 {
    Normal::standard().inverse_cdf(1.0 - p.clamp(1e-12, 1.0 - 1e-12))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_values_that_were_seen() {
        let sorted = [10, 20, 30, 40];
        assert_eq!(quantile(&sorted, 0.0), Some(10));
        assert_eq!(quantile(&sorted, 0.5), Some(20));
        assert_eq!(quantile(&sorted, 0.51), Some(30));
        assert_eq!(quantile(&sorted, 1.0), Some(40));
        assert_eq!(quantile(&[], 0.5), None);
    }

    #[test]
    fn the_median_of_an_even_number_lies_between() {
        assert_eq!(median(&[1, 2, 3]), Some(2));
        assert_eq!(median(&[1, 2, 5, 9]), Some(3));
        assert_eq!(median(&[]), None);
    }

    #[test]
    fn no_value_is_too_large() {
        assert_eq!(value(u64::MAX), LARGEST);
        assert_eq!(value(7), 7);
    }
}
