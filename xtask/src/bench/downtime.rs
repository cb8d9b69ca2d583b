//! `cargo xtask bench downtime`: how long a guest is dark while it migrates, beside QEMU.
//!
//! `bench-downtime` migrates the same bare-metal guest with either monitor in turn, and an observer
//! looks into the memory of both sides, at the guest's counter and, where it makes some, at its stamps:
//! neither monitor's word is taken for how long it was dark. No tool is attached. Other work on the
//! machine lengthens both; the ratio is what to look at.
//!
//! With `--testbed` both run in the arm64 testbed, where the guest has interrupts mapped in an ITS.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::Result;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::compare::{self, Peer, Ratio, median, ratio};
use crate::artifacts::{self, Platform};
use crate::kernel::{Arch, Kernel, Package, Series};
use crate::setup::{self, Purpose};
use crate::testbed::{Mode, Testbed};

/// A migration there takes half a minute, with its monitors' start.
const TESTBED_LIMIT: Duration = Duration::from_secs(7200);

/// Arguments of `cargo xtask bench downtime`.
#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// Whom to compare with.
    #[arg(long, value_enum, default_value = "qemu")]
    peer: Peer,
    /// Migrations of each kind.
    #[arg(long, default_value_t = 15)]
    runs: usize,
    /// Over what; `cpr` hands guest RAM over without copying it, which Debian's QEMU can't.
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "tcp,unix,cpr",
        default_value_if("testbed", "true", "tcp")
    )]
    transports: Vec<String>,
    /// Bytes that the guest keeps dirty.
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "1M,16M",
        default_value_if("testbed", "true", "1M")
    )]
    dirty: Vec<String>,
    /// In the arm64 testbed, with Debian's QEMU for arm64.
    #[arg(long)]
    testbed: bool,
    /// Let the testbed's clock count instructions, which nothing else on this machine disturbs.
    #[arg(long, requires = "testbed")]
    icount: bool,
    /// Devices and events of each that the guest maps in its ITS.
    #[arg(
        long,
        value_name = "DEVICESxEVENTS",
        default_value = "256x16",
        requires = "testbed"
    )]
    its: String,
    /// Where `downtime.json` goes.
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
}

/// One migration, as `bench-downtime` prints it.
#[derive(Debug, Deserialize, Serialize)]
struct Migration {
    monitor: String,
    transport: String,
    dirty: String,
    dark_ns: u64,
    error_ns: u64,
    judged: bool,
    set_aside_ns: u64,
    downtime: Option<u64>,
    total_time: Option<u64>,
}

/// Runs the benchmark, prints the table, writes the file.
pub(crate) fn run(arguments: &Arguments) -> Result<u8> {
    let migrations = match arguments.testbed {
        true => in_testbed(arguments)?,
        false => here(arguments)?,
    };
    let kinds = kinds(&migrations);
    print(&kinds);

    compare::write(
        arguments.out.as_deref(),
        "downtime.json",
        &json!({
            "schema": "blackout.bench-downtime/1",
            "testbed": arguments.testbed,
            "icount": arguments.icount,
            "its": arguments.testbed.then_some(&arguments.its),
            "kinds": kinds.iter().map(summary).collect::<Vec<_>>(),
            "migrations": migrations,
        }),
    )?;
    Ok(0)
}

fn here(arguments: &Arguments) -> Result<Vec<Migration>> {
    setup::ensure(&[Purpose::Build, Purpose::Test])?;
    let artifacts = artifacts::build(Platform::Host)?;
    let mut command = Command::new(&artifacts.bench_downtime);
    command
        .args(options(arguments))
        .envs(artifacts.environment(None));
    let mut migrations = Vec::new();
    compare::each_line(&mut command, |migration| note(&mut migrations, migration))?;
    Ok(migrations)
}

fn in_testbed(arguments: &Arguments) -> Result<Vec<Migration>> {
    setup::ensure(&[Purpose::Testbed, Purpose::StockTools])?;
    let artifacts = artifacts::build(Platform::Testbed)?;
    let kernel = Kernel::find(Package::testbed(Series::V6_12, Arch::Aarch64))?;
    let mode = match arguments.icount {
        true => Mode::Counting,
        false => Mode::Function,
    };
    let testbed = Testbed::new(kernel, "bench-downtime")
        .mode(mode)
        .usr(&setup::stock_tools::folder()?)
        .programs(&artifacts)
        .file(&artifacts.bench_downtime, "/bin/bench-downtime");
    let mut program = vec!["bench-downtime".to_owned()];
    program.extend(options(arguments));
    program.extend(["--its".to_owned(), arguments.its.clone()]);
    let program: Vec<_> = program.iter().map(String::as_str).collect();
    compare::in_testbed(&testbed, &program, TESTBED_LIMIT, note)
}

fn options(arguments: &Arguments) -> Vec<String> {
    let options = [
        ["--monitors", arguments.peer.monitors()],
        ["--transports", &arguments.transports.join(",")],
        ["--dirty", &arguments.dirty.join(",")],
        ["--runs", &arguments.runs.to_string()],
    ];
    options.into_iter().flatten().map(str::to_owned).collect()
}

fn note(migrations: &mut Vec<Migration>, migration: Migration) {
    eprintln!(
        "{:>4}: {} {} {}: dark for {:.3} ms{}",
        migrations.len() + 1,
        migration.monitor,
        migration.transport,
        migration.dirty,
        ms(migration.dark_ns),
        if migration.judged { "" } else { ", not judged" },
    );
    migrations.push(migration);
}

/// Dark times of one kind of migration, ns, sorted; and how many could not be judged.
#[derive(Debug, Default)]
struct Darks {
    judged: Vec<u64>,
    unjudged: usize,
}

/// By transport and dirty bytes, then by monitor.
type Kinds = BTreeMap<(String, String), BTreeMap<String, Darks>>;

fn kinds(migrations: &[Migration]) -> Kinds {
    let mut kinds = Kinds::new();
    for migration in migrations {
        let kind = (migration.transport.clone(), migration.dirty.clone());
        let monitors = kinds.entry(kind).or_default();
        let darks = monitors.entry(migration.monitor.clone()).or_default();
        if migration.judged {
            darks.judged.push(migration.dark_ns);
        } else {
            darks.unjudged += 1;
        }
    }
    for darks in kinds.values_mut().flat_map(BTreeMap::values_mut) {
        darks.judged.sort_unstable();
    }
    kinds
}

fn print(kinds: &Kinds) {
    println!("dark time seen from outside, ms");
    println!(
        "{:<10} {:>5} {:<9} {:>4} {:>9} {:>9} {:>9}  not judged",
        "transport", "dirty", "monitor", "runs", "median", "min", "max"
    );
    for ((transport, dirty), monitors) in kinds {
        for (monitor, darks) in monitors {
            let (Some(min), Some(max)) = (darks.judged.first(), darks.judged.last()) else {
                continue;
            };
            println!(
                "{transport:<10} {dirty:>5} {monitor:<9} {:>4} {:>9.3} {:>9.3} {:>9.3}  {}",
                darks.judged.len(),
                median(&darks.judged) / 1e6,
                ms(*min),
                ms(*max),
                darks.unjudged,
            );
        }
        if let Some(Ratio { value, low, high }) = ratio_of(monitors) {
            println!("{:16} ratio     {value:>14.3}  95 % {low:.3}–{high:.3}", "");
        }
    }
}

/// This monitor's dark times as a part of the peer's.
fn ratio_of(monitors: &BTreeMap<String, Darks>) -> Option<Ratio> {
    let (ours, peers) = (monitors.get("blackout")?, monitors.get("qemu")?);
    ratio(&ours.judged, &peers.judged)
}

/// One kind, for programs.
fn summary((kind, monitors): (&(String, String), &BTreeMap<String, Darks>)) -> Value {
    let figures = |darks: &Darks| {
        json!({
            "judged": darks.judged.len(),
            "not_judged": darks.unjudged,
            "median_ns": (!darks.judged.is_empty()).then(|| median(&darks.judged)),
            "min_ns": darks.judged.first(),
            "max_ns": darks.judged.last(),
        })
    };
    let monitors_figures: BTreeMap<_, _> = monitors
        .iter()
        .map(|(monitor, darks)| (monitor, figures(darks)))
        .collect();
    json!({
        "transport": kind.0,
        "dirty": kind.1,
        "monitors": monitors_figures,
        "ratio": ratio_of(monitors)
            .map(|Ratio { value, low, high }| json!({ "value": value, "low": low, "high": high })),
    })
}

fn ms(ns: u64) -> f64 {
    ns as f64 / 1e6
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_could_not_be_judged_is_counted_and_left_out() {
        let migration = |dark_ns, judged| Migration {
            monitor: "qemu".into(),
            transport: "tcp".into(),
            dirty: "1M".into(),
            dark_ns,
            error_ns: 0,
            judged,
            set_aside_ns: 0,
            downtime: None,
            total_time: None,
        };
        let kinds = kinds(&[migration(3, true), migration(99, false), migration(1, true)]);
        let darks = &kinds[&("tcp".to_owned(), "1M".to_owned())]["qemu"];
        assert_eq!(
            (darks.judged.as_slice(), darks.unjudged),
            ([1, 3].as_slice(), 1)
        );
    }
}
