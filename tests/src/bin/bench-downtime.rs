//! How long a guest is dark while it migrates, seen from outside: the same guest in this project's
//! monitor and in QEMU, in turn. `cargo xtask bench downtime` runs it and says what comes of it.
//!
//! Prints one JSON object a line for each migration.

use std::ops::Range;
use std::process::ExitCode;
use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::Parser;
use harness::observer::Watched;
use harness::pair::{Monitor, Pair, Transport};
use harness::{Observer, VmmOptions};
use serde_json::{Value, json};

/// How long a guest may take to set itself up, and a migration to end.
const LIMIT: Duration = Duration::from_secs(120);

/// An observer that did not look for longer than this, or a tenth of what it saw, can't judge.
const SHARP_NS: u64 = 100_000;

/// How long a guest is looked at before its RAM is handed over, which takes no time in which it could be.
const BEFOREHAND: Duration = Duration::from_millis(30);

/// Migrations until one can be judged.
const TRIES: usize = 5;

/// Migrates a bare-metal guest between two monitors and measures its dark time from outside.
#[derive(Parser)]
#[command(name = "bench-downtime")]
struct Arguments {
    /// Whose migrations to measure; they take turns.
    #[arg(long, value_enum, required = true, value_delimiter = ',')]
    monitors: Vec<Monitor>,
    /// Over what.
    #[arg(long, value_enum, required = true, value_delimiter = ',')]
    transports: Vec<Transport>,
    /// Bytes that the guest keeps dirty, as 1M or 16M.
    #[arg(long, required = true, value_delimiter = ',')]
    dirty: Vec<String>,
    /// Devices and events of each that the guest maps in its ITS, as 256x16.
    #[arg(long, value_parser = its_words, default_value = "0x1")]
    its: String,
    /// Guest RAM.
    #[arg(long, default_value = "128M")]
    memory: String,
    /// Migrations of each kind.
    #[arg(long, default_value_t = 15)]
    runs: usize,
}

fn main() -> ExitCode {
    harness::exit(&run(&Arguments::parse()))
}

fn run(arguments: &Arguments) -> Result<()> {
    for _ in 0..arguments.runs {
        for &transport in &arguments.transports {
            for dirty in &arguments.dirty {
                for &monitor in &arguments.monitors {
                    // Debian's QEMU is older than the mode.
                    if (monitor, transport) == (Monitor::Qemu, Transport::Cpr) {
                        continue;
                    }
                    let judged = || migrate(arguments, monitor, transport, dirty);
                    // Printed all the same: how often it takes several says how far to trust it.
                    for _ in 0..TRIES {
                        if judged()? {
                            break;
                        }
                    }
                }
            }
        }
    }
    Ok(())
}

/// What the guest is told of devices and events.
fn its_words(text: &str) -> Result<String> {
    let numbers = text.split_once('x').context("DEVICESxEVENTS is wanted")?;
    let (devices, events): (u32, u32) = (numbers.0.parse()?, numbers.1.parse()?);
    Ok(format!("its_devices={devices} its_events={events}"))
}

/// When the guest ran nowhere, as the monitor has it: of what is seen from outside, this is what is meant.
fn standstill(blackout: &Value) -> Option<Range<u64>> {
    let start = blackout["start-ns"].as_u64()?;
    let at = |key: &str| start.checked_add_signed(blackout[key].as_i64()?);
    Some(at("downtime-start-ns")?..at("first-run-ns")?)
}

/// Migrates a fresh guest once and prints what was seen. Whether that was seen sharply.
fn migrate(
    arguments: &Arguments,
    monitor: Monitor,
    transport: Transport,
    dirty: &str,
) -> Result<bool> {
    let options = VmmOptions {
        memory: arguments.memory.clone(),
        cmdline: format!("dirty={dirty} {}", arguments.its),
        ..VmmOptions::default()
    };
    let Pair {
        mut source,
        destination,
        guest,
        uri,
    } = Pair::spawn(monitor, transport, &options, LIMIT)?;
    guest.wait_progress(0, LIMIT)?;
    let watched = (
        Watched::open(source.pid())?,
        Watched::open(destination.pid())?,
    );
    let over = Arc::new(OnceLock::new());
    let observer = match transport {
        Transport::Cpr => {
            let observer = Observer::start_shared(watched.0, watched.1, 1, Arc::clone(&over))?;
            thread::sleep(BEFOREHAND);
            observer
        }
        _ => Observer::start(watched.0, watched.1, 1, LIMIT),
    };
    let answer = source.qmp.migrate(&uri, LIMIT)?;
    ensure!(answer["status"] == "completed", "{answer}");
    if transport == Transport::Cpr {
        guest.wait_progress(0, LIMIT)?;
        let stood = standstill(&answer["blackout"]).context("no time of the switchover")?;
        over.set(stood).ok().context("it was over before")?;
    }
    let seen = observer.finish()?;
    let judged = seen.error_ns <= SHARP_NS.max(seen.blackout_ns() / 10);
    let line = json!({
        "monitor": monitor,
        "transport": transport,
        "dirty": dirty,
        // As the monitor itself says, where it says it so exactly.
        "downtime_ns": answer["blackout"]["downtime-ns"],
        "dark_ns": seen.blackout_ns(),
        "error_ns": seen.error_ns,
        "judged": judged,
        "set_aside_ns": seen.set_aside_ns,
        // As the monitor itself says, ms.
        "downtime": answer["downtime"],
        "total_time": answer["total-time"],
    });
    println!("{line}");
    Ok(judged)
}
