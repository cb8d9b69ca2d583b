//! Two sets of samples, series by series.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::sets::{Key, Nature, Samples, Series};
use crate::stats::{self, rank, shift};

/// How sure the interval around a shift is to hold the true one.
pub const CONFIDENCE: f64 = 0.95;

/// A series in both sets.
#[derive(Clone, Debug, PartialEq)]
pub struct Comparison {
    /// Which.
    pub key: Key,
    /// What its time is spent on.
    pub nature: Nature,
    /// How deep it is in its side's tree.
    pub depth: usize,
    /// The name of the span around it.
    pub parent: Option<String>,
    /// The baseline's values, in order of size.
    pub baseline: Vec<i64>,
    /// The current set's.
    pub current: Vec<i64>,
    /// By how much the current set is slower; `None` if a set has no values.
    pub shift: Option<shift::Shift>,
    /// The probability of such ranks if it is not slower.
    pub p_slower: f64,
    /// The probability of such ranks if it is not faster.
    pub p_faster: f64,
}

/// What a series' values are, in numbers. Times are ns.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Figures {
    /// How many there are.
    pub n: usize,
    /// The smallest.
    pub min: i64,
    /// The median.
    pub median: i64,
    /// Nine of ten are at most this.
    pub p90: i64,
    /// Ninety-nine of a hundred are at most this.
    pub p99: i64,
    /// The largest.
    pub max: i64,
}

impl Figures {
    /// Of values in order of size; zeros of none.
    pub fn of(sorted: &[i64]) -> Self {
        let quantile = |q| stats::quantile(sorted, q).unwrap_or(0);
        Self {
            n: sorted.len(),
            min: quantile(0.0),
            median: stats::median(sorted).unwrap_or(0),
            p90: quantile(0.9),
            p99: quantile(0.99),
            max: quantile(1.0),
        }
    }
}

/// Every series that either set has: in the current set's order, then what only the baseline has.
pub fn compare(baseline: &Samples, current: &Samples) -> Vec<Comparison> {
    let gone = baseline
        .series
        .iter()
        .filter(|series| current.series(&series.key).is_none());
    let both = current.series.iter().chain(gone);
    both.map(|series| one(series, baseline, current)).collect()
}

fn one(series: &Series, baseline: &Samples, current: &Samples) -> Comparison {
    let values = |set: &Samples| match set.series(&series.key) {
        Some(series) => series.sorted(),
        // A span that never ran in a set took no time there; a figure was not measured.
        None if series.nature == Nature::Whole => Vec::new(),
        None => vec![0; set.migrations],
    };
    let (baseline, current) = (values(baseline), values(current));
    Comparison {
        key: series.key.clone(),
        nature: series.nature,
        depth: series.depth,
        parent: series.parent.clone(),
        shift: shift::estimate(&baseline, &current, CONFIDENCE),
        p_slower: rank::p_larger(&baseline, &current),
        p_faster: rank::p_larger(&current, &baseline),
        baseline,
        current,
    }
}
