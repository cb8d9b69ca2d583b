//! Counted instructions: the baseline file, and what is too much more.

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use serde_json::Value;

/// By how much a figure may grow before it is a regression: a share of it, and instructions on top,
/// which is what a probe site or a reordered call costs.
struct Slack {
    share: f64,
    instructions: u64,
}

/// Of a stop's handlers: among several stops there is one into which no tick of the timer falls.
const HANDLERS: Slack = Slack {
    share: 0.002,
    instructions: 500,
};

/// Of what is measured a few times: ticks of the emulated timer, some 10,000 instructions each, may
/// fall into what lasts long, and the end of one into what does not.
const OTHERS: Slack = Slack {
    share: 0.005,
    instructions: 4_000,
};

/// The handlers' figures begin with these.
const HANDLER_NAMES: [&str; 2] = [" its.", " gicv3."];

/// What is in the names of figures that are mostly the kernel's work.
const KERNEL_NAMES: [&str; 7] = [
    ".handler", ".ioctl", "_tables", ".cpu/", ".gic", ".its", ".vtimer",
];

/// Instructions by figure, `256x16 its.handler`, and whose they are.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Counts {
    /// The release of the kernel whose ioctls were counted.
    pub(crate) kernel: String,
    pub(crate) figures: BTreeMap<String, u64>,
}

/// What a comparison found.
#[derive(Debug, Default)]
pub(crate) struct Comparison {
    /// What is wrong: a figure that grew, came or went.
    pub(crate) problems: Vec<String>,
    /// Figures that shrank.
    pub(crate) better: Vec<String>,
    /// How many were compared.
    pub(crate) compared: usize,
}

impl Slack {
    fn of(name: &str) -> &'static Self {
        if is_handler(name) { &HANDLERS } else { &OTHERS }
    }

    /// The instructions by which `count` may grow.
    fn around(&self, count: u64) -> u64 {
        (count as f64 * self.share) as u64 + self.instructions
    }
}

/// Whether a figure is one of the stop's handlers.
pub(crate) fn is_handler(name: &str) -> bool {
    HANDLER_NAMES.iter().any(|handler| name.contains(handler))
}

/// Whether another kernel, even the next point release, may count something else.
fn is_kernels(name: &str) -> bool {
    KERNEL_NAMES.iter().any(|part| name.contains(part))
}

impl Counts {
    /// Adds what `bench-its` printed of one size: the least of each figure that was measured several
    /// times, since interrupts only ever add to it.
    pub(crate) fn add(&mut self, raw: &Value) {
        let size = format!("{}x{}", raw["devices"], raw["events"]);
        self.figure(&size, ' ', raw);
    }

    fn figure(&mut self, name: &str, separator: char, value: &Value) {
        if let Some(least) = value.get("min").and_then(Value::as_u64) {
            self.figures.insert(name.to_owned(), least);
            return;
        }
        for (member, value) in value.as_object().into_iter().flatten() {
            self.figure(&format!("{name}{separator}{member}"), '.', value);
        }
    }

    /// The baseline file.
    pub(crate) fn write(&self) -> String {
        let mut text = format!(
            "# Instructions of the stop path, in the testbed's counting mode: `cargo xtask gate`.\n\
             # Devices x events, then the figure. `cargo xtask gate --update` rewrites this file.\n\
             kernel {}\n",
            self.kernel
        );
        for (name, count) in &self.figures {
            text += &format!("{name} {count}\n");
        }
        text
    }

    /// Reads a baseline file.
    ///
    /// # Errors
    /// When a line is neither a comment, nor the kernel's, nor a figure; it says which.
    pub(crate) fn read(text: &str) -> Result<Self> {
        let mut counts = Counts::default();
        for (index, line) in text.lines().enumerate() {
            if line.starts_with('#') || line.trim().is_empty() {
                continue;
            }
            if let Some(kernel) = line.strip_prefix("kernel ") {
                counts.kernel = kernel.trim().to_owned();
                continue;
            }
            let (name, count) = line
                .rsplit_once(' ')
                .with_context(|| format!("baseline, line {}: no figure", index + 1))?;
            let count = count
                .parse()
                .with_context(|| format!("baseline, line {}: {count:?}", index + 1))?;
            counts.figures.insert(name.to_owned(), count);
        }
        Ok(counts)
    }

    /// Holds `self` against `baseline`: all figures on the same kernel; on another one those of the
    /// monitor alone, since what an ioctl costs is then not the monitor's doing.
    pub(crate) fn against(&self, baseline: &Counts) -> Comparison {
        let same = self.kernel == baseline.kernel;
        let matters = |name: &&String| same || !is_kernels(name);
        let mut found = Comparison::default();
        for name in self.figures.keys().filter(matters) {
            found.compared += 1;
            let count = self.figures[name];
            let Some(before) = baseline.figures.get(name) else {
                let text = format!("{name}: {count}, and not in the baseline");
                found.problems.push(text);
                continue;
            };
            let slack = Slack::of(name).around(*before);
            let change = i128::from(count) - i128::from(*before);
            let text = format!("{name}: {before} → {count} instructions ({change:+})");
            if count > before.saturating_add(slack) {
                found.problems.push(text);
            } else if count.saturating_add(slack) < *before {
                found.better.push(text);
            }
        }
        let gone = baseline.figures.keys().filter(matters);
        let gone = gone.filter(|name| !self.figures.contains_key(*name));
        let gone = gone.map(|name| format!("{name}: in the baseline, but not measured"));
        found.problems.extend(gone);
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn counts(kernel: &str, pairs: &[(&str, u64)]) -> Counts {
        let figures = pairs
            .iter()
            .map(|(name, count)| ((*name).to_owned(), *count));
        Counts {
            kernel: kernel.to_owned(),
            figures: figures.collect(),
        }
    }

    #[test]
    fn a_baseline_is_read_as_it_is_written() {
        let counts = counts(
            "6.12.1+deb13-arm64",
            &[("16x16 its.handler", 12), ("16x16 save.cpu/0", 3)],
        );
        assert_eq!(Counts::read(&counts.write()).unwrap(), counts);
        assert!(Counts::read("x").is_err());
        assert!(Counts::read("x y").is_err());
    }

    #[test]
    fn two_thousand_instructions_in_a_handler_are_found() {
        let before = counts(
            "k",
            &[("16x16 its.added", 700), ("16x16 its.ioctl", 2_000_000)],
        );
        let same = counts(
            "k",
            &[("16x16 its.added", 1_100), ("16x16 its.ioctl", 2_001_900)],
        );
        assert!(same.against(&before).problems.is_empty());
        let slower = counts(
            "k",
            &[("16x16 its.added", 2_700), ("16x16 its.ioctl", 2_000_000)],
        );
        let problems = slower.against(&before).problems;
        assert_eq!(problems.len(), 1);
        assert!(
            problems[0].contains("its.added: 700 → 2700"),
            "{problems:?}"
        );
    }

    #[test]
    fn another_kernels_ioctls_are_not_compared() {
        let before = counts(
            "6.12.107",
            &[("16x16 its.added", 700), ("16x16 its.ioctl", 10)],
        );
        let after = counts(
            "6.12.117",
            &[("16x16 its.added", 700), ("16x16 its.ioctl", 99_999)],
        );
        let found = after.against(&before);
        assert_eq!((found.problems.len(), found.compared), (0, 1));
        let slower = counts("6.12.117", &[("16x16 its.added", 2_700)]);
        assert_eq!(slower.against(&before).problems.len(), 1);
    }

    #[test]
    fn what_came_or_went_is_told() {
        let (before, now) = (counts("k", &[("a", 1)]), counts("k", &[("b", 1)]));
        assert_eq!(now.against(&before).problems.len(), 2);
    }

    #[test]
    fn the_least_of_several_is_a_figure_and_a_size_is_none() {
        let mut found = Counts::default();
        let figure = json!({"first": 3, "min": 1, "median": 2, "max": 3});
        let raw = json!({
            "devices": 16, "events": 16, "its": {"added": figure}, "gic_restore_pending_tables": figure
        });
        found.add(&raw);
        let names = ["16x16 gic_restore_pending_tables", "16x16 its.added"];
        assert_eq!(found, counts("", &names.map(|name| (name, 1))));
    }
}
