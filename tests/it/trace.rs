//! What the tool makes of a real migration: a report that leaves nothing out, and a trace that
//! Perfetto takes without a word.

use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use harness::{GuestView, Recorder, Report, Vmm, VmmOptions, skip, tool};
use serde_json::Value;

use crate::perfetto;

const LIMIT: Duration = Duration::from_secs(120);

/// A recorded migration.
struct Recorded {
    report: Report,
    trace: String,
    /// The source's own account of both sides.
    query_migrate: Value,
}

fn record() -> Result<Recorded> {
    let options = VmmOptions {
        memory: "32M".into(),
        cmdline: "its_devices=16 its_events=16 dirty=64K".into(),
        ..VmmOptions::default()
    };
    let mut source = Vmm::spawn(&options)?;
    GuestView::open(source.pid())?.wait_ready(LIMIT)?;
    let uri = format!("unix:{}", source.dir().join("migration").display());
    let destination = Vmm::spawn(&options.incoming(&uri))?;
    let recording = source.dir().join("recording");
    let recorder = Recorder::start(&[source.pid(), destination.pid()], &recording)?;
    let query_migrate = source.qmp.migrate(&uri, LIMIT)?;
    GuestView::open(destination.pid())?.wait_progress(0, LIMIT)?;
    recorder.stop()?;
    let path = recording.to_str().context("the path is not UTF-8")?;
    Ok(Recorded {
        report: tool::report(&recording)?,
        trace: tool::run(&["export", "chrome", path])?,
        query_migrate,
    })
}

#[test]
fn every_nanosecond_of_the_downtime_is_explained_or_listed() -> Result<()> {
    let recorded = record()?;
    let migration = &recorded.report["migrations"][0];
    let number = |value: &Value| value.as_u64().context("a number is missing in the report");
    let downtime = number(&migration["downtime_ns"])?;
    let gaps = migration["gaps"].as_array().context("no gaps")?;
    let listed: u64 = gaps
        .iter()
        .map(|gap| number(&gap["duration_ns"]))
        .sum::<Result<_>>()?;
    let explained = migration["explained"]
        .as_f64()
        .context("nothing is explained")?;
    let unexplained = (1.0 - explained) * downtime as f64;
    println!(
        "downtime {downtime} ns, explained {:.1} %, gaps {listed} ns",
        explained * 100.0
    );
    ensure!(
        (unexplained - listed as f64).abs() <= 1000.0,
        "{unexplained} ns are not explained, but the gaps are {listed} ns"
    );
    ensure!(number(&migration["lost_events"])? == 0);
    for gap in gaps {
        ensure!(
            gap["after"].as_str().is_some_and(|place| !place.is_empty()),
            "{gap}"
        );
    }
    Ok(())
}

/// The monitor and the tool measure the same thing by different means.
#[test]
fn the_monitors_own_downtime_is_the_tools() -> Result<()> {
    let recorded = record()?;
    let tool_ns = recorded.report["migrations"][0]["downtime_ns"].as_u64();
    let own_ns = recorded.query_migrate["blackout"]["downtime-ns"].as_u64();
    let (Some(tool_ns), Some(own_ns)) = (tool_ns, own_ns) else {
        bail!(
            "no downtime: tool {tool_ns:?}, monitor {}",
            recorded.query_migrate
        );
    };
    println!("tool {tool_ns} ns, monitor {own_ns} ns");
    let off = tool_ns.abs_diff(own_ns);
    ensure!(
        off <= (tool_ns / 50).max(1_000_000),
        "tool {tool_ns} ns, monitor {own_ns} ns"
    );
    Ok(())
}

#[test]
fn perfetto_reads_the_trace_of_a_migration() -> Result<()> {
    let recorded = record()?;
    let statements = [
        "select name, value from stats where severity = 'error' and value > 0",
        "select count(*) as spans from slice where name like 'migration_stop_vm%'",
        "select count(*) as flows from flow",
    ];
    let answers = match perfetto::query(recorded.trace.as_bytes(), &statements) {
        Ok(answers) => answers,
        Err(why) => skip!("{why}"),
    };
    ensure!(
        answers[0].is_empty(),
        "Perfetto complains: {:?}",
        answers[0]
    );
    let count = |row: &[Value], column: &str| row.first().and_then(|row| row[column].as_u64());
    ensure!(count(&answers[1], "spans") == Some(1), "{:?}", answers[1]);
    ensure!(count(&answers[2], "flows") > Some(0), "{:?}", answers[2]);
    Ok(())
}
