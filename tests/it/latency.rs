//! The tool's figures are true: held against an observer that looks at the guests' memory only.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use harness::observer::{Seen, Watched};
use harness::{Cpus, GuestView, Observer, Recorder, Vmm, VmmOptions, skip, tool};

const LIMIT: Duration = Duration::from_secs(60);

/// Migrations that are compared.
const RUNS: usize = 20;

/// Migrations that are done at most to find so many that the observer can judge.
const TRIES: usize = 100;

struct Compared {
    seen: Seen,
    tool_ns: u64,
}

impl Compared {
    fn off_ns(&self) -> u64 {
        self.seen.blackout_ns().abs_diff(self.tool_ns)
    }

    fn agrees(&self) -> bool {
        self.off_ns() <= (self.seen.blackout_ns() / 50).max(100_000)
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
    let mut compared = Vec::new();
    let mut tries = 0;
    while compared.len() < RUNS && tries < TRIES {
        tries += 1;
        let run = one_migration(cpus)?;
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
        }
    }
    let fair = compared.len();
    println!("the observer could judge {fair} of {tries} migrations");
    let wrong = compared.iter().filter(|c| !c.agrees()).count();
    ensure!(
        wrong == 0,
        "{wrong} of {fair} are off by more than 2 % and 100 us"
    );
    if fair < RUNS {
        skip!("the machine is too busy: the observer could judge {fair} of {TRIES} migrations");
    }
    Ok(())
}

fn one_migration(cpus: Cpus) -> Result<Compared> {
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
    let recorder = Recorder::start(&[source.pid(), destination.pid()], &recording)?;
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
