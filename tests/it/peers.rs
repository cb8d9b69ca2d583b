//! The tool on monitors that nobody named to it, and on those that say nothing: Debian's QEMU as it
//! is, seen by KVM's ioctls alone.

use std::mem::discriminant;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use harness::observer::Watched;
use harness::pair::{Monitor, Pair, Transport};
use harness::skip::emulated;
use harness::{Cpus, Observer, Recorder, VmmOptions, programs, skip, tool};
use serde_json::Value;

const LIMIT: Duration = Duration::from_secs(120);

/// Migrations that are done at most to find one that the observer can judge.
const TRIES: usize = 10;

#[test]
fn a_recorder_for_all_sees_monitors_that_start_after_it() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let recording = folder.path().join("recording");
    let recorder = Recorder::start_for_all(&recording)?;
    let options = VmmOptions {
        memory: "32M".into(),
        ..VmmOptions::default()
    };
    let mut pair = Pair::spawn(Monitor::Blackout, Transport::Unix, &options, LIMIT)?;
    // It looks for newcomers a few times a second.
    std::thread::sleep(Duration::from_secs(1));
    let answer = pair.source.qmp.migrate(&pair.uri, LIMIT)?;
    ensure!(answer["status"] == "completed", "{answer}");
    recorder.stop()?;
    let report = tool::report(&recording)?;
    let migrations = report["migrations"].as_array().context("no migrations")?;
    // Other VMs of this machine may migrate as well.
    let ours = migrations
        .iter()
        .find(|migration| migration["id"] == answer["blackout"]["id"])
        .context("the migration was not seen")?;
    ensure!(ours["view"] == "probes" && ours["status"] == "completed");
    ensure!(ours["blackout_ns"].as_u64().is_some_and(|ns| ns > 0));
    Ok(())
}

/// What `query-migrate` says after a migration that went well.
fn queried(monitor: Monitor) -> Result<Value> {
    let options = VmmOptions {
        memory: "64M".into(),
        cmdline: "dirty=1M".into(),
        ..VmmOptions::default()
    };
    let mut pair = Pair::spawn(monitor, Transport::Unix, &options, LIMIT)?;
    let answer = pair.source.qmp.migrate(&pair.uri, LIMIT)?;
    ensure!(answer["status"] == "completed", "{answer}");
    Ok(answer)
}

#[test]
fn query_migrate_has_what_qemus_clients_look_for() -> Result<()> {
    if !programs::has_qemu() {
        skip!("no QEMU for this machine's architecture");
    }
    let (ours, qemus) = (queried(Monitor::Blackout)?, queried(Monitor::Qemu)?);
    for path in ["", "/ram"] {
        let members = |answer: &Value| {
            let object = answer.pointer(path).and_then(Value::as_object);
            object
                .cloned()
                .with_context(|| format!("no {path} in {answer}"))
        };
        let ours = members(&ours)?;
        for (name, qemus) in members(&qemus)? {
            // Later QEMUs, one of which this monitor says that it is, have it no more.
            if name == "skipped" {
                continue;
            }
            let ours = ours.get(&name);
            let ours = ours.with_context(|| format!("{path}/{name} is missing"))?;
            let alike = discriminant(ours) == discriminant(&qemus);
            ensure!(alike, "{path}/{name} is {ours}, QEMU's {qemus}");
        }
    }
    Ok(())
}

/// The one migration in a recording, of a monitor without probes: the report for people, which it prints,
/// and the part of that for programs.
pub(crate) fn kernel_view(recording: &Path) -> Result<(String, Value)> {
    let path = recording.to_str().context("the path is not UTF-8")?;
    let text = tool::run(&["report", path])?;
    println!("{text}");
    let report = tool::report(recording)?;
    let migration = &report["migrations"][0];
    ensure!(migration["view"] == "kernel", "{migration}");
    ensure!(report["migrations"].as_array().map(Vec::len) == Some(1));
    Ok((text, migration.clone()))
}

#[test]
fn a_migration_of_qemu_is_seen_without_its_help() -> Result<()> {
    if !programs::has_qemu() {
        skip!("no QEMU for this machine's architecture");
    }
    if emulated() {
        skip!("no observer is quick enough here; peers_its looks at QEMU's own clock instead");
    }
    let Some(cpus) = Cpus::split()? else {
        skip!("it needs two CPUs");
    };
    for _ in 0..TRIES {
        let options = VmmOptions {
            memory: "64M".into(),
            cmdline: "dirty=1M".into(),
            ..VmmOptions::default()
        };
        let mut pair = Pair::spawn(Monitor::Qemu, Transport::Unix, &options, LIMIT)?;
        let pids = [pair.source.pid(), pair.destination.pid()];
        for pid in pids {
            cpus.pin_vcpus(pid)?;
        }
        let recording = pair.source.dir().join("recording");
        let recorder = Recorder::start(&pids, &recording)?;
        let observer = Observer::start(Watched::open(pids[0])?, Watched::open(pids[1])?, 1, LIMIT);
        let answer = pair.source.qmp.migrate(&pair.uri, LIMIT)?;
        ensure!(answer["status"] == "completed", "{answer}");
        let seen = observer.finish()?;
        recorder.stop()?;

        let (_, migration) = kernel_view(&recording)?;
        let figure = |name: &str| {
            migration[name]
                .as_u64()
                .with_context(|| format!("no {name}"))
        };
        let (downtime_ns, blackout_ns) = (figure("downtime_ns")?, figure("blackout_ns")?);
        println!(
            "QEMU says {} ms; the tool {downtime_ns} ns of downtime, {blackout_ns} ns of \
             blackout; the observer {} ns",
            answer["downtime"],
            seen.blackout_ns()
        );
        if !seen.is_fair() {
            continue;
        }
        let off_ns = seen.blackout_ns().abs_diff(blackout_ns);
        ensure!(
            off_ns <= (seen.blackout_ns() / 50).max(100_000),
            "the blackout is {off_ns} ns off what the observer saw"
        );
        return Ok(());
    }
    skip!("the machine is too busy: the observer could judge none of {TRIES} migrations");
}
