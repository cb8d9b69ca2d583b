//! The command line: one file a verb, each with its arguments and one function `run`.

mod bench;
mod check;
mod compare;
mod doctor;
mod export;
mod import;
mod list;
mod merge;
mod print;
mod record;
mod report;
mod top;
mod watch;

use std::process::ExitCode;
use std::time::Duration;

use clap::{Parser, Subcommand};

/// The recording's file name where none is given.
pub const DEFAULT_RECORDING: &str = "blackout.rec";

/// Measures what a live migration's blackout is made of.
///
/// When a virtual machine migrates, there is a moment in which its guest runs nowhere. `blackout
/// record` watches the virtual machine monitors on both ends (their USDT probes, and what KVM does
/// for them), `blackout report` says how long that moment was and which layer took it.
#[derive(Debug, Parser)]
#[command(version, propagate_version = true, max_term_width = 100, after_help = EXIT_CODES)]
pub struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

const EXIT_CODES: &str = "\
Exit codes:
  0  done
  1  done, and the answer is a bad one (--strict: events were lost, or a figure is in doubt)
  2  done, and the answer needs more runs (check, bench)
  3  could not run: bad arguments, an unreadable file, a missing right";

#[derive(Debug, Subcommand)]
enum Verb {
    Record(record::Args),
    Watch(watch::Args),
    Top(top::Args),
    Report(report::Args),
    Export(export::Args),
    Merge(merge::Args),
    Import(import::Args),
    Compare(compare::Args),
    Check(check::Args),
    Bench(bench::Args),
    List(list::Args),
    Doctor(doctor::Args),
}

/// How a verb ended, as the shell sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Done.
    Done,
    /// Done, and the answer is one that a script should stop at.
    Bad,
    /// Done, and the answer needs more runs.
    Open,
    /// Could not run.
    CannotRun,
    /// Done, and the command that was run ended with this.
    Command(u8),
}

impl From<Outcome> for ExitCode {
    fn from(outcome: Outcome) -> Self {
        match outcome {
            Outcome::Done => Self::SUCCESS,
            Outcome::Bad => Self::from(1),
            Outcome::Open => Self::from(2),
            Outcome::CannotRun => Self::from(3),
            Outcome::Command(code) => Self::from(code),
        }
    }
}

/// Runs the verb.
///
/// # Errors
/// Whatever kept it from running, as a chain of causes that begins with what was tried.
pub fn run(cli: Cli) -> anyhow::Result<Outcome> {
    match cli.verb {
        Verb::Record(args) => record::run(&args),
        Verb::Watch(args) => watch::run(&args),
        Verb::Top(args) => top::run(&args),
        Verb::Report(args) => report::run(&args),
        Verb::Merge(args) => merge::run(&args),
        Verb::Import(args) => import::run(&args),
        Verb::Export(args) => export::run(&args),
        Verb::Compare(args) => compare::run(&args),
        Verb::Check(args) => check::run(&args),
        Verb::Bench(args) => bench::run(&args),
        Verb::List(args) => list::run(&args),
        Verb::Doctor(args) => doctor::run(&args),
    }
}

/// Reads a number of seconds.
fn seconds(text: &str) -> Result<Duration, String> {
    let seconds = text.parse::<f64>().map_err(|error| error.to_string())?;
    Duration::try_from_secs_f64(seconds).map_err(|error| error.to_string())
}
