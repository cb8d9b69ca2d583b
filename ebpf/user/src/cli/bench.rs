//! `blackout bench`.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};

use super::Outcome;
use super::check::{self, Files, Thresholds};
use super::print::{json, print};
use crate::bench::order::Turn;
use crate::bench::{Scenario, order, revision};
use crate::gate::{Check, Verdict, text};

/// Migrate a guest with two monitors in turn until it is clear which one is slower
///
/// Starts either `blackout-vmm` as source and destination, migrates a guest between them, records
/// it, and does so again and again, in the order ABBA BAAB, so that a machine that warms up or slows
/// down favours neither. At a few numbers of runs that are fixed beforehand it looks at what came of
/// it, as `blackout check` would, and ends when that passes or fails. The looks share the probability
/// of a false alarm: looking often does not make one more likely.
///
/// What is not a file is taken for a git revision of this folder's repository, and its `blackout-vmm` is
/// built, once.
///
/// Needs KVM, and the rights that `blackout record` needs. `--testbed` needs neither: it counts the stop
/// path's instructions in an emulated arm64 machine, where they repeat to within 0.1 %, and so takes a
/// single run.
#[derive(Debug, clap::Args)]
#[command(after_help = EXIT_CODES)]
pub(super) struct Args {
    /// The monitor to compare with, or a git revision of it
    #[arg(long, value_name = "PROGRAM|REVISION")]
    baseline: OsString,

    /// The monitor to judge, or a git revision of it; with --testbed, the working tree by default
    #[arg(
        long,
        value_name = "PROGRAM|REVISION",
        required_unless_present = "testbed"
    )]
    current: Option<OsString>,

    /// Count instructions in the arm64 testbed, of revisions, in a clone of the project
    #[arg(long, conflicts_with_all = ["json", "keep", "outs", "github"])]
    testbed: bool,

    #[command(flatten)]
    guest: Guest,

    /// No more than so many migrations with each monitor
    #[arg(long, default_value_t = 40, value_name = "N", value_parser = clap::value_parser!(u32).range(2..=10_000))]
    runs: u32,

    /// Start no further migration after so many seconds
    #[arg(long, value_name = "SECONDS")]
    budget: Option<u64>,

    /// Keep the recordings, in `baseline` and `current` under this folder, which must not have them
    #[arg(long, value_name = "DIR")]
    keep: Option<PathBuf>,

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

    /// Further arguments of all monitors, such as --memory or --disk
    #[arg(last = true, value_name = "ARGUMENT")]
    machine: Vec<OsString>,
}

/// What is migrated, how, and when.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Guest")]
struct Guest {
    /// Bare-metal program to boot
    #[arg(long, value_name = "FILE", required_unless_present_any = ["kernel", "testbed"])]
    payload: Option<PathBuf>,

    /// Linux kernel to boot
    #[arg(long, value_name = "FILE", conflicts_with = "payload")]
    kernel: Option<PathBuf>,

    /// Linux's initial RAM disk
    #[arg(long, value_name = "FILE", requires = "kernel")]
    initrd: Option<PathBuf>,

    /// Command line for the guest
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    cmdline: Option<OsString>,

    /// How long it runs before each migration, in seconds
    #[arg(long, default_value = "1", value_name = "SECONDS", value_parser = super::seconds)]
    settle: Duration,

    /// How long a migration may take, in seconds
    #[arg(long, default_value = "120", value_name = "SECONDS", value_parser = super::seconds)]
    limit: Duration,

    /// Migrate over TCP on loopback rather than a unix socket
    #[arg(long)]
    tcp: bool,
}

const EXIT_CODES: &str = "\
Exit codes:
  0  pass
  1  regression: something is slower, an objective is broken, or more migrations fail
  2  inconclusive when the runs or the budget were spent
  3  could not run: bad arguments, a monitor that does not start, a missing right";

/// The first look comes after so many runs of each: fewer prove nothing, however clear they are.
const FIRST_LOOK: usize = 8;

impl Guest {
    fn scenario(&self, machine: &[OsString]) -> Scenario {
        let path = |path: &Option<PathBuf>| path.clone().map(PathBuf::into_os_string);
        let options = [
            ("--payload", path(&self.payload)),
            ("--kernel", path(&self.kernel)),
            ("--initrd", path(&self.initrd)),
            ("--cmdline", self.cmdline.clone()),
        ];
        let guest = options
            .into_iter()
            .filter_map(|(name, value)| Some([OsString::from(name), value?]));
        Scenario {
            guest: guest.flatten().collect(),
            machine: machine.to_vec(),
            tcp: self.tcp,
            settle: self.settle,
            limit: self.limit,
        }
    }
}

pub(super) fn run(args: &Args) -> anyhow::Result<Outcome> {
    if args.testbed {
        return Ok(
            match revision::count(&args.baseline, args.current.as_deref())? {
                true => Outcome::Done,
                false => Outcome::Bad,
            },
        );
    }
    let settings = args.thresholds.settings()?;
    let current = args.current.as_deref().unwrap_or(&args.baseline);
    let monitors = Monitors {
        baseline: revision::monitor(&args.baseline)?,
        current: revision::monitor(current)?,
    };
    let temporary = tempfile::Builder::new()
        .prefix("blackout-bench-")
        .tempdir()
        .context("cannot make a temporary folder")?;
    let folder = args.keep.as_deref().unwrap_or(temporary.path());
    let sets = [Turn::Baseline, Turn::Current].map(|turn| set(folder, turn));
    for set in &sets {
        // What an earlier bench left there would be counted.
        let empty = fs::read_dir(set).map_or(true, |mut entries| entries.next().is_none());
        ensure!(empty, "{} is not empty", set.display());
        fs::create_dir_all(set).with_context(|| format!("cannot make {}", set.display()))?;
    }
    let scenario = args.guest.scenario(&args.machine);
    let looks = order::looks(FIRST_LOOK.max(settings.min_runs), args.runs as usize);
    let settings = order::shared(&settings, looks.len());
    let end = args
        .budget
        .map(|seconds| Instant::now() + Duration::from_secs(seconds));
    let mut done = 0;
    let mut spent = false;
    let check = loop {
        let next = looks.iter().find(|look| 2 * **look > done);
        let until = next.map_or(done, |look| 2 * look);
        while done < until && !spent {
            migrate(&monitors, &scenario, folder, done)?;
            done += 1;
            spent = done >= 2 && end.is_some_and(|end| Instant::now() >= end);
        }
        let read = |path: &PathBuf| check::read_set(std::slice::from_ref(path), false);
        let [baseline, current] = &sets;
        let baseline = read(baseline).context("the baseline")?;
        let current = read(current).context("the current monitor")?;
        let check = Check::new(baseline, current, settings.clone());
        eprintln!("blackout: {}", text::headline(&check));
        let last = looks.last().is_none_or(|last| done >= 2 * last);
        if check.verdict != Verdict::Inconclusive || spent || last {
            break check;
        }
    };
    print(|out| {
        if args.json {
            json(out, &check)
        } else {
            text::write(out, &check, args.all)
        }
    })
    .context("cannot write the check")?;
    args.files.write(&check)?;
    Ok(check::outcome(check.verdict))
}

/// The two programs.
struct Monitors {
    baseline: PathBuf,
    current: PathBuf,
}

/// One migration with the monitor whose turn it is.
fn migrate(
    monitors: &Monitors,
    scenario: &Scenario,
    folder: &Path,
    run: usize,
) -> anyhow::Result<()> {
    let turn = order::turn(run);
    let monitor = match turn {
        Turn::Baseline => &monitors.baseline,
        Turn::Current => &monitors.current,
    };
    let recording = set(folder, turn).join(format!("{run:05}.rec"));
    scenario
        .run(monitor, &recording)
        .with_context(|| format!("migration {} with {}", run + 1, monitor.display()))
}

fn set(folder: &Path, turn: Turn) -> PathBuf {
    folder.join(match turn {
        Turn::Baseline => "baseline",
        Turn::Current => "current",
    })
}
