//! `cargo xtask bench boot`: what the monitor costs by itself, in time before the guest's first
//! instruction and in memory besides the guest's.

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::compare::{self, median};
use crate::artifacts::{self, Platform};
use crate::kernel::{Arch, Kernel, Package, Series};
use crate::setup::{self, Purpose};
use crate::testbed::Testbed;

/// What is aimed at on real hardware.
const AIM_MS: f64 = 20.0;
const AIM_MIB: f64 = 10.0;

/// Arguments of `cargo xtask bench boot`.
#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// Starts of the monitor.
    #[arg(long, default_value_t = 20)]
    runs: usize,
    /// The guest's vCPUs.
    #[arg(long, default_value_t = 1)]
    cpus: u32,
    /// In the arm64 testbed: times are emulation's, memory is what it is.
    #[arg(long)]
    testbed: bool,
    /// Where `boot.json` goes.
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
}

/// One start, as `bench-boot` prints it.
#[derive(Debug, Deserialize, Serialize)]
struct Run {
    ns: u64,
    /// What the monitor has written.
    written_kib: u64,
    /// That, and what only it has mapped of its program.
    private_kib: u64,
}

/// Runs the benchmark, prints the medians, writes the file. 1 when this machine misses an aim.
pub(crate) fn run(arguments: &Arguments) -> Result<u8> {
    let runs = if arguments.testbed {
        in_testbed(arguments)?
    } else {
        here(arguments)?
    };
    let of = |field: fn(&Run) -> u64| {
        let mut values: Vec<_> = runs.iter().map(field).collect();
        values.sort_unstable();
        values
    };
    let (times, written, private) = (of(|r| r.ns), of(|r| r.written_kib), of(|r| r.private_kib));
    let ms = median(&times) / 1e6;
    let mib = median(&private) / 1024.0;
    println!(
        "exec to the guest's first instruction: median {ms:.2} ms, {:.2} to {:.2} (aim: {AIM_MS} ms)",
        *times.first().context("no runs")? as f64 / 1e6,
        *times.last().context("no runs")? as f64 / 1e6,
    );
    println!(
        "private memory besides guest RAM: median {mib:.1} MiB, {:.1} MiB of it written (aim: {AIM_MIB} MiB)",
        median(&written) / 1024.0,
    );
    compare::write(
        arguments.out.as_deref(),
        "boot.json",
        &json!({
            "schema": "blackout.bench-boot/1",
            "cpus": arguments.cpus,
            "testbed": arguments.testbed,
            "runs": runs,
        }),
    )?;
    let missed = mib > AIM_MIB || (ms > AIM_MS && !arguments.testbed);
    Ok(u8::from(missed))
}

fn here(arguments: &Arguments) -> Result<Vec<Run>> {
    setup::ensure(&[Purpose::Build])?;
    let artifacts = artifacts::build(Platform::Host)?;
    let mut command = Command::new(&artifacts.bench_boot);
    command
        .args(options(arguments))
        .envs(artifacts.environment(None));
    let mut runs = Vec::new();
    compare::each_line(&mut command, |run: Run| runs.push(run))?;
    Ok(runs)
}

fn in_testbed(arguments: &Arguments) -> Result<Vec<Run>> {
    setup::ensure(&[Purpose::Testbed])?;
    let artifacts = artifacts::build(Platform::Testbed)?;
    let kernel = Kernel::find(Package::testbed(Series::V6_12, Arch::Aarch64))?;
    let testbed = Testbed::new(kernel, "bench-boot")
        .programs(&artifacts)
        .file(&artifacts.bench_boot, "/bin/bench-boot");
    let options = options(arguments);
    let mut program = vec!["bench-boot"];
    program.extend(options.iter().map(String::as_str));
    let limit = Duration::from_secs(600);
    compare::in_testbed(&testbed, &program, limit, Vec::push)
}

fn options(arguments: &Arguments) -> [String; 4] {
    let (runs, cpus) = (arguments.runs.to_string(), arguments.cpus.to_string());
    ["--runs".to_owned(), runs, "--cpus".to_owned(), cpus]
}
