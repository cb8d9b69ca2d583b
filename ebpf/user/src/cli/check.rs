//! `blackout check`.

use std::env;
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use anyhow::{Context, bail};

use super::Outcome;
use super::print::{json, print};
use crate::gate::formats::{bencher, github, junit, openmetrics};
use crate::gate::objective::Objective;
use crate::gate::settings::{Bound, Settings, Share};
use crate::gate::{Check, Verdict, text};
use crate::sets::Samples;
use crate::sets::collect::Collector;
use crate::sets::read;

/// Say whether the blackout got longer: pass, regression or inconclusive
///
/// Compares two sets of migrations, for the downtime and for each span. A regression is a slowdown
/// by more than the threshold that is not chance (one-sided Mann–Whitney test, Holm's correction
/// over the spans). A pass means that a slowdown as large as the threshold is excluded. Everything
/// else is inconclusive, with the number of further runs that should settle it.
///
/// A set is any number of recordings, reports (`blackout report --json`), samples (`blackout report
/// --summary --json`) and folders of them. A folder in a folder is one run: its recordings are read
/// together, as of two hosts.
#[derive(Debug, clap::Args)]
#[command(after_help = EXIT_CODES)]
pub(super) struct Args {
    #[command(flatten)]
    sets: Sets,

    #[command(flatten)]
    thresholds: Thresholds,

    /// Write JSON, schema blackout.check/1, with the raw samples
    #[arg(long)]
    json: bool,

    /// Also list the spans that passed
    #[arg(long)]
    all: bool,

    #[command(flatten)]
    files: Files,
}

/// What is written beside the answer.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Files for CI")]
pub(super) struct Files {
    /// Also write the check into a file: `json`, `junit` (XML), `openmetrics` (a textfile for
    /// Prometheus), `bencher` (Bencher Metric Format) or `markdown` (repeatable)
    #[arg(long = "out", value_name = "FORMAT=FILE")]
    outs: Vec<Out>,

    /// In GitHub Actions: append to the step's summary, and annotate
    #[arg(long)]
    github: bool,
}

/// A format and the file to write.
#[derive(Clone, Debug)]
struct Out {
    format: Format,
    path: PathBuf,
}

#[derive(Clone, Copy, Debug)]
enum Format {
    Json,
    Junit,
    OpenMetrics,
    Bencher,
    Markdown,
}

impl FromStr for Out {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("{text:?} is no FORMAT=FILE such as junit=check.xml");
        let (format, path) = text.split_once('=').ok_or_else(wrong)?;
        let format = match format {
            "json" => Format::Json,
            "junit" => Format::Junit,
            "openmetrics" => Format::OpenMetrics,
            "bencher" => Format::Bencher,
            "markdown" => Format::Markdown,
            _ => return Err(wrong()),
        };
        let path = PathBuf::from(path);
        Ok(Self { format, path })
    }
}

impl Files {
    /// Writes them.
    pub(super) fn write(&self, check: &Check) -> anyhow::Result<()> {
        for Out { format, path } in &self.outs {
            let write = |out: &mut dyn Write| match format {
                Format::Json => json(out, check),
                Format::Junit => junit::write(out, check),
                Format::OpenMetrics => openmetrics::check(out, check),
                Format::Bencher => bencher::write(out, check),
                Format::Markdown => github::summary(out, check),
            };
            whole(path, write).with_context(|| format!("cannot write {}", path.display()))?;
        }
        if self.github {
            let path = env::var_os("GITHUB_STEP_SUMMARY")
                .context("--github: GITHUB_STEP_SUMMARY is not set; is this GitHub Actions?")?;
            let mut summary = OpenOptions::new()
                .append(true)
                .create(true)
                .open(&path)
                .with_context(|| format!("cannot open {}", path.display()))?;
            github::summary(&mut summary, check).context("cannot write the step's summary")?;
            print(|out| github::annotations(out, check)).context("cannot annotate")?;
        }
        Ok(())
    }
}

/// Writes a file under another name first: whoever collects it never sees half of it.
pub(super) fn whole(
    path: &Path,
    write: impl FnOnce(&mut dyn Write) -> io::Result<()>,
) -> io::Result<()> {
    let mut name = path.as_os_str().to_owned();
    name.push(".part");
    let part = PathBuf::from(name);
    let mut out = BufWriter::new(File::create(&part)?);
    write(&mut out)?;
    out.flush()?;
    fs::rename(&part, path)
}

const EXIT_CODES: &str = "\
Exit codes:
  0  pass
  1  regression: something is slower, an objective is broken, or more migrations fail
  2  inconclusive: more runs are needed
  3  could not run: bad arguments, an unreadable file, no migration in a set";

/// The two sets.
#[derive(Debug, clap::Args)]
pub(super) struct Sets {
    /// What to compare with: files or folders (repeatable)
    #[arg(long, required = true, num_args = 1.., value_name = "PATH")]
    baseline: Vec<PathBuf>,

    /// What to judge (repeatable)
    #[arg(long, required = true, num_args = 1.., value_name = "PATH")]
    current: Vec<PathBuf>,

    /// Count migrations whose figures are in doubt: lost events, unpaired probes
    #[arg(long)]
    doubtful: bool,
}

impl Sets {
    /// Reads both.
    pub(super) fn read(&self) -> anyhow::Result<(Samples, Samples)> {
        let baseline = read_set(&self.baseline, self.doubtful).context("the baseline")?;
        let current = read_set(&self.current, self.doubtful).context("the current set")?;
        Ok((baseline, current))
    }
}

/// Reads one set.
pub(super) fn read_set(paths: &[PathBuf], doubtful: bool) -> anyhow::Result<Samples> {
    let mut set = Collector::new(doubtful);
    read::into(&mut set, paths)?;
    let set = set.finish(None);
    if set.seen() == 0 {
        bail!("no migration in it");
    }
    Ok(set)
}

#[derive(Debug, clap::Args)]
#[command(next_help_heading = "What counts as a regression")]
pub(super) struct Thresholds {
    /// A TOML file with settings: the flags below, and thresholds for single spans
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,

    /// The least slowdown that matters, as a share of the span's own median [default: 5%]
    #[arg(long, value_name = "PERCENT")]
    relative: Option<Share>,

    /// The least slowdown that matters, as a time or a share of the downtime; the larger of the two
    /// counts [default: 3%]
    #[arg(long, value_name = "TIME")]
    absolute: Option<Bound>,

    /// How often a check of equal sets may find any regression [default: 0.01]
    #[arg(long, value_name = "P")]
    alpha: Option<f64>,

    /// How often a slowdown as large as the threshold may pass [default: 0.05]
    #[arg(long, value_name = "P")]
    miss: Option<f64>,

    /// Fewer migrations than this in a set say nothing [default: 4]
    #[arg(long, value_name = "N")]
    min_runs: Option<usize>,

    /// Judge only these: a name such as `downtime` or `source: vm_state_handler *` (repeatable)
    #[arg(long, value_name = "PATTERN")]
    only: Vec<String>,

    /// Do not judge these (repeatable)
    #[arg(long, value_name = "PATTERN")]
    ignore: Vec<String>,

    /// A limit for the current set alone: `downtime=5ms` of the median, `downtime:p90=8ms` of nine
    /// of ten (repeatable)
    #[arg(long, value_name = "NAME=TIME")]
    slo: Vec<Objective>,
}

impl Thresholds {
    /// The file's settings, with those of the flags over them.
    pub(super) fn settings(&self) -> anyhow::Result<Settings> {
        let mut settings = match &self.config {
            Some(path) => Settings::read(path)?,
            None => Settings::default(),
        };
        settings.relative = self.relative.unwrap_or(settings.relative);
        settings.absolute = self.absolute.unwrap_or(settings.absolute);
        settings.alpha = self.alpha.unwrap_or(settings.alpha);
        settings.miss = self.miss.unwrap_or(settings.miss);
        settings.min_runs = self.min_runs.unwrap_or(settings.min_runs);
        settings.only.extend(self.only.iter().cloned());
        settings.ignore.extend(self.ignore.iter().cloned());
        settings.slo.extend(self.slo.iter().cloned());
        settings.validate()?;
        Ok(settings)
    }
}

pub(super) fn run(args: &Args) -> anyhow::Result<Outcome> {
    let settings = args.thresholds.settings()?;
    let (baseline, current) = args.sets.read()?;
    let check = Check::new(baseline, current, settings);
    print(|out| {
        if args.json {
            json(out, &check)
        } else {
            text::write(out, &check, args.all)
        }
    })
    .context("cannot write the check")?;
    args.files.write(&check)?;
    Ok(outcome(check.verdict))
}

/// The exit code's meaning.
pub(super) fn outcome(verdict: Verdict) -> Outcome {
    match verdict {
        Verdict::Pass => Outcome::Done,
        Verdict::Regression => Outcome::Bad,
        Verdict::Inconclusive => Outcome::Open,
    }
}
