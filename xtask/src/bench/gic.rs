//! `cargo xtask bench gic`: what the GIC's state costs by the number of vCPUs, in instructions.
//!
//! Each access to a register of the GIC locks every vCPU, and each vCPU adds registers: both a save and a
//! load grow with the square. A load is measured twice: into a machine as it was built, and into one
//! that has rehearsed, which writes only what differs.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use super::compare;
use super::its::Plan;
use crate::artifacts;
use crate::kernel;
use crate::setup::{self, Purpose};

/// The guests' vCPUs.
const CPUS: [u32; 4] = [1, 4, 16, 32];
/// Devices, and events of each: few, since the GIC's state knows none of them.
const SIZE: (u64, u64) = (16, 16);

/// Arguments of `cargo xtask bench gic`.
#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// The testbed's kernel.
    #[arg(long, value_enum, default_value = "6.12")]
    kernel: kernel::Series,
    /// Machines into which each guest is restored.
    #[arg(long, default_value_t = 5)]
    restores: u32,
    /// Where `gic.json` goes.
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Give up on a number of vCPUs after this many seconds.
    #[arg(long, default_value_t = 900)]
    timeout: u64,
}

/// What one number of vCPUs took, instructions.
struct Row {
    cpus: u32,
    save: u64,
    load: u64,
    rehearsed: u64,
}

/// Runs the benchmark, prints the table, writes the file.
pub(crate) fn run(arguments: &Arguments) -> Result<u8> {
    setup::ensure(&[Purpose::Gate])?;
    let rows = CPUS
        .into_iter()
        .map(|cpus| measure(arguments, cpus))
        .collect::<Result<Vec<_>>>()?;
    println!("instructions (counting mode), medians");
    println!("vCPUs        save        load   rehearsed   of load");
    for row in &rows {
        println!(
            "{:>5} {:>11} {:>11} {:>11} {:>8.1} %",
            row.cpus,
            row.save,
            row.load,
            row.rehearsed,
            row.rehearsed as f64 / row.load as f64 * 100.0
        );
    }
    let rows = rows.iter().map(|row| {
        json!({
            "vcpus": row.cpus,
            "save": row.save,
            "load": row.load,
            "load_rehearsed": row.rehearsed,
        })
    });
    let figures = json!({ "schema": "blackout.bench-gic/1", "rows": rows.collect::<Vec<_>>() });
    compare::write(arguments.out.as_deref(), "gic.json", &figures)?;
    Ok(0)
}

fn measure(arguments: &Arguments, cpus: u32) -> Result<Row> {
    let counter = artifacts::build_counter()?;
    let medians = |rehearse: bool| {
        let plan = Plan {
            kernel: arguments.kernel,
            sizes: &[SIZE],
            stops: 1,
            restores: arguments.restores,
            cpus,
            rehearse,
            slower: None,
            timeout: Duration::from_secs(arguments.timeout),
        };
        let lines = plan.run(&counter, "bench-gic")?;
        let line = lines.first().context("bench-its measured nothing")?;
        let measured: Value = serde_json::from_str(line)?;
        let median = |pointer: &str| {
            let found = measured.pointer(pointer).and_then(Value::as_u64);
            found.with_context(|| format!("no {pointer}: {measured}"))
        };
        Ok::<_, anyhow::Error>((median("/save/gic/median")?, median("/load/gic/median")?))
    };
    let (save, load) = medians(false)?;
    let (_, rehearsed) = medians(true)?;
    Ok(Row {
        cpus,
        save,
        load,
        rehearsed,
    })
}
