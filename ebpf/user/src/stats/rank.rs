//! The one-sided Mann–Whitney test.
//!
//! Where it is affordable the p-value is exact: the share of all ways to deal the pooled ranks out
//! to the two samples in which the second gets at least the rank sum that it has. Ties share their
//! mean rank, and the count is over the ranks as they are, so it stays exact with ties, which tables
//! and most libraries' exact tests do not. Above that, the normal approximation with corrections for
//! ties and continuity.

use statrs::distribution::{ContinuousCDF, Normal};

/// Up to so many additions the p-value is counted out: some 30 + 30 values, a few milliseconds.
const AFFORDABLE: u128 = 12_000_000;

/// The probability of ranks that speak for `second` being larger as strongly as these, or more, if
/// both samples are from one distribution. 1 if either is empty.
pub fn p_larger(first: &[i64], second: &[i64]) -> f64 {
    if first.is_empty() || second.is_empty() {
        return 1.0;
    }
    let pooled = Pooled::new(first, second);
    // Counting subsets is cheaper for the smaller sample; its rank sum says the same.
    let (size, sum) = if second.len() <= first.len() {
        (second.len(), pooled.second_sum)
    } else {
        let total: u64 = pooled.ranks.iter().sum();
        (first.len(), total - pooled.second_sum)
    };
    let largest: u64 = pooled.ranks.iter().rev().take(size).sum();
    let additions = u128::from(largest) * size as u128 * pooled.ranks.len() as u128;
    if additions > AFFORDABLE {
        return pooled.p_normal(first.len(), second.len());
    }
    let counts = subset_sums(&pooled.ranks, size, largest);
    let all: f64 = counts.iter().sum();
    let place = usize::try_from(sum).unwrap_or(usize::MAX);
    let (below, from) = counts.split_at(place.min(counts.len()));
    let extreme: f64 = if second.len() <= first.len() {
        from.iter().sum()
    } else {
        // Where the first sample's sum is at most this, the second's is at least that.
        below.iter().chain(from.first()).sum()
    };
    (extreme / all).min(1.0)
}

/// The least p-value that samples of these sizes can have: all of one above all of the other.
pub fn least_p(first: usize, second: usize) -> f64 {
    // 1 / C(first + second, second), a factor at a time.
    (1..=second).fold(1.0, |p, k| p * k as f64 / (first + k) as f64)
}

/// Ranks of both samples together, doubled if a mean rank lies between two numbers.
struct Pooled {
    /// In order.
    ranks: Vec<u64>,
    /// The sum of the second sample's.
    second_sum: u64,
    /// What one place is worth: 1, or 2 where ranks are doubled.
    unit: u64,
    /// Σ t³ − t over the groups of t equal values.
    ties: f64,
}

impl Pooled {
    fn new(first: &[i64], second: &[i64]) -> Self {
        let mut values: Vec<_> = first
            .iter()
            .map(|value| (*value, false))
            .chain(second.iter().map(|value| (*value, true)))
            .collect();
        values.sort_unstable();
        let groups = || values.chunk_by(|one, next| one.0 == next.0);
        let unit = if groups().any(|group| group.len() % 2 == 0) {
            2
        } else {
            1
        };
        let mut pooled = Self {
            ranks: Vec::with_capacity(values.len()),
            second_sum: 0,
            unit,
            ties: 0.0,
        };
        for group in groups() {
            let before = pooled.ranks.len() as u64;
            // The mean of before + 1 to before + length.
            let rank = unit * (2 * before + group.len() as u64 + 1) / 2;
            let of_second = group.iter().filter(|(_, second)| *second).count() as u64;
            pooled.second_sum += rank * of_second;
            pooled.ranks.extend(group.iter().map(|_| rank));
            let length = group.len() as f64;
            pooled.ties += length.powi(3) - length;
        }
        pooled
    }

    fn p_normal(&self, first: usize, second: usize) -> f64 {
        let (m, n) = (first as f64, second as f64);
        let all = m + n;
        let sum = self.second_sum as f64 / self.unit as f64;
        let u = sum - n * (n + 1.0) / 2.0;
        let variance = m * n / 12.0 * (all + 1.0 - self.ties / (all * (all - 1.0)));
        if variance <= 0.0 {
            // Every value is the same.
            return 1.0;
        }
        let z = (u - m * n / 2.0 - 0.5) / variance.sqrt();
        Normal::standard().sf(z)
    }
}

/// How many of the subsets of `ranks` with `size` members have each sum, 0 to `largest`.
fn subset_sums(ranks: &[u64], size: usize, largest: u64) -> Vec<f64> {
    let width = usize::try_from(largest).unwrap_or(usize::MAX - 1) + 1;
    // One row a number of members.
    let mut rows = vec![vec![0.0; width]; size + 1];
    if let Some(empty) = rows.first_mut().and_then(|row| row.first_mut()) {
        *empty = 1.0;
    }
    for rank in ranks {
        let rank = usize::try_from(*rank).unwrap_or(usize::MAX);
        // From the largest number of members down, so that no rank is taken twice.
        for members in (1..=size).rev() {
            let (smaller, larger) = rows.split_at_mut(members);
            let (Some(from), Some(into)) = (smaller.last(), larger.first_mut()) else {
                continue;
            };
            let into = into.get_mut(rank..).unwrap_or_default();
            for (into, from) in into.iter_mut().zip(from) {
                *into += from;
            }
        }
    }
    rows.pop().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn complete_separation_is_the_least_p() {
        let (low, high) = ([1, 2, 3, 4, 5], [6, 7, 8, 9, 10]);
        assert!((p_larger(&low, &high) - 1.0 / 252.0).abs() < 1e-12);
        assert!((least_p(5, 5) - 1.0 / 252.0).abs() < 1e-12);
        assert!((p_larger(&high, &low) - 1.0).abs() < 1e-12);
    }

    #[test]
    fn both_ways_of_counting_agree() {
        // The smaller sample is the first, then the second.
        let (few, many) = ([5, 9, 9], [1, 5, 6, 7, 9, 12, 30]);
        let shifted: Vec<i64> = many.iter().map(|value| -value).collect();
        let mirrored: Vec<i64> = few.iter().map(|value| -value).collect();
        let there = p_larger(&few, &many);
        let back = p_larger(&shifted, &mirrored);
        assert!((there - back).abs() < 1e-12, "{there} {back}");
    }

    #[test]
    fn equal_values_say_nothing() {
        assert!((p_larger(&[3; 8], &[3; 8]) - 1.0).abs() < 1e-12);
        let many = [3; 400];
        assert!((p_larger(&many, &many) - 1.0).abs() < 1e-12);
        assert!((p_larger(&[], &[1]) - 1.0).abs() < 1e-12);
    }

    #[test]
    fn the_approximation_meets_the_count() {
        let first: Vec<i64> = (0..30).map(|i| i * 37 % 101).collect();
        let second: Vec<i64> = (0..30).map(|i| i * 41 % 97 + 14).collect();
        let exact = p_larger(&first, &second);
        let normal = Pooled::new(&first, &second).p_normal(30, 30);
        assert!((exact - normal).abs() < 2e-3, "{exact} {normal}");
    }
}
