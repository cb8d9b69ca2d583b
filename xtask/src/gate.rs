//! `cargo xtask gate`: a latency gate that needs no arm64 hardware, no KVM, no root and no luck.
//!
//! The monitor's own stop, save, load and start run in the arm64 testbed, whose clock counts
//! instructions: a figure repeats from boot to boot, on any machine, so one run of a quarter of a
//! minute is enough. The figures stand in `tests/counts.txt`, one a line, so that a change of cost is
//! reviewed like any other change; `--update` rewrites it. `cargo xtask bench gate` shows that
//! the gate neither flakes nor misses.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::bench::its::Plan;
use crate::kernel::Series;
use crate::paths;
use crate::setup::{self, Purpose};

/// Sizes of the ITS that are measured: devices, and events of each.
const SIZES: [(u64, u64); 2] = [(16, 16), (256, 16)];

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

/// Of what is measured a few times: a tick of the emulated timer, some 2,800 instructions, may fall
/// into each of them.
const OTHERS: Slack = Slack {
    share: 0.005,
    instructions: 4_000,
};

/// The handlers' figures begin with these.
const HANDLER_NAMES: [&str; 2] = [" its.", " gicv3."];

impl Slack {
    fn of(name: &str) -> &'static Self {
        if is_handler(name) { &HANDLERS } else { &OTHERS }
    }

    /// The instructions by which `count` may grow.
    fn around(&self, count: u64) -> u64 {
        (count as f64 * self.share) as u64 + self.instructions
    }
}

/// Arguments of `cargo xtask gate`.
#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// Write what was measured into the baseline instead of holding it against it.
    #[arg(long)]
    update: bool,
    /// The baseline.
    #[arg(long, value_name = "FILE")]
    baseline: Option<PathBuf>,
    /// Measure so many times, booting anew each time; every time has to pass.
    #[arg(long, default_value_t = 1)]
    repeat: u32,
}

/// Instructions by figure: `256x16 its.handler`.
pub(crate) type Counts = BTreeMap<String, u64>;

/// Whether a figure is one of the stop's handlers.
pub(crate) fn is_handler(name: &str) -> bool {
    HANDLER_NAMES.iter().any(|handler| name.contains(handler))
}

/// Runs the verb; the exit code is 1 when a figure grew, or is not in the baseline.
pub(crate) fn run(arguments: &Arguments) -> Result<u8> {
    setup::ensure(&[Purpose::Testbed])?;
    let file = arguments.baseline.clone();
    let file = file.unwrap_or_else(|| paths::workspace().join("tests/counts.txt"));
    let mut worst = 0;
    for _ in 0..arguments.repeat.max(1) {
        let counts = measure(None)?;
        if arguments.update {
            fs::write(&file, write(&counts))
                .with_context(|| format!("cannot write {}", file.display()))?;
            println!("wrote {}", file.display());
            continue;
        }
        let text = fs::read_to_string(&file).with_context(|| {
            let file = file.display();
            format!("cannot read {file}; `cargo xtask gate --update` writes it")
        })?;
        let problems = compare(&read(&text)?, &counts);
        for problem in &problems {
            println!("FAIL: {problem}");
        }
        if problems.is_empty() {
            println!("pass: {} figures", counts.len());
        } else {
            println!("if this is what the change is meant to cost: cargo xtask gate --update");
            worst = 1;
        }
    }
    Ok(worst)
}

/// Boots the testbed and counts, with the ITS's handler slowed down by so many instructions.
///
/// # Errors
/// When the testbed does not boot, or the guest in it does not run.
pub(crate) fn measure(slower: Option<u32>) -> Result<Counts> {
    let plan = Plan {
        kernel: Series::V6_12,
        sizes: &SIZES,
        stops: 9,
        restores: 3,
        cpus: 1,
        slower,
        timeout: Duration::from_secs(900),
    };
    let mut counts = Counts::new();
    for line in plan.run("gate")? {
        let raw: Value = serde_json::from_str(&line).context("bench-its printed broken JSON")?;
        let size = format!("{}x{}", raw["devices"], raw["events"]);
        figures(&mut counts, &size, ' ', &raw);
    }
    if counts.is_empty() {
        bail!("bench-its measured nothing");
    }
    Ok(counts)
}

/// The figures in `value`: the least of each that was measured several times, since interrupts only
/// ever add to it.
fn figures(counts: &mut Counts, name: &str, separator: char, value: &Value) {
    if let Some(least) = value.get("min").and_then(Value::as_u64) {
        counts.insert(name.to_owned(), least);
        return;
    }
    for (member, value) in value.as_object().into_iter().flatten() {
        figures(counts, &format!("{name}{separator}{member}"), '.', value);
    }
}

fn write(counts: &Counts) -> String {
    let mut text = "# Instructions of the stop path, in the testbed's counting mode: `cargo xtask gate`.\n\
                    # Devices x events, then the figure. `cargo xtask gate --update` rewrites this file.\n"
        .to_owned();
    for (name, count) in counts {
        text += &format!("{name} {count}\n");
    }
    text
}

fn read(text: &str) -> Result<Counts> {
    let lines = text.lines().enumerate();
    lines
        .filter(|(_, line)| !line.starts_with('#') && !line.trim().is_empty())
        .map(|(index, line)| {
            let (name, count) = line
                .rsplit_once(' ')
                .with_context(|| format!("baseline, line {}: no figure", index + 1))?;
            let count = count
                .parse()
                .with_context(|| format!("baseline, line {}: {count:?}", index + 1))?;
            Ok((name.to_owned(), count))
        })
        .collect()
}

/// Prints every figure that got better; returns what is wrong.
pub(crate) fn compare(baseline: &Counts, now: &Counts) -> Vec<String> {
    let mut problems = Vec::new();
    for (name, count) in now {
        let Some(before) = baseline.get(name) else {
            problems.push(format!("{name}: {count}, and not in the baseline"));
            continue;
        };
        let slack = Slack::of(name).around(*before);
        let change = i128::from(*count) - i128::from(*before);
        let text = format!("{name}: {before} → {count} instructions ({change:+})");
        if *count > before.saturating_add(slack) {
            problems.push(text);
        } else if count.saturating_add(slack) < *before {
            println!("better: {text}");
        }
    }
    let gone = baseline.keys().filter(|name| !now.contains_key(*name));
    problems.extend(gone.map(|name| format!("{name}: in the baseline, but not measured")));
    problems
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn counts(pairs: &[(&str, u64)]) -> Counts {
        pairs
            .iter()
            .map(|(name, count)| ((*name).to_owned(), *count))
            .collect()
    }

    #[test]
    fn a_baseline_is_read_as_it_is_written() {
        let counts = counts(&[("16x16 its.handler", 12), ("16x16 save.cpu/0", 3)]);
        assert_eq!(read(&write(&counts)).unwrap(), counts);
        assert!(read("x").is_err());
        assert!(read("x y").is_err());
    }

    #[test]
    fn two_thousand_instructions_in_a_handler_are_found() {
        let before = counts(&[("16x16 its.added", 700), ("16x16 its.ioctl", 2_000_000)]);
        let same = counts(&[("16x16 its.added", 1_100), ("16x16 its.ioctl", 2_001_900)]);
        assert!(compare(&before, &same).is_empty());
        let slower = counts(&[("16x16 its.added", 2_700), ("16x16 its.ioctl", 2_000_000)]);
        let problems = compare(&before, &slower);
        assert_eq!(problems.len(), 1);
        assert!(
            problems[0].contains("its.added: 700 → 2700"),
            "{problems:?}"
        );
    }

    #[test]
    fn what_came_or_went_is_told() {
        let (before, now) = (counts(&[("a", 1)]), counts(&[("b", 1)]));
        assert_eq!(compare(&before, &now).len(), 2);
    }

    #[test]
    fn the_least_of_several_is_a_figure_and_a_size_is_none() {
        let mut found = Counts::new();
        let figure = json!({"first": 3, "min": 1, "median": 2, "max": 3});
        let raw =
            json!({"devices": 16, "its": {"added": figure}, "gic_restore_pending_tables": figure});
        figures(&mut found, "16x16", ' ', &raw);
        let names = ["16x16 gic_restore_pending_tables", "16x16 its.added"];
        assert_eq!(found, counts(&names.map(|name| (name, 1))));
    }
}
