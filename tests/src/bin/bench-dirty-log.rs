//! What the last look at what a guest wrote costs, by how large the guest is, with a dirty log and with
//! dirty rings. `cargo xtask bench dirty-log` runs it and says what comes of it.
//!
//! Guests that keep 1 MiB dirty, whatever their size, migrate over a unix socket; the kinds take turns.
//! Prints one JSON object a line for each migration.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::Parser;
use harness::{GuestView, Vmm, VmmOptions};
use serde_json::json;

/// How long a guest may take to set itself up, and a migration to end.
const LIMIT: Duration = Duration::from_secs(120);
/// The longest rings: none of these guests fills them.
const ENTRIES: u32 = 1 << 16;

/// Migrates guests of different sizes, with and without dirty rings.
#[derive(Parser)]
#[command(name = "bench-dirty-log")]
struct Arguments {
    /// Migrations of each kind.
    #[arg(long)]
    runs: u32,
    /// Guest RAM.
    #[arg(long, required = true, value_delimiter = ',')]
    memory: Vec<String>,
}

fn main() -> ExitCode {
    harness::exit(&run(&Arguments::parse()))
}

fn run(arguments: &Arguments) -> Result<()> {
    for memory in &arguments.memory {
        for _ in 0..arguments.runs {
            for rings in [false, true] {
                migrate(memory, rings).with_context(|| format!("{memory}, rings: {rings}"))?;
            }
        }
    }
    Ok(())
}

fn migrate(memory: &str, rings: bool) -> Result<()> {
    let options = VmmOptions {
        memory: memory.to_owned(),
        cmdline: "dirty=1M".to_owned(),
        extra: match rings {
            false => Vec::new(),
            true => vec!["--dirty-ring-size".to_owned(), ENTRIES.to_string()],
        },
        ..VmmOptions::default()
    };
    let mut source = Vmm::spawn(&options)?;
    GuestView::open(source.pid())?.wait_ready(LIMIT)?;
    let mut destination = Vmm::spawn(&options.incoming("defer"))?;
    let uri = format!("unix:{}", destination.dir().join("migration").display());
    let listen = json!({ "uri": uri });
    destination.qmp.execute("migrate-incoming", listen)?;
    let answer = source.qmp.migrate(&uri, LIMIT)?;
    ensure!(answer["status"] == "completed", "{answer}");
    let blackout = &answer["blackout"];
    let spans = blackout["spans"].as_array().context("no spans")?;
    let last = spans
        .iter()
        .find(|span| span["name"] == "ram_final" && span["side"] == "source");
    println!(
        "{}",
        json!({
            "memory": memory,
            "rings": rings,
            "ram_final_ns": last.context("no ram_final")?["duration-ns"],
            "downtime_ns": blackout["downtime-ns"],
        })
    );
    Ok(())
}
