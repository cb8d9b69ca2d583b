//! `cargo xtask bench downtime`: how long a guest is dark while it migrates, beside QEMU.
//!
//! `bench-downtime` migrates the same bare-metal guest with either monitor in turn, and an observer
//! looks at the guest's counter in the memory of both sides: neither monitor's word is taken. No tool
//! is attached. Other work on the machine lengthens both; the ratio is what to look at.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::Command;

use anyhow::Result;
use clap::ValueEnum;
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::compare::{self, Ratio, median, ratio};
use crate::artifacts::{self, Platform};
use crate::setup::{self, Purpose};

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
    #[arg(long, value_delimiter = ',', default_value = "tcp,unix,cpr")]
    transports: Vec<String>,
    /// Bytes that the guest keeps dirty.
    #[arg(long, value_delimiter = ',', default_value = "1M,16M")]
    dirty: Vec<String>,
    /// Where `downtime.json` goes.
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Peer {
    /// Debian's QEMU, with KVM.
    Qemu,
    /// Nobody: this project's monitor alone.
    None,
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
    setup::ensure(&[Purpose::Build, Purpose::Test])?;
    let migrations = measure(arguments)?;
    let kinds = kinds(&migrations);
    print(&kinds);

    compare::write(
        arguments.out.as_deref(),
        "downtime.json",
        &json!({
            "schema": "blackout.bench-downtime/1",
            "migrations": migrations,
        }),
    )?;
    Ok(0)
}

fn measure(arguments: &Arguments) -> Result<Vec<Migration>> {
    let artifacts = artifacts::build(Platform::Host)?;
    let monitors = match arguments.peer {
        Peer::Qemu => "blackout,qemu",
        Peer::None => "blackout",
    };
    let mut command = Command::new(&artifacts.bench_downtime);
    command
        .args(["--monitors", monitors])
        .args(["--transports", &arguments.transports.join(",")])
        .args(["--dirty", &arguments.dirty.join(",")])
        .args(["--runs", &arguments.runs.to_string()])
        .envs(artifacts.environment(None));
    let mut migrations = Vec::new();
    compare::each_line(&mut command, |migration: Migration| {
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
    })?;
    Ok(migrations)
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
        if let (Some(ours), Some(peers)) = (monitors.get("blackout"), monitors.get("qemu"))
            && let Some(Ratio { value, low, high }) = ratio(&ours.judged, &peers.judged)
        {
            println!("{:16} ratio     {value:>14.3}  95 % {low:.3}–{high:.3}", "");
        }
    }
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
