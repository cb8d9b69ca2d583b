//! What counts as a regression: thresholds and probabilities, from a file and from flags.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use schemars::JsonSchema;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use thiserror::Error;
use wildmatch::WildMatch;

use super::objective::Objective;
use crate::report::units;
use crate::sets::Key;

/// Why settings could not be had.
#[derive(Debug, Error)]
pub enum Error {
    /// The file could not be read.
    #[error("cannot read settings {}", .0.display())]
    Open(PathBuf, #[source] std::io::Error),
    /// The file is not what it should be.
    #[error("settings {}", .0.display())]
    Toml(PathBuf, #[source] toml::de::Error),
    /// A value is out of its range.
    #[error("{name} is {value}; it has to be {range}")]
    Range {
        /// Which.
        name: &'static str,
        /// What it was.
        value: f64,
        /// What is allowed.
        range: &'static str,
    },
}

/// How verdicts are reached.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Settings {
    /// The probability with which a check of two equal sets may find any regression at all.
    pub alpha: f64,
    /// The probability with which a slowdown as large as the threshold may pass.
    pub miss: f64,
    /// The least slowdown that matters, as a share of the series' median in the baseline.
    pub relative: Share,
    /// The least slowdown that matters, as a time or as a share of the baseline's median downtime.
    /// The larger of the two counts.
    pub absolute: Bound,
    /// Fewer migrations than this in a set say nothing.
    pub min_runs: usize,
    /// The series that are judged, as patterns of `NAME` or `SIDE: NAME` with `*` and `?`.
    pub only: Vec<String>,
    /// Series that are not judged, as such patterns.
    pub ignore: Vec<String>,
    /// Thresholds for some series; the first pattern that matches counts.
    pub span: Vec<Special>,
    /// Absolute limits.
    pub slo: Vec<Objective>,
}

/// Thresholds for the series that match a pattern.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Special {
    /// The pattern.
    pub name: String,
    /// Instead of [`Settings::relative`].
    pub relative: Option<Share>,
    /// Instead of [`Settings::absolute`].
    pub absolute: Option<Bound>,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            alpha: 0.01,
            miss: 0.05,
            relative: Share(0.05),
            absolute: Bound::Share(Share(0.03)),
            min_runs: 4,
            only: Vec::new(),
            ignore: Vec::new(),
            span: Vec::new(),
            slo: Vec::new(),
        }
    }
}

impl Settings {
    /// The settings in a TOML file; what it does not say is as by default.
    ///
    /// # Errors
    /// When the file cannot be read, or says what cannot be.
    pub fn read(path: &Path) -> Result<Self, Error> {
        let text =
            fs::read_to_string(path).map_err(|source| Error::Open(path.to_owned(), source))?;
        toml::from_str(&text).map_err(|source| Error::Toml(path.to_owned(), source))
    }

    /// Whether every value is in its range.
    ///
    /// # Errors
    /// The first that is not.
    pub fn validate(&self) -> Result<(), Error> {
        for (name, value) in [("alpha", self.alpha), ("miss", self.miss)] {
            if !(value > 0.0 && value < 0.5) {
                let range = "above 0 and below 0.5";
                return Err(Error::Range { name, value, range });
            }
        }
        Ok(())
    }

    /// Whether the series is judged.
    pub fn judges(&self, key: &Key) -> bool {
        let any = |patterns: &[String]| patterns.iter().any(|pattern| matches(pattern, key));
        (self.only.is_empty() || any(&self.only)) && !any(&self.ignore)
    }

    /// The least slowdown of the series that matters, ns, by the baseline's medians of itself and
    /// of the downtime.
    pub fn threshold(&self, key: &Key, median_ns: i64, downtime_ns: i64) -> i64 {
        let special = self.span.iter().find(|special| matches(&special.name, key));
        let relative = special.and_then(|special| special.relative);
        let absolute = special.and_then(|special| special.absolute);
        let relative_ns = relative.unwrap_or(self.relative).of(median_ns);
        let absolute_ns = match absolute.unwrap_or(self.absolute) {
            Bound::Ns(ns) => crate::stats::value(ns),
            Bound::Share(share) => share.of(downtime_ns),
        };
        relative_ns.max(absolute_ns)
    }
}

fn matches(pattern: &str, key: &Key) -> bool {
    let pattern = WildMatch::new(pattern);
    pattern.matches(&key.name) || pattern.matches(&key.to_string())
}

/// A share, written in percent: `5%`.
#[derive(Clone, Copy, Debug, PartialEq, PartialOrd, JsonSchema)]
#[schemars(with = "String")]
pub struct Share(pub f64);

impl Share {
    fn of(self, ns: i64) -> i64 {
        (ns as f64 * self.0).round() as i64
    }
}

impl FromStr for Share {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let number = text.trim().strip_suffix('%').map(str::trim_end);
        let percent = number.and_then(|number| number.parse::<f64>().ok());
        percent
            .filter(|percent| (0.0..=1_000.0).contains(percent))
            .map(|percent| Self(percent / 100.0))
            .ok_or_else(|| format!("{text:?} is no percentage such as 5%"))
    }
}

impl fmt::Display for Share {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Two decimals of a percent, without zeros that say nothing.
        write!(f, "{}%", (self.0 * 1e4).round() / 1e2)
    }
}

/// A time such as `20us`, or a share of the downtime such as `2%`.
#[derive(Clone, Copy, Debug, PartialEq, JsonSchema)]
#[schemars(with = "String")]
pub enum Bound {
    /// A time, ns.
    Ns(u64),
    /// A share of the baseline's median downtime.
    Share(Share),
}

impl FromStr for Bound {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Ok(share) = text.parse() {
            return Ok(Self::Share(share));
        }
        units::parse_time(text).map(Self::Ns).ok_or_else(|| {
            format!("{text:?} is neither a time such as 20us nor a share such as 2%")
        })
    }
}

impl fmt::Display for Bound {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ns(ns) => write!(f, "{ns}ns"),
            Self::Share(share) => share.fmt(f),
        }
    }
}

/// Serializes as what `Display` writes and `FromStr` reads.
macro_rules! as_text {
    ($($type:ty),+) => {$(
        impl Serialize for $type {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl<'de> Deserialize<'de> for $type {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let text = String::deserialize(deserializer)?;
                text.parse().map_err(serde::de::Error::custom)
            }
        }
    )+};
}

as_text!(Share, Bound, Objective);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::analysis::Side;

    fn handler() -> Key {
        Key {
            side: Some(Side::Source),
            name: "vm_state_handler its main".to_owned(),
        }
    }

    #[test]
    fn a_file_says_what_differs_from_the_default() {
        let settings: Settings = toml::from_str(
            "relative = '10%'\nslo = ['downtime=5ms']\nignore = ['destination: *']\n\
             [[span]]\nname = 'source: vm_state_handler its *'\nabsolute = '1.5us'\n",
        )
        .unwrap();
        assert_eq!(settings.relative, Share(0.1));
        assert_eq!(settings.min_runs, Settings::default().min_runs);
        assert_eq!(settings.threshold(&handler(), 1_000, 1_000_000), 1_500);
        assert_eq!(
            settings.threshold(&Key::whole("drain"), 1_000, 1_000_000),
            30_000
        );
        assert!(settings.judges(&handler()));
        let there = Key {
            side: Some(Side::Destination),
            ..handler()
        };
        assert!(!settings.judges(&there));
        let again: Settings = toml::from_str(&toml_of(&settings)).unwrap();
        assert_eq!(again, settings);
    }

    /// By way of JSON, since nothing here writes TOML.
    fn toml_of(settings: &Settings) -> String {
        let json = serde_json::to_value(settings).unwrap();
        let Settings { alpha, miss, .. } = settings;
        let list = |name: &str| format!("{name} = {}\n", json[name]);
        let head = format!(
            "alpha = {alpha}\nmiss = {miss}\nmin_runs = {}\n",
            settings.min_runs
        );
        let lists = ["only", "ignore", "slo", "relative", "absolute"]
            .map(list)
            .concat();
        let span = &json["span"][0];
        format!(
            "{head}{lists}[[span]]\nname = {}\nabsolute = {}\n",
            span["name"], span["absolute"]
        )
    }

    #[test]
    fn a_wrong_file_is_refused_with_the_place() {
        let wrong = |text: &str| toml::from_str::<Settings>(text).unwrap_err().to_string();
        assert!(wrong("alfa = 0.1").contains("alfa"));
        assert!(wrong("relative = 5").contains("line 1"));
        assert!(wrong("slo = ['downtime']").contains("downtime=5ms"));
        let settings = Settings {
            alpha: 0.7,
            ..Settings::default()
        };
        assert!(
            settings
                .validate()
                .unwrap_err()
                .to_string()
                .contains("alpha is 0.7")
        );
    }

    #[test]
    fn bounds_are_times_or_shares() {
        assert_eq!("2%".parse(), Ok(Bound::Share(Share(0.02))));
        assert_eq!("1.5ms".parse(), Ok(Bound::Ns(1_500_000)));
        assert!("5".parse::<Bound>().is_err());
        assert!("-5%".parse::<Share>().is_err());
        assert!("nan%".parse::<Share>().is_err());
        assert_eq!(Share(0.125).to_string(), "12.5%");
    }
}
