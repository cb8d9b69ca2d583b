//! `cargo xtask bench gate`: whether the counting gate flakes, and whether it misses.
//!
//! Boots the testbed again and again. Unchanged programs have to count the same, and to pass; with
//! some more instructions in the ITS's handler, every run has to fail, and to name that handler.

use anyhow::Result;
use serde_json::json;

use super::compare::write;
use crate::artifacts;
use crate::gate::{self, Counts};
use crate::setup::{self, Purpose};

/// How far apart the counts of a stop's handler may be from boot to boot, as a share.
const SPREAD_MAX: f64 = 0.001;

/// The clock that counts moves by 16 instructions. What a handler adds is the difference of two
/// durations, and so may be two such steps off.
const RESOLUTION: u64 = 32;

/// What has to be named: the handler that is slowed down.
const SLOWED: &str = " its.";

/// Arguments of `cargo xtask bench gate`.
#[derive(clap::Args)]
pub(super) struct Arguments {
    /// Runs of unchanged programs.
    #[arg(long, default_value_t = 20)]
    same: u32,
    /// Runs with a slower handler.
    #[arg(long, default_value_t = 10)]
    slower: u32,
    /// By how many instructions that handler is slower.
    #[arg(long, default_value_t = 2_000)]
    instructions: u32,
}

/// Runs the benchmark; 1 when the gate flaked or missed, or when counts did not repeat.
pub(super) fn run(arguments: &Arguments) -> Result<u8> {
    setup::ensure(&[Purpose::Gate])?;
    let counter = artifacts::build_counter()?;
    let baseline = gate::measure(&counter, None)?;
    let mut runs = vec![baseline.clone()];
    let mut problems = Vec::new();
    for run in 1..=arguments.same {
        let counts = gate::measure(&counter, None)?;
        for problem in counts.against(&baseline).problems {
            problems.push(format!("run {run}, false alarm: {problem}"));
        }
        runs.push(counts);
    }
    let mut found = 0;
    for _ in 0..arguments.slower {
        let counts = gate::measure(&counter, Some(arguments.instructions))?;
        let named = counts.against(&baseline).problems;
        found += u32::from(named.iter().any(|problem| problem.contains(SLOWED)));
    }
    let (name, spread) = widest(&runs);
    println!(
        "{} unchanged runs: {} false alarms; of the handlers' figures, {name} varies most: {:.4} %",
        arguments.same,
        problems.len(),
        spread * 100.0
    );
    println!(
        "{} runs with {} more instructions in the ITS's handler: found in {found}",
        arguments.slower, arguments.instructions
    );
    if spread > SPREAD_MAX {
        problems.push(format!("{name} varies by {:.4} %", spread * 100.0));
    }
    if found < arguments.slower {
        problems.push(format!("{} missed", arguments.slower - found));
    }
    for problem in &problems {
        println!("FAIL: {problem}");
    }
    let figures = json!({
        "schema": "blackout.bench-gate/1",
        "unit": "instructions",
        "same": arguments.same,
        "slower": arguments.slower,
        "instructions": arguments.instructions,
        "found": found,
        "widest": { "figure": name, "share": spread },
        "problems": problems,
        "kernel": baseline.kernel,
        "runs": runs.iter().map(|run| &run.figures).collect::<Vec<_>>(),
    });
    write(None, "gate.json", &figures)?;
    Ok(u8::from(!problems.is_empty()))
}

/// The handler's figure that varies most from run to run, and by which share beyond what the clock
/// can tell apart.
fn widest(runs: &[Counts]) -> (String, f64) {
    let mut widest = (String::new(), 0.0);
    for name in runs.iter().flat_map(|run| run.figures.keys()) {
        let counts = runs.iter().filter_map(|run| run.figures.get(name).copied());
        let (Some(least), Some(most)) = (counts.clone().min(), counts.max()) else {
            continue;
        };
        let beyond = (most - least).saturating_sub(RESOLUTION);
        let share = beyond as f64 / least.max(1) as f64;
        if gate::is_handler(name) && (widest.0.is_empty() || share > widest.1) {
            widest = (name.clone(), share);
        }
    }
    widest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_figure_that_varies_most_is_named() {
        let run = |its, gic| {
            let pairs = [("1x1 its.handler", its), ("1x1 gicv3.handler", gic)];
            let other = [("1x1 save.gic", its * gic)];
            let all = pairs.into_iter().chain(other);
            Counts {
                figures: all.map(|(name, count)| (name.to_owned(), count)).collect(),
                ..Counts::default()
            }
        };
        let (name, share) = widest(&[run(10_000, 500), run(10_032, 537)]);
        assert_eq!(name, "1x1 gicv3.handler");
        assert!((share - 0.01).abs() < 1e-9, "{share}");
        assert_eq!(widest(&[run(10_000, 500), run(10_032, 532)]).1, 0.0);
    }
}
