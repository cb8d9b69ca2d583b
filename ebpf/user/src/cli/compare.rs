//! `blackout compare`.

use std::path::PathBuf;

use anyhow::Context;

use super::Outcome;
use super::check::read_set;
use super::print::{json, print};
use crate::gate::side_by_side::{self, Compared};

/// Show two sets of migrations side by side: medians, shift and confidence of each span
///
/// A set is a recording, a report, samples, or a folder of them, as for `blackout check`; that verb
/// gives a verdict, this one only shows.
#[derive(Debug, clap::Args)]
#[command(after_help = super::EXIT_CODES)]
pub(super) struct Args {
    /// The first set
    #[arg(value_name = "A")]
    a: PathBuf,

    /// The second
    #[arg(value_name = "B")]
    b: PathBuf,

    /// Count migrations whose figures are in doubt
    #[arg(long)]
    doubtful: bool,

    /// Write JSON, schema blackout.compare/1
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &Args) -> anyhow::Result<Outcome> {
    let a = read_set(std::slice::from_ref(&args.a), args.doubtful).context("the first set")?;
    let b = read_set(std::slice::from_ref(&args.b), args.doubtful).context("the second set")?;
    let compared = Compared::new(&a, &b);
    print(|out| {
        if args.json {
            json(out, &compared)
        } else {
            side_by_side::write(out, &compared)
        }
    })
    .context("cannot write the comparison")?;
    Ok(Outcome::Done)
}
