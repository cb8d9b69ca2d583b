//! `cargo xtask bench prediction`: how far the downtime that a monitor expects is from the one that
//! comes, and how often a migration exceeds its limit.
//!
//! `bench-prediction` hands guests on from monitor to monitor, with and without interrupts mapped in an
//! ITS, with one vCPU and two, with little and with much to send after the stop.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::{Result, ensure};
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::compare::{self, median};
use crate::artifacts::{self, Platform};
use crate::kernel::{Arch, Kernel, Package, Series};
use crate::setup::{self, Purpose};
use crate::testbed::{Mode, Testbed};

/// A prediction is right if it is off by no more than this share of what came, or this long.
const RIGHT_SHARE: f64 = 0.20;
const RIGHT_NS: u64 = 500_000;
/// What is aimed at: predictions that are right, and limits that are exceeded, of all.
const AIM_RIGHT: f64 = 0.95;
const AIM_EXCEEDED: f64 = 0.01;

/// Limits, ms: one that bounds what can be left to send, and one that does not.
const LIMITS_HERE: &str = "20,300";
/// Under emulation everything takes a hundred times as long, unless the clock counts instructions.
const LIMITS_TESTBED: &str = "2000,20000";

/// Arguments of `cargo xtask bench prediction`.
#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// Migrations of each guest.
    #[arg(long, default_value_t = 25)]
    hops: u32,
    /// In the arm64 testbed, where guests have an ITS.
    #[arg(long)]
    testbed: bool,
    /// Let the testbed's clock count instructions, which nothing else on this machine disturbs.
    #[arg(long, requires = "testbed")]
    icount: bool,
    /// Bytes that guests keep dirty.
    #[arg(long, value_delimiter = ',', default_value = "64K,1M,4M,16M")]
    dirty: Vec<String>,
    /// Devices and events of each that guests map in an ITS; here there is none.
    #[arg(
        long,
        value_name = "DEVICESxEVENTS",
        value_delimiter = ',',
        default_value = "0x1",
        default_value_if("testbed", "true", "0x1,16x16,256x16"),
        requires = "testbed"
    )]
    its: Vec<String>,
    /// vCPUs of the guests.
    #[arg(long, value_delimiter = ',', default_value = "1,2")]
    cpus: Vec<String>,
    /// Where `prediction.json` goes.
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
}

/// One migration, as `bench-prediction` prints it.
#[derive(Debug, Deserialize, Serialize)]
struct Migration {
    cpus: u32,
    guest: String,
    hop: u32,
    limit_ms: u64,
    /// Why it was not done.
    refused: Option<String>,
    prediction: Option<Prediction>,
}

/// What the monitor expected, and what came.
#[derive(Debug, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
struct Prediction {
    basis: String,
    predicted_ns: u64,
    achieved_ns: u64,
    parts: serde_json::Value,
}

impl Prediction {
    fn off_ns(&self) -> u64 {
        self.predicted_ns.abs_diff(self.achieved_ns)
    }

    fn is_right(&self) -> bool {
        let share = (self.achieved_ns as f64 * RIGHT_SHARE) as u64;
        self.off_ns() <= share.max(RIGHT_NS)
    }
}

/// Runs the benchmark, prints what came of it, writes the file. 1 when an aim is missed.
pub(crate) fn run(arguments: &Arguments) -> Result<u8> {
    let migrations = match arguments.testbed {
        true => in_testbed(arguments)?,
        false => here(arguments)?,
    };
    let done: Vec<_> = migrations
        .iter()
        .filter_map(|m| m.prediction.as_ref())
        .collect();
    ensure!(!done.is_empty(), "no migration was done");

    let mut by_basis: BTreeMap<&str, Vec<&Prediction>> = BTreeMap::new();
    for prediction in &done {
        by_basis
            .entry(&prediction.basis)
            .or_default()
            .push(prediction);
    }
    for (basis, predictions) in by_basis {
        print(&format!("known by {basis}"), &predictions);
    }
    let right = print("all", &done);
    let exceeds = |m: &&Migration| {
        let achieved_ns = m.prediction.as_ref().map(|p| p.achieved_ns);
        achieved_ns.is_some_and(|ns| ns > m.limit_ms * 1_000_000)
    };
    let exceeded = migrations.iter().filter(exceeds).count();
    println!(
        "limit exceeded: {exceeded} of {} (aim: {:.0} %); {} more were refused beforehand",
        done.len(),
        AIM_EXCEEDED * 100.0,
        migrations.len() - done.len(),
    );
    let exceeded = exceeded as f64 / done.len() as f64;
    compare::write(
        arguments.out.as_deref(),
        "prediction.json",
        &json!({
            "schema": "blackout.bench-prediction/1",
            "testbed": arguments.testbed,
            "icount": arguments.icount,
            "right": right,
            "exceeded": exceeded,
            "migrations": migrations,
        }),
    )?;
    Ok(u8::from(right < AIM_RIGHT || exceeded >= AIM_EXCEEDED))
}

/// Prints how good some predictions are; returns the share that is right.
fn print(what: &str, predictions: &[&Prediction]) -> f64 {
    let sorted = |of: fn(&Prediction) -> u64| {
        let mut values: Vec<_> = predictions.iter().map(|p| of(p)).collect();
        values.sort_unstable();
        median(&values) / 1e6
    };
    let right = predictions.iter().filter(|p| p.is_right()).count();
    let share = right as f64 / predictions.len() as f64;
    println!(
        "{what}: {right} of {} right, {:.1} % (aim: {:.0} % within {:.0} % or {} ms); \
         median downtime {:.3} ms, median error {:.3} ms",
        predictions.len(),
        share * 100.0,
        AIM_RIGHT * 100.0,
        RIGHT_SHARE * 100.0,
        RIGHT_NS as f64 / 1e6,
        sorted(|p| p.achieved_ns),
        sorted(Prediction::off_ns),
    );
    share
}

fn here(arguments: &Arguments) -> Result<Vec<Migration>> {
    setup::ensure(&[Purpose::Build])?;
    let artifacts = artifacts::build(Platform::Host)?;
    let mut command = Command::new(&artifacts.bench_prediction);
    command
        .args(options(arguments, LIMITS_HERE))
        .envs(artifacts.environment(None));
    let mut migrations = Vec::new();
    compare::each_line(&mut command, |migration| note(&mut migrations, migration))?;
    Ok(migrations)
}

fn in_testbed(arguments: &Arguments) -> Result<Vec<Migration>> {
    setup::ensure(&[Purpose::Testbed])?;
    let artifacts = artifacts::build(Platform::Testbed)?;
    let kernel = Kernel::find(Package::testbed(Series::V6_12, Arch::Aarch64))?;
    let (mode, limits) = match arguments.icount {
        true => (Mode::Counting, LIMITS_HERE),
        false => (Mode::Function, LIMITS_TESTBED),
    };
    let testbed = Testbed::new(kernel, "bench-prediction")
        .mode(mode)
        .programs(&artifacts)
        .file(&artifacts.bench_prediction, "/bin/bench-prediction");
    let options = options(arguments, limits);
    let mut program = vec!["bench-prediction"];
    program.extend(options.iter().map(String::as_str));
    compare::in_testbed(&testbed, &program, Duration::from_secs(3600), note)
}

fn note(migrations: &mut Vec<Migration>, migration: Migration) {
    let number = migrations.len() + 1;
    let outcome = match (&migration.prediction, &migration.refused) {
        (Some(p), _) => format!(
            "{:.3} ms expected by {}, {:.3} ms came{}",
            p.predicted_ns as f64 / 1e6,
            p.basis,
            p.achieved_ns as f64 / 1e6,
            if p.is_right() { "" } else { ", WRONG" },
        ),
        (None, refused) => refused.clone().unwrap_or_default(),
    };
    eprintln!(
        "{number:>4}: {} vCPUs, {}: {outcome}",
        migration.cpus, migration.guest
    );
    migrations.push(migration);
}

fn options(arguments: &Arguments, limits: &str) -> Vec<String> {
    let options = [
        ["--hops", &arguments.hops.to_string()],
        ["--limits", limits],
        ["--dirty", &arguments.dirty.join(",")],
        ["--its", &arguments.its.join(",")],
        ["--cpus", &arguments.cpus.join(",")],
    ];
    options.into_iter().flatten().map(str::to_owned).collect()
}
