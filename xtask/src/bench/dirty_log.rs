//! `cargo xtask bench dirty-log`: what the last look at what a guest wrote costs, with KVM's dirty log and
//! with its dirty rings, by how large the guest is.
//!
//! The look is in the downtime. A log is read whole, so its cost grows with the guest; a ring has what was
//! written.

use std::path::PathBuf;
use std::process::Command;

use anyhow::Result;
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::compare::{self, median, ratio};
use crate::artifacts::{self, Platform};
use crate::setup::{self, Purpose};

/// Arguments of `cargo xtask bench dirty-log`.
#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// Migrations of each kind.
    #[arg(long, default_value_t = 15)]
    runs: usize,
    /// Guest RAM, which is hardly used: this machine need not have it.
    #[arg(long, value_delimiter = ',', default_value = "128M,1G,4G,16G,64G")]
    memory: Vec<String>,
    /// Where `dirty-log.json` goes.
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
}

/// One migration, as `bench-dirty-log` prints it.
#[derive(Debug, Deserialize, Serialize)]
struct Migration {
    memory: String,
    rings: bool,
    ram_final_ns: u64,
    downtime_ns: u64,
}

/// Runs the benchmark, prints the table, writes the file.
pub(crate) fn run(arguments: &Arguments) -> Result<u8> {
    setup::ensure(&[Purpose::Build])?;
    let artifacts = artifacts::build(Platform::Host)?;
    let mut command = Command::new(&artifacts.bench_dirty_log);
    command
        .args(["--runs", &arguments.runs.to_string()])
        .args(["--memory", &arguments.memory.join(",")])
        .envs(artifacts.environment(None));
    let mut migrations: Vec<Migration> = Vec::new();
    compare::each_line(&mut command, |migration| migrations.push(migration))?;
    println!(
        "{:>8}  {:>22}  {:>22}  ratio of downtimes",
        "RAM", "ram_final, ms", "downtime, ms"
    );
    println!(
        "{:>8}  {:>10} {:>11}  {:>10} {:>11}",
        "", "log", "rings", "log", "rings"
    );
    for memory in &arguments.memory {
        print(memory, &migrations);
    }
    compare::write(
        arguments.out.as_deref(),
        "dirty-log.json",
        &json!({
            "schema": "blackout.bench-dirty-log/1",
            "migrations": migrations,
        }),
    )?;
    Ok(0)
}

fn print(memory: &str, migrations: &[Migration]) {
    let times = |rings: bool, of: fn(&Migration) -> u64| {
        let wanted = |m: &&Migration| m.memory == memory && m.rings == rings;
        let mut times: Vec<_> = migrations.iter().filter(wanted).map(of).collect();
        times.sort_unstable();
        times
    };
    let [looks, darks] = [(|m| m.ram_final_ns) as fn(&Migration) -> u64, |m| {
        m.downtime_ns
    }]
    .map(|of| [times(false, of), times(true, of)]);
    let Some(ratio) = ratio(&darks[1], &darks[0]) else {
        return;
    };
    let ms = |times: &[u64]| median(times) / 1e6;
    println!(
        "{memory:>8}  {:>10.3} {:>11.3}  {:>10.3} {:>11.3}  {:.2} ({:.2}–{:.2})",
        ms(&looks[0]),
        ms(&looks[1]),
        ms(&darks[0]),
        ms(&darks[1]),
        ratio.value,
        ratio.low,
        ratio.high,
    );
}
