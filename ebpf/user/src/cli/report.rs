//! `blackout report`.

use std::path::PathBuf;

use super::{DEFAULT_RECORDING, Outcome};
use crate::analysis::Loaded;
use crate::recording::{Ending, Reader};

/// Say how long the guest ran nowhere, and which layer took the time
#[derive(Debug, clap::Args)]
#[command(after_help = super::EXIT_CODES)]
pub(super) struct Args {
    /// The recording; both sides' if two hosts were recorded
    #[arg(default_value = DEFAULT_RECORDING, value_name = "RECORDING")]
    recordings: Vec<PathBuf>,

    /// Exit with 1 when events were lost or a recording is cut
    #[arg(long)]
    strict: bool,
}

pub(super) fn run(args: &Args) -> anyhow::Result<Outcome> {
    let mut doubt = false;
    for path in &args.recordings {
        let loaded = Loaded::read(path.display().to_string(), Reader::open(path)?)?;
        doubt |= loaded.lost_events() > 0 || loaded.ending != Ending::Finished;
        println!(
            "{}: Linux {} {} on {}, by {}; {} events lost",
            loaded.name,
            loaded.header.kernel,
            loaded.header.arch,
            loaded.header.hostname,
            loaded.header.backends.join(", "),
            loaded.lost_events()
        );
    }
    Ok(if doubt && args.strict {
        Outcome::Bad
    } else {
        Outcome::Done
    })
}
