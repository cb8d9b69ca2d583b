//! `blackout export`.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::Subcommand;

use super::report::read_all;
use super::{DEFAULT_RECORDING, Outcome};
use crate::analysis;
use crate::export::{chrome, csv, folded, perfetto, speedscope};
use crate::report::schema::Report;

/// Write a recording in a format of another program
///
/// Needs no rights: it only reads the recording.
#[derive(Debug, clap::Args)]
#[command(after_help = super::EXIT_CODES)]
pub(super) struct Args {
    #[command(subcommand)]
    format: Format,
}

#[derive(Debug, Subcommand)]
enum Format {
    /// A trace for ui.perfetto.dev, chrome://tracing and speedscope
    ///
    /// One axis for source, destination and kernel, to the nanosecond: each thread's spans, below
    /// them what KVM did for it, below that its stays in KVM_RUN. Arrows lead from a span to the
    /// ioctl that it made, and along the messages from one side to the other.
    Chrome(Files),
    /// Perfetto's own format: the same, smaller, and with a row for each migration
    Perfetto(Files),
    /// A profile a thread for speedscope.app
    Speedscope(Files),
    /// Stacks with their own time in ns, for flame graphs
    ///
    /// Only the downtime counts, so that a frame's width is its share of it.
    Folded(Files),
    /// The flame graph of those stacks, as SVG
    Flamegraph(Files),
    /// A table with a row for each span, ioctl and gap
    Csv(Files),
}

#[derive(Debug, clap::Args)]
struct Files {
    /// The recording; give both if source and destination were recorded apart
    #[arg(default_value = DEFAULT_RECORDING, value_name = "RECORDING")]
    recordings: Vec<PathBuf>,

    /// Where to write; `-` is standard output
    #[arg(short, long, default_value = "-", value_name = "FILE")]
    output: PathBuf,
}

pub(super) fn run(args: &Args) -> anyhow::Result<Outcome> {
    let (Format::Chrome(files)
    | Format::Perfetto(files)
    | Format::Speedscope(files)
    | Format::Folded(files)
    | Format::Flamegraph(files)
    | Format::Csv(files)) = &args.format;
    // Traces show all that was recorded: they read it once more.
    let recordings = read_all(&files.recordings)?;
    let migrations = analysis::find(&recordings);
    into(&files.output, |out| match &args.format {
        Format::Chrome(_) => chrome::write(out, &recordings, &migrations),
        Format::Perfetto(_) => perfetto::write(out, &recordings, &migrations),
        Format::Speedscope(_) => speedscope::write(out, &migrations),
        Format::Folded(_) => folded::write(out, &migrations),
        Format::Flamegraph(_) => folded::flamegraph(out, &migrations),
        Format::Csv(_) => csv::write(out, &Report::new(&migrations)),
    })
}

fn into(
    path: &Path,
    write: impl FnOnce(&mut Box<dyn Write>) -> io::Result<()>,
) -> anyhow::Result<Outcome> {
    let mut out: Box<dyn Write> = if path == Path::new("-") {
        Box::new(BufWriter::new(io::stdout().lock()))
    } else {
        let file =
            File::create(path).with_context(|| format!("cannot create {}", path.display()))?;
        Box::new(BufWriter::new(file))
    };
    match write(&mut out).and_then(|()| out.flush()) {
        // A reader that has seen enough (`| head`) is no failure.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(Outcome::Done),
        written => {
            written.with_context(|| format!("cannot write {}", path.display()))?;
            Ok(Outcome::Done)
        }
    }
}
