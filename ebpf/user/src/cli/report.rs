//! `blackout report`.

use std::io::{self, BufWriter, Write};
use std::path::PathBuf;

use anyhow::Context;

use super::{DEFAULT_RECORDING, Outcome};
use crate::analysis::{self, Loaded, Migration};
use crate::recording::{self, Ending, Reader};
use crate::report::schema::Report;
use crate::report::text;

/// Say how long the guest ran nowhere, and which layer took the time
///
/// Prints, for each migration in the recording, what both sides did in call order, with the time
/// that each step took, its share of the downtime and its result; then the downtime, the blackout
/// (the part of it in which no guest code ran), how much of the downtime is explained by named
/// spans, and where the largest gap is.
///
/// Needs no rights: it only reads the recording.
#[derive(Debug, clap::Args)]
#[command(after_help = super::EXIT_CODES)]
pub(super) struct Args {
    /// The recording; give both if source and destination were recorded apart
    #[arg(default_value = DEFAULT_RECORDING, value_name = "RECORDING")]
    recordings: Vec<PathBuf>,

    /// Write JSON, schema blackout.report/1, for programs
    #[arg(long)]
    json: bool,

    /// Show only the migration with this id
    #[arg(long, value_name = "ID")]
    migration: Option<u64>,

    /// Exit with 1 if there is no migration, or if anything puts a figure in doubt: lost events,
    /// unpaired probes, a recording that is cut
    #[arg(long)]
    strict: bool,
}

pub(super) fn run(args: &Args) -> anyhow::Result<Outcome> {
    let recordings = read_all(&args.recordings)?;
    let mut migrations = analysis::find(&recordings);
    migrations.retain(|migration| args.migration.is_none() || migration.id == args.migration);
    let written = if args.json {
        json(&migrations)
    } else {
        plain(&recordings, &migrations)
    };
    match written {
        // A reader that has seen enough (`| head`) is no failure.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {}
        written => written.context("cannot write the report")?,
    }
    let doubtful = migrations.is_empty()
        || recordings
            .iter()
            .any(|recording| recording.ending != Ending::Finished)
        || migrations
            .iter()
            .any(|migration| !migration.doubts().is_empty());
    Ok(if args.strict && doubtful {
        Outcome::Bad
    } else {
        Outcome::Done
    })
}

/// Reads whole recordings.
pub(super) fn read_all(paths: &[PathBuf]) -> Result<Vec<Loaded>, recording::Error> {
    paths
        .iter()
        .map(|path| Loaded::read(path.display().to_string(), Reader::open(path)?))
        .collect()
}

fn json(migrations: &[Migration<'_>]) -> io::Result<()> {
    let mut out = BufWriter::new(io::stdout().lock());
    serde_json::to_writer_pretty(&mut out, &Report::new(migrations))?;
    writeln!(out)?;
    out.flush()
}

fn plain(recordings: &[Loaded], migrations: &[Migration<'_>]) -> io::Result<()> {
    // Colours stay away from pipes and from those who set NO_COLOR.
    let mut out = BufWriter::new(anstream::AutoStream::auto(io::stdout()).lock());
    text::write(&mut out, recordings, migrations)?;
    out.flush()
}
