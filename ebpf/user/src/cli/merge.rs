//! `blackout merge`.

use std::fs::File;
use std::path::{Path, PathBuf};

use anyhow::bail;

use super::Outcome;
use super::report::read_all;
use crate::analysis::clock::{self, Clock};
use crate::analysis::{self, Loaded};
use crate::recording::{Basis, Frame, Reader, Relation, Writer};

/// Join the recordings of two hosts into one
///
/// The destination's times are laid onto the source's axis: by --offset, or by the exchanges of
/// clocks that the monitors made in a migration between the two, or by the hosts' atomic time (TAI)
/// or wall clocks. Reports and traces say how wrong that can be, and what of the two is in an
/// impossible order.
///
/// `report`, `export` and the others also read two recordings without this; but only a joined one
/// keeps an offset, and shows migrations between hosts of monitors without probes.
///
/// Needs no rights: it only reads the recordings.
#[derive(Debug, clap::Args)]
#[command(after_help = super::EXIT_CODES)]
pub(super) struct Args {
    /// The source's recording
    #[arg(value_name = "SOURCE")]
    source: PathBuf,

    /// The destination's recording
    #[arg(value_name = "DESTINATION")]
    destination: PathBuf,

    /// Where to write both
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,

    /// What the destination's CLOCK_MONOTONIC shows more than the source's, in ns
    #[arg(long, value_name = "NS", allow_negative_numbers = true)]
    offset: Option<i64>,

    /// How wrong --offset can be at most, in ns
    #[arg(long, value_name = "NS", requires = "offset")]
    error: Option<u64>,

    /// Exit with 1 if anything puts a figure in doubt, such as an impossible order
    #[arg(long)]
    strict: bool,
}

pub(super) fn run(args: &Args) -> anyhow::Result<Outcome> {
    let relation = relation(args)?;
    // Not into one of the two that are still to be read.
    for input in [&args.source, &args.destination] {
        if input.canonicalize().ok() == Some(args.output.canonicalize().unwrap_or_default()) {
            bail!("{} is to be read: give another --output", input.display());
        }
    }
    write(args, relation)?;
    let recordings = read_all(std::slice::from_ref(&args.output))?;
    let migrations = analysis::find(&recordings);
    let joined = migrations
        .iter()
        .filter(|one| one.source.is_some() && one.destination.is_some());
    let error = relation
        .error_ns
        .map_or_else(|| "unknown".to_owned(), |error| format!("{error} ns"));
    eprintln!(
        "blackout: {} migrations, {} of them from both sides; clocks {} ns apart, ± {error} ({}); {}",
        migrations.len(),
        joined.count(),
        relation.offset_ns,
        basis(relation.basis),
        args.output.display()
    );
    let doubts: Vec<_> = migrations.iter().flat_map(|one| one.doubts()).collect();
    for doubt in &doubts {
        eprintln!("blackout: {doubt}");
    }
    Ok(if args.strict && !doubts.is_empty() {
        Outcome::Bad
    } else {
        Outcome::Done
    })
}

/// How the destination's clock relates to the source's: the tightest of what is known.
fn relation(args: &Args) -> anyhow::Result<Relation> {
    if let Some(offset_ns) = args.offset {
        return Ok(Relation {
            offset_ns,
            error_ns: args.error,
            basis: Basis::Given,
        });
    }
    let (source, destination) = (single(&args.source)?, single(&args.destination)?);
    let one_way = clock::relate(&source, &destination, std::iter::empty());
    let recordings = [source, destination];
    let migrations = analysis::find(&recordings);
    let [source, destination] = &recordings;
    let sampled = migrations.iter().filter_map(|migration| {
        let from = migration.source.as_ref()?.recording;
        let to = migration.destination.as_ref()?.recording;
        match (migration.clock.basis, from, to) {
            (Basis::Samples, from, to) if same(from, source) && same(to, destination) => {
                Some(migration.clock)
            }
            (Basis::Samples, from, to) if same(from, destination) && same(to, source) => {
                Some(migration.clock.reversed())
            }
            _ => None,
        }
    });
    let Clock {
        offset_ns,
        error_ns,
        basis,
    } = sampled
        .min_by_key(|clock| clock.error_ns)
        .unwrap_or(one_way);
    Ok(Relation {
        offset_ns,
        error_ns,
        basis,
    })
}

fn same(a: &Loaded, b: &Loaded) -> bool {
    std::ptr::eq(a, b)
}

/// The recording of one host.
fn single(path: &Path) -> anyhow::Result<Loaded> {
    let mut recordings = read_all(&[path.to_path_buf()])?;
    match (recordings.pop(), recordings.is_empty()) {
        (Some(one), true) => Ok(one),
        _ => bail!("{} is of two hosts already", path.display()),
    }
}

/// Copies both, frame by frame.
fn write(args: &Args, relation: Relation) -> anyhow::Result<()> {
    let mut source = Reader::open(&args.source)?;
    let Some(Frame::Header(header)) = source.next().transpose()? else {
        bail!("{} has nothing in it", args.source.display());
    };
    let mut writer = Writer::create(&args.output, header)?;
    copy(source, &args.source, &mut writer)?;
    writer.write(&Frame::Joined(relation))?;
    copy(
        Reader::open(&args.destination)?,
        &args.destination,
        &mut writer,
    )?;
    // Both have brought their ends with them, if they had any.
    writer.flush()?;
    Ok(())
}

fn copy(frames: Reader<File>, path: &Path, writer: &mut Writer<File>) -> anyhow::Result<()> {
    for frame in frames {
        match frame? {
            Frame::Joined(_) => bail!("{} is of two hosts already", path.display()),
            frame => writer.write(&frame)?,
        }
    }
    Ok(())
}

fn basis(basis: Basis) -> &'static str {
    match basis {
        Basis::OneHost => "one host's",
        Basis::Samples => "as the monitors measured",
        Basis::WallClock => "by the wall clocks",
        Basis::Tai => "by TAI",
        Basis::Given => "as given",
    }
}
