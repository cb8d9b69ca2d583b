//! `blackout import`.

use std::fs::File;
use std::io::{self, BufRead, BufReader};
use std::path::PathBuf;

use anyhow::Context;
use clap::ValueEnum;

use super::Outcome;
use crate::import::{self, Strings};

/// Make a recording of what another tool has recorded of a blackout-vmm
///
/// `perf` is what `perf script --ns -F comm,pid,tid,time,event,trace` prints of
/// `perf record -k CLOCK_MONOTONIC -e 'sdt_vmm:*'`. The other verbs read the recording as one of their
/// own. perf sees the probes only: there are no ioctls in it, and a vCPU's last exit is where
/// it was seen to be paused.
///
/// Needs no rights.
#[derive(Debug, clap::Args)]
#[command(after_help = super::EXIT_CODES)]
pub(super) struct Args {
    /// Which tool
    format: Format,

    /// What it printed; `-` is the standard input
    #[arg(value_name = "FILE")]
    input: PathBuf,

    /// The monitor that ran, for the names of handlers and states: perf has their addresses only
    #[arg(long, value_name = "PROGRAM")]
    exe: Option<PathBuf>,

    /// Where to write the recording
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
}

/// Whose text.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum Format {
    /// `perf script`
    Perf,
}

pub(super) fn run(args: &Args) -> anyhow::Result<Outcome> {
    let Format::Perf = args.format;
    let strings = args.exe.as_deref().map(Strings::of).transpose()?;
    let input: Box<dyn BufRead> = match args.input.as_os_str() == "-" {
        true => Box::new(io::stdin().lock()),
        false => {
            let file = File::open(&args.input);
            let file = file.with_context(|| format!("cannot open {}", args.input.display()))?;
            Box::new(BufReader::new(file))
        }
    };
    let output = File::create(&args.output);
    let output = output.with_context(|| format!("cannot write {}", args.output.display()))?;
    let name = args.output.display().to_string();
    let hits = import::perf(input, &strings.unwrap_or_default(), output, name)
        .with_context(|| args.input.display().to_string())?;
    eprintln!("blackout: {hits} events; {}", args.output.display());
    Ok(Outcome::Done)
}
