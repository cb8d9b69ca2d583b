//! How well a monitor knows beforehand how long its guest will be dark, and whether it keeps to its
//! limit. `cargo xtask bench prediction` runs it and says what comes of it.
//!
//! Guests of different kinds are handed on from monitor to monitor. Prints one JSON object a line for
//! each migration.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::Parser;
use harness::{GuestView, Vmm, VmmOptions};
use serde_json::{Value, json};

/// How long a guest may take to set itself up, and a migration to end.
const LIMIT: Duration = Duration::from_secs(120);

/// Hands guests of different kinds on from monitor to monitor.
#[derive(Parser)]
#[command(name = "bench-prediction")]
struct Arguments {
    /// Migrations of each guest, each to a monitor of its own.
    #[arg(long)]
    hops: u32,
    /// Downtime limits, ms, that the migrations of a guest have in turn.
    #[arg(long, required = true, value_delimiter = ',')]
    limits: Vec<u64>,
    /// What guests keep dirty.
    #[arg(long, required = true, value_delimiter = ',')]
    dirty: Vec<String>,
    /// Devices and events of each that guests map in an ITS, as 16x16; 0x1 for none.
    #[arg(long, required = true, value_delimiter = ',')]
    its: Vec<String>,
    /// Their vCPUs.
    #[arg(long, required = true, value_delimiter = ',')]
    cpus: Vec<u32>,
}

fn main() -> ExitCode {
    harness::exit(&run(&Arguments::parse()))
}

fn run(arguments: &Arguments) -> Result<()> {
    for its in &arguments.its {
        let (devices, events) = its.split_once('x').context("DEVICESxEVENTS is wanted")?;
        for &cpus in &arguments.cpus {
            for dirty in &arguments.dirty {
                let options = VmmOptions {
                    cpus,
                    cmdline: format!("dirty={dirty} its_devices={devices} its_events={events}"),
                    ..VmmOptions::default()
                };
                hand_on(arguments, &options)?;
            }
        }
    }
    Ok(())
}

/// Starts a guest and hands it on from monitor to monitor.
fn hand_on(arguments: &Arguments, options: &VmmOptions) -> Result<()> {
    let mut source = Vmm::spawn(options)?;
    GuestView::open(source.pid())?.wait_ready(LIMIT)?;
    let limits = arguments.limits.iter().cycle();
    for (hop, limit_ms) in (0..arguments.hops).zip(limits) {
        let mut destination = Vmm::spawn(&options.incoming("defer"))?;
        let uri = format!("unix:{}", destination.dir().join("migration").display());
        let listen = json!({ "uri": uri });
        destination.qmp.execute("migrate-incoming", listen)?;
        let limit = json!({ "downtime-limit": limit_ms });
        source.qmp.execute("migrate-set-parameters", limit)?;
        let answer = source.qmp.migrate(&uri, LIMIT)?;
        let refused =
            answer["status"] == "failed" && answer["blackout"].get("prediction").is_none();
        ensure!(refused || answer["status"] == "completed", "{answer}");
        println!("{}", line(options, hop, *limit_ms, &answer)?);
        if !refused {
            GuestView::open(destination.pid())?.wait_progress(0, LIMIT)?;
            source = destination;
        }
    }
    Ok(())
}

fn line(options: &VmmOptions, hop: u32, limit_ms: u64, answer: &Value) -> Result<Value> {
    let prediction = &answer["blackout"]["prediction"];
    if prediction.is_null() {
        answer["error-desc"].as_str().context("no reason")?;
    }
    Ok(json!({
        "cpus": options.cpus,
        "guest": options.cmdline,
        "hop": hop,
        "limit_ms": limit_ms,
        // What a migration that would have exceeded its limit says.
        "refused": answer["error-desc"],
        "prediction": prediction,
    }))
}
