//! Absolute limits: `downtime=5ms`, `downtime:p90=8ms`.

use std::fmt;
use std::str::FromStr;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use statrs::distribution::{Binomial, DiscreteCDF};

use super::check::Verdict;
use super::settings::Settings;
use crate::report::units;
use crate::sets::Samples;
use crate::stats;

/// A limit that a quantile of a series has to keep.
#[derive(Clone, Debug, PartialEq, JsonSchema)]
#[schemars(with = "String")]
pub struct Objective {
    /// The series: `downtime`, `blackout`, or a span as it is named in a check.
    pub name: String,
    /// The quantile, in percent: 50 is the median.
    pub percent: u8,
    /// The limit, ns.
    pub limit_ns: u64,
}

impl FromStr for Objective {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("{text:?} is no objective such as downtime=5ms or downtime:p90=8ms");
        let (what, limit) = text.rsplit_once('=').ok_or_else(wrong)?;
        let limit_ns = units::parse_time(limit).ok_or_else(wrong)?;
        // A span's name may hold a colon as well: `source: drain:p90`.
        let (name, percent) = match what.rsplit_once(":p") {
            Some((name, percent)) => (name, percent.parse().map_err(|_| wrong())?),
            None => (what, 50),
        };
        if name.is_empty() || !(1..=99).contains(&percent) {
            return Err(wrong());
        }
        Ok(Self {
            name: name.trim().to_owned(),
            percent,
            limit_ns,
        })
    }
}

impl fmt::Display for Objective {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)?;
        if self.percent != 50 {
            write!(f, ":p{}", self.percent)?;
        }
        write!(f, "={}ns", self.limit_ns)
    }
}

/// How an objective was kept.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Kept {
    /// Which.
    pub objective: Objective,
    /// The quantile in the current set, ns; `None` if the set has no such series.
    pub value_ns: Option<i64>,
    /// Values above the limit.
    pub above: usize,
    /// All values.
    pub n: usize,
    /// `pass`: more may not be above it but for chance; `regression`: so many are above it by
    /// chance with less than α.
    pub verdict: Verdict,
}

/// Holds the current set against the limit. The number of values above it is compared with what a
/// quantile that is exactly at the limit would give, by the binomial distribution, so that a few
/// runs can neither prove nor refute a p99.
pub fn hold(objective: &Objective, current: &Samples, settings: &Settings) -> Kept {
    let named = |series: &&crate::sets::Series| {
        series.key.name == objective.name || series.key.to_string() == objective.name
    };
    let values = current
        .series
        .iter()
        .find(named)
        .map(crate::sets::Series::sorted);
    let values = values.unwrap_or_default();
    let limit = stats::value(objective.limit_ns);
    let above = values.iter().filter(|value| **value > limit).count();
    let quantile = f64::from(objective.percent) / 100.0;
    let verdict = match Binomial::new(1.0 - quantile, values.len() as u64) {
        Ok(chance) if !values.is_empty() => {
            let above = above as u64;
            let at_least = above.checked_sub(1).map_or(1.0, |below| chance.sf(below));
            if at_least < settings.alpha {
                Verdict::Regression
            } else if chance.cdf(above) < settings.miss {
                Verdict::Pass
            } else {
                Verdict::Inconclusive
            }
        }
        _ => Verdict::Inconclusive,
    };
    Kept {
        objective: objective.clone(),
        value_ns: stats::quantile(&values, quantile),
        above,
        n: values.len(),
        verdict,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn objectives_are_read_as_they_are_written() {
        let objective: Objective = "downtime=5ms".parse().unwrap();
        assert_eq!((objective.percent, objective.limit_ns), (50, 5_000_000));
        let span: Objective = "source: drain:p90=1.5us".parse().unwrap();
        assert_eq!((span.name.as_str(), span.percent), ("source: drain", 90));
        assert_eq!(span.to_string().parse(), Ok(span));
        for wrong in [
            "downtime",
            "=5ms",
            "downtime=5",
            "downtime:p0=5ms",
            "downtime:p100=1s",
        ] {
            assert!(wrong.parse::<Objective>().is_err(), "{wrong}");
        }
    }
}
