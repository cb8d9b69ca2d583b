//! What benchmarks beside a peer have in common: the program that measures, and the ratio.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::ValueEnum;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::paths;
use crate::testbed::{STARTED_AGAIN, Testbed};

/// Whom to compare with.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub(super) enum Peer {
    /// Debian's QEMU, with KVM.
    Qemu,
    /// Nobody: this project's monitor alone.
    None,
}

impl Peer {
    /// Whose migrations to measure, in the words of the programs that do.
    pub(super) fn monitors(self) -> &'static str {
        match self {
            Peer::Qemu => "blackout,qemu",
            Peer::None => "blackout",
        }
    }
}

/// Runs a program that prints one JSON object a line, and hands each on.
///
/// # Errors
/// When it can't be started, prints something else, or fails.
pub(super) fn each_line<T: DeserializeOwned>(
    command: &mut Command,
    mut each: impl FnMut(T),
) -> Result<()> {
    let mut child = command
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("starting {command:?}"))?;
    let stdout = child.stdout.take().context("no stdout")?;
    for line in BufReader::new(stdout).lines() {
        let line = line?;
        each(serde_json::from_str(&line).with_context(|| format!("{command:?} printed {line}"))?);
    }
    let status = child.wait()?;
    ensure!(status.success(), "{command:?} ended with {status}");
    Ok(())
}

/// Runs a program in a testbed that prints one JSON object a line, among other things, and hands each to
/// `note` with those before it. Returns all of them.
///
/// # Errors
/// When the testbed does not run, or the program fails there.
pub(super) fn in_testbed<T: DeserializeOwned>(
    testbed: &Testbed,
    program: &[&str],
    limit: Duration,
    note: impl Fn(&mut Vec<T>, T),
) -> Result<Vec<T>> {
    let mut figures = Vec::new();
    let finished = testbed.run(program, limit, |line| {
        if line == STARTED_AGAIN {
            // What was measured before the hang is measured again.
            figures.clear();
        }
        match serde_json::from_str(line) {
            Ok(figure) => note(&mut figures, figure),
            Err(_) => eprintln!("{line}"),
        }
    })?;
    ensure!(finished.status == 0, "{program:?} failed in the testbed");
    Ok(figures)
}

/// Writes a benchmark's figures to `folder`, or to where all go, and says where.
pub(super) fn write(folder: Option<&Path>, name: &str, figures: &Value) -> Result<()> {
    let folder = folder.map_or_else(|| paths::target().join("bench"), Path::to_owned);
    fs::create_dir_all(&folder).with_context(|| format!("cannot create {}", folder.display()))?;
    let file = folder.join(name);
    fs::write(&file, serde_json::to_vec_pretty(figures)?)
        .with_context(|| format!("cannot write {}", file.display()))?;
    println!("figures: {}", file.display());
    Ok(())
}

/// The ratio of two medians, with the interval that holds it with 95 % confidence.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ratio {
    pub(super) value: f64,
    pub(super) low: f64,
    pub(super) high: f64,
}

/// By the percentile bootstrap, which asks nothing of how the times are distributed.
pub(super) fn ratio(ours: &[u64], peers: &[u64]) -> Option<Ratio> {
    const RESAMPLES: usize = 10_000;
    if ours.is_empty() || peers.is_empty() {
        return None;
    }
    let mut random = fastrand::Rng::with_seed(0);
    let mut resample = |times: &[u64]| {
        let mut drawn: Vec<_> = times
            .iter()
            .map(|_| times[random.usize(..times.len())])
            .collect();
        drawn.sort_unstable();
        median(&drawn)
    };
    let mut ratios: Vec<_> = (0..RESAMPLES)
        .map(|_| resample(ours) / resample(peers))
        .collect();
    ratios.sort_unstable_by(f64::total_cmp);
    Some(Ratio {
        value: median(ours) / median(peers),
        low: ratios[RESAMPLES / 40],
        high: ratios[RESAMPLES - 1 - RESAMPLES / 40],
    })
}

/// The median of sorted times, at least one.
pub(super) fn median(sorted: &[u64]) -> f64 {
    let half = sorted.len() / 2;
    if sorted.len() % 2 == 1 {
        sorted[half] as f64
    } else {
        (sorted[half - 1] as f64 + sorted[half] as f64) / 2.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_of_few_times_is_theirs() {
        assert_eq!(median(&[7]), 7.0);
        assert_eq!(median(&[1, 9]), 5.0);
        assert_eq!(median(&[1, 2, 90]), 2.0);
    }

    #[test]
    fn a_ratio_lies_in_its_interval_which_narrows_with_the_spread() {
        let wide = ratio(&[10, 20, 30, 40, 50], &[100, 200, 300, 400, 500]).unwrap();
        assert_eq!(wide.value, 0.1);
        assert!(wide.low < 0.1 && wide.high > 0.1);
        let narrow = ratio(&[30; 5], &[300; 5]).unwrap();
        assert_eq!((narrow.low, narrow.high), (0.1, 0.1));
        assert!(ratio(&[], &[1]).is_none());
    }
}
