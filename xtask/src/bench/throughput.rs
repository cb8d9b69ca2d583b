//! `cargo xtask bench throughput`: how fast a large idle guest migrates over TCP on loopback, beside
//! QEMU, and beside the sockets alone, into memory that is used again and again, and by plain reads into
//! fresh memory.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::process::Command;

use anyhow::Result;
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::compare::{self, Peer, Ratio, median, ratio};
use crate::artifacts::{self, Platform};
use crate::setup::{self, Purpose};

/// Arguments of `cargo xtask bench throughput`.
#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// Whom to compare with.
    #[arg(long, value_enum, default_value = "qemu")]
    peer: Peer,
    /// Guest RAM, full of incompressible pages, GiB; source and destination need as much each.
    #[arg(long, default_value_t = 4)]
    gib: u64,
    /// What to migrate over: tcp, tls, or multifd with four connections.
    #[arg(long, value_delimiter = ',', default_value = "tcp,multifd")]
    transports: Vec<String>,
    /// Migrations of each monitor.
    #[arg(long, default_value_t = 5)]
    runs: usize,
    /// Where `throughput.json` goes.
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
}

/// One run, as `bench-throughput` prints it.
#[derive(Debug, Deserialize, Serialize)]
struct Run {
    /// A monitor, `sockets`, or `fresh`: sockets into fresh memory.
    what: String,
    transport: String,
    ns: u64,
    /// CPU time of both monitors without their vCPUs.
    cpu_ns: Option<u64>,
}

/// Runs the benchmark, prints the table, writes the file.
pub(crate) fn run(arguments: &Arguments) -> Result<u8> {
    setup::ensure(&[Purpose::Build, Purpose::Test])?;
    let artifacts = artifacts::build(Platform::Host)?;
    let mut command = Command::new(&artifacts.bench_throughput);
    command
        .args(["--monitors", arguments.peer.monitors()])
        .args(["--transports", &arguments.transports.join(",")])
        .args(["--gib", &arguments.gib.to_string()])
        .args(["--runs", &arguments.runs.to_string()])
        .envs(artifacts.environment(None));
    let mut runs = Vec::new();
    compare::each_line(&mut command, |run: Run| {
        eprintln!(
            "{:>4}: {} {} {:.3} s",
            runs.len() + 1,
            run.transport,
            run.what,
            run.ns as f64 / 1e9
        );
        runs.push(run);
    })?;
    print(&runs, arguments.gib);
    compare::write(
        arguments.out.as_deref(),
        "throughput.json",
        &json!({
            "schema": "blackout.bench-throughput/4",
            "gib": arguments.gib,
            "runs": runs,
        }),
    )?;
    Ok(0)
}

/// What the runs of one kind took: the total time and the CPU time, ns.
type Times = (Vec<u64>, Vec<u64>);

fn print(runs: &[Run], gib: u64) {
    let mut times: BTreeMap<(&str, &str), Times> = BTreeMap::new();
    for run in runs {
        let (took, cpu) = times.entry((&run.transport, &run.what)).or_default();
        took.push(run.ns);
        cpu.extend(run.cpu_ns);
    }
    let gib = gib as f64;
    println!(
        "{:<8} {:<10} {:>9} {:>9} {:>14}",
        "", "", "total, s", "GiB/s", "CPU s per GiB"
    );
    for ((transport, what), (took, cpu)) in &mut times {
        took.sort_unstable();
        cpu.sort_unstable();
        let total = median(took) / 1e9;
        print!(
            "{transport:<8} {what:<10} {total:>9.3} {:>9.3}",
            gib / total
        );
        match cpu.as_slice() {
            [] => println!(),
            cpu => println!(" {:>14.3}", median(cpu) / 1e9 / gib),
        }
    }
    let transports: BTreeSet<_> = runs.iter().map(|run| run.transport.as_str()).collect();
    for transport in transports {
        let took = |what| times.get(&(transport, what)).map_or(&[][..], |(t, _)| t);
        let say = |text: &str, ours, theirs| {
            if let Some(Ratio { value, low, high }) = ratio(ours, theirs) {
                println!("{transport}, {text} {value:.3}, 95 % {low:.3}–{high:.3}");
            }
        };
        say("total time, to QEMU's:", took("blackout"), took("qemu"));
        let text = "total time, to plain reads into fresh memory:";
        say(text, took("blackout"), took("fresh"));
        let text = "share of what the sockets can do:";
        say(text, took("sockets"), took("blackout"));
    }
}
