//! How well a monitor knows beforehand how long its guest will be dark, and whether it keeps to its
//! limit. `cargo xtask bench prediction` runs it and says what comes of it.
//!
//! Guests of different kinds are handed on from monitor to monitor. Prints one JSON object a line for
//! each migration.

use std::env::consts::ARCH;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::Parser;
use harness::{GuestView, Vmm, VmmOptions};
use serde_json::{Value, json};

/// How long a guest may take to set itself up, and a migration to end.
const LIMIT: Duration = Duration::from_secs(120);

/// What guests keep dirty.
const DIRTY: [&str; 4] = ["64K", "1M", "4M", "16M"];
/// Devices and events of each that guests map in an ITS.
const MAPPED: [(u32, u32); 3] = [(0, 1), (16, 16), (256, 16)];
/// Their vCPUs.
const CPUS: [u32; 2] = [1, 2];

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
}

fn main() -> ExitCode {
    harness::exit(&run(&Arguments::parse()))
}

fn run(arguments: &Arguments) -> Result<()> {
    let mapped = match ARCH {
        "aarch64" => &MAPPED[..],
        _ => &MAPPED[..1],
    };
    for &(devices, events) in mapped {
        for cpus in CPUS {
            for dirty in DIRTY {
                let its = match devices {
                    0 => String::new(),
                    _ => format!(" its_devices={devices} its_events={events}"),
                };
                let options = VmmOptions {
                    cpus,
                    cmdline: format!("dirty={dirty}{its}"),
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
