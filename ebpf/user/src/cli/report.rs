//! `blackout report`.

use std::path::{Path, PathBuf};

use anyhow::Context;

use super::check::{read_set, whole};
use super::print::{json, print};
use super::{DEFAULT_RECORDING, Outcome};
use crate::analysis::{self, Loaded};
use crate::gate::formats::openmetrics;
use crate::gate::side_by_side::Compared;
use crate::html::{self, Page};
use crate::recording::{self, Ending};
use crate::report::schema::Report;
use crate::report::text;
use crate::sets::collect::Collector;
use crate::sets::{self, read};

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

    /// Write one self-contained HTML file: a timeline to zoom, the breakdown, and with several
    /// migrations their distribution. Files may also be reports and folders, as with --summary
    #[arg(long, value_name = "FILE", conflicts_with_all = ["json", "summary", "migration"])]
    html: Option<PathBuf>,

    /// With --html: also compare with this set, as B
    #[arg(long, requires = "html", value_name = "PATH")]
    with: Option<PathBuf>,

    /// Sum many migrations up: percentiles and histograms of each span, what costs most, table saves
    /// over devices and events. Files may also be reports, samples and folders of them, as for
    /// `blackout check`; with --json, writes schema blackout.samples/1, a baseline for it
    #[arg(long, conflicts_with = "migration")]
    summary: bool,

    /// With --summary --json: the revision that was measured, to be kept with the samples
    #[arg(long, requires = "summary", value_name = "NAME")]
    commit: Option<String>,

    /// With --summary: also write a textfile for Prometheus' node exporter
    #[arg(long, requires = "summary", value_name = "FILE")]
    openmetrics: Option<PathBuf>,

    /// With --summary or --html: count migrations whose figures are in doubt
    #[arg(long)]
    doubtful: bool,

    /// Show only the migration with this id
    #[arg(long, value_name = "ID")]
    migration: Option<u64>,

    /// Exit with 1 if there is no migration, or if anything puts a figure in doubt: lost events,
    /// unpaired probes, a recording that is cut
    #[arg(long)]
    strict: bool,
}

pub(super) fn run(args: &Args) -> anyhow::Result<Outcome> {
    if args.summary {
        return summary(args);
    }
    if let Some(path) = &args.html {
        return page(args, path);
    }
    let recordings = read_all(&args.recordings)?;
    let mut migrations = analysis::find(&recordings);
    migrations.retain(|migration| args.migration.is_none() || migration.id == args.migration);
    print(|out| {
        if args.json {
            json(out, &Report::new(&migrations))
        } else {
            text::write(out, &recordings, &migrations)
        }
    })
    .context("cannot write the report")?;
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

/// Reads what migrations need of recordings.
pub(super) fn read_all(paths: &[PathBuf]) -> Result<Vec<Loaded>, recording::Error> {
    let mut recordings = Vec::new();
    for path in paths {
        recordings.extend(Loaded::read_migrations(path)?);
    }
    Ok(recordings)
}

fn summary(args: &Args) -> anyhow::Result<Outcome> {
    let mut set = Collector::new(args.doubtful);
    read::into(&mut set, &args.recordings)?;
    let samples = set.finish(args.commit.clone());
    print(|out| {
        if args.json {
            samples.write(out)
        } else {
            sets::text::write(out, &samples)
        }
    })
    .context("cannot write the summary")?;
    if let Some(path) = &args.openmetrics {
        whole(path, |out| openmetrics::samples(out, &samples))
            .with_context(|| format!("cannot write {}", path.display()))?;
    }
    let doubtful = samples.migrations == 0 || !samples.left_out.is_empty();
    Ok(if args.strict && doubtful {
        Outcome::Bad
    } else {
        Outcome::Done
    })
}

fn page(args: &Args, path: &Path) -> anyhow::Result<Outcome> {
    let mut set = Collector::new(args.doubtful).keeping(html::TIMELINES);
    read::into(&mut set, &args.recordings)?;
    let migrations = set.kept();
    let samples = set.finish(None);
    let other = match &args.with {
        Some(with) => Some(read_set(std::slice::from_ref(with), args.doubtful)?),
        None => None,
    };
    let compared = other.map(|other| Compared::new(&samples, &other));
    let page = Page {
        migrations: &migrations,
        samples: &samples,
        compared: compared.as_ref(),
    };
    whole(path, |out| html::write(out, &page))
        .with_context(|| format!("cannot write {}", path.display()))?;
    Ok(if args.strict && samples.migrations == 0 {
        Outcome::Bad
    } else {
        Outcome::Done
    })
}
