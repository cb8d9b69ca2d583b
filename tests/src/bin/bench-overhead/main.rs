//! What the tool costs those whom it records. `cargo xtask bench overhead` runs it and says what comes
//! of it.
//!
//! Prints one JSON object a line for each measurement.

mod attached;
mod downtime;
mod exits;
mod volume;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Result;
use clap::{Parser, ValueEnum};

/// How long a guest may take to set itself up, and a migration to end.
const LIMIT: Duration = Duration::from_secs(120);

/// Measures what the tool costs.
#[derive(Parser)]
#[command(name = "bench-overhead")]
struct Arguments {
    /// What to measure.
    #[arg(long, value_enum, required = true, value_delimiter = ',')]
    parts: Vec<Part>,
    /// Migrations of each kind, and windows of each kind in which exits are counted.
    #[arg(long, default_value_t = 30)]
    runs: usize,
    /// A monitor that was built without probes, to migrate with too.
    #[arg(long, value_name = "FILE")]
    without_probes: Option<PathBuf>,
    /// Also with a bpftrace script that gathers the same.
    #[arg(long)]
    bpftrace: bool,
    /// Events a second, where many are recorded.
    #[arg(long, default_value_t = 100_000)]
    rate: u64,
    /// For how long.
    #[arg(long, default_value_t = 60)]
    seconds: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Part {
    /// The downtime of a migration.
    Downtime,
    /// The exits of a guest that does nothing else.
    Exits,
    /// A recorder that has much to write.
    Volume,
}

fn main() -> ExitCode {
    harness::exit(&run(&Arguments::parse()))
}

fn run(arguments: &Arguments) -> Result<()> {
    for part in &arguments.parts {
        match part {
            Part::Downtime => downtime::run(arguments)?,
            Part::Exits => exits::run(arguments)?,
            Part::Volume => volume::run(arguments)?,
        }
    }
    Ok(())
}

/// The kinds in another order each round, so that none always comes first.
fn rotated<T: Copy>(kinds: &[T], round: usize) -> Vec<T> {
    let mut turned = kinds.to_vec();
    turned.rotate_left(round % kinds.len().max(1));
    turned
}
