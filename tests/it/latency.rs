//! The tool's figures are true: held against an observer that looks at the guests' memory only.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use harness::observer::{Seen, Watched};
use harness::skip::slow;
use harness::{Cpus, GuestView, Observer, Recorder, Vmm, VmmOptions, skip, tool};

const LIMIT: Duration = Duration::from_secs(60);

/// Migrations that are compared.
const RUNS: usize = 20;

/// How many of them have to agree. A CPU that a machine's own host takes away is in nobody's records
/// here, and a tool that is wrong is wrong more often.
const BUSY: f64 = 0.75;

/// The same in the slow tier, and how many of them have to be within the narrow bounds.
const MANY: usize = 50;
const WITHIN: f64 = 0.95;

/// So many migrations are done at most for each one that the observer can judge.
const TRIES: usize = 5;

/// How the tool looks.
#[derive(Clone, Copy, Debug)]
enum View {
    /// By the monitor's probes, and KVM's calls beside them.
    Probes,
    /// By KVM's calls alone, as at any monitor.
    Kernel,
}

struct Compared {
    seen: Seen,
    tool_ns: u64,
}

impl Compared {
    fn off_ns(&self) -> u64 {
        self.seen.blackout_ns().abs_diff(self.tool_ns)
    }

    /// Whether the tool is off by no more than this share of the blackout, or by `ns`.
    fn agrees(&self, share: f64, ns: u64) -> bool {
        self.off_ns() <= ns || self.off_ns() as f64 <= self.seen.blackout_ns() as f64 * share
    }
}

#[test]
fn the_blackout_is_what_an_outside_observer_sees() -> Result<()> {
    if cfg!(target_arch = "aarch64") {
        skip!("under emulation the observer is slower than what it observes");
    }
    let Some(cpus) = Cpus::split()? else {
        skip!("it needs two CPUs");
    };
    let compared = compare(cpus, RUNS, View::Probes)?;
    let fair = compared.len();
    let true_ones = compared.iter().filter(|c| c.agrees(0.02, 100_000)).count();
    ensure!(
        true_ones as f64 >= fair as f64 * BUSY,
        "only {true_ones} of {fair} are off by at most 2 % or 100 us"
    );
    if fair < RUNS {
        skip!("the machine is too busy: the observer could judge {fair} migrations");
    }
    Ok(())
}

#[test]
fn fifty_blackouts_are_true_by_probes() -> Result<()> {
    many(View::Probes)
}

#[test]
fn fifty_blackouts_are_true_by_the_kernel_alone() -> Result<()> {
    many(View::Kernel)
}

fn many(view: View) -> Result<()> {
    if !slow() {
        skip!("it takes minutes on a quiet machine: cargo xtask test --slow");
    }
    if cfg!(target_arch = "aarch64") {
        skip!("under emulation the observer is slower than what it observes");
    }
    let Some(cpus) = Cpus::split()? else {
        skip!("it needs two CPUs");
    };
    let compared = compare(cpus, MANY, view)?;
    let mut off: Vec<_> = compared.iter().map(Compared::off_ns).collect();
    off.sort_unstable();
    let fair = off.len();
    let at = |share: f64| {
        off.get((fair as f64 * share) as usize)
            .copied()
            .unwrap_or(0)
    };
    let true_ones = compared.iter().filter(|c| c.agrees(0.01, 50_000)).count();
    println!(
        "{view:?}: {true_ones} of {fair} are off by at most 1 % or 50 us; \
         the median is off by {} ns, 95 of 100 by at most {} ns",
        at(0.5),
        at(WITHIN)
    );
    if fair < MANY {
        skip!("the machine is too busy: the observer could judge {fair} migrations");
    }
    ensure!(true_ones as f64 >= fair as f64 * WITHIN);
    Ok(())
}

/// Migrates until the observer could judge `runs` migrations, or too many could not be judged.
fn compare(cpus: Cpus, runs: usize, view: View) -> Result<Vec<Compared>> {
    let _awake = cpus.keep_awake()?;
    let mut compared = Vec::new();
    let mut tries = 0;
    while compared.len() < runs && tries < runs * TRIES {
        tries += 1;
        let run = one_migration(cpus, view)?;
        if run.seen.is_fair() {
            println!(
                "{:2}: observer {:>8} ns, tool {:>8} ns, off {:>6} ns, observer's error {:>6} ns",
                compared.len() + 1,
                run.seen.blackout_ns(),
                run.tool_ns,
                run.off_ns(),
                run.seen.error_ns
            );
            compared.push(run);
        } else {
            println!(
                " -: off {:>6} ns, observer's error {} ns, vCPUs set aside for {} ns",
                run.off_ns(),
                run.seen.error_ns,
                run.seen.set_aside_ns
            );
        }
    }
    let fair = compared.len();
    println!("the observer could judge {fair} of {tries} migrations");
    Ok(compared)
}

fn one_migration(cpus: Cpus, view: View) -> Result<Compared> {
    let options = VmmOptions {
        memory: "32M".into(),
        ..VmmOptions::default()
    };
    let mut source = Vmm::spawn(&options)?;
    GuestView::open(source.pid())?.wait_ready(LIMIT)?;
    let uri = format!("unix:{}", source.dir().join("migration").display());
    let destination = Vmm::spawn(&options.incoming(&uri))?;
    for vmm in [&source, &destination] {
        cpus.pin_vcpus(vmm.pid())?;
    }
    let recording = source.dir().join("recording");
    let pids = [source.pid(), destination.pid()];
    let recorder = match view {
        View::Probes => Recorder::start(&pids, &recording)?,
        View::Kernel => Recorder::start_without_probes(&pids, &recording)?,
    };
    let watched = (
        Watched::open(source.pid())?,
        Watched::open(destination.pid())?,
    );
    let observer = Observer::start(watched.0, watched.1, 1, LIMIT);
    let answer = source.qmp.migrate(&uri, LIMIT)?;
    ensure!(answer["status"] == "completed", "{answer}");
    let seen = observer.finish()?;
    recorder.stop()?;
    let report = tool::report(&recording)?;
    let migrations = report["migrations"]
        .as_array()
        .context("no migrations in the report")?;
    ensure!(
        migrations.len() == 1,
        "{} migrations in the recording",
        migrations.len()
    );
    let tool_ns = migrations[0]["blackout_ns"]
        .as_u64()
        .context("no blackout in the report")?;
    Ok(Compared { seen, tool_ns })
}
