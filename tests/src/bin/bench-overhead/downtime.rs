//! The downtime of migrations that somebody watches, beside that of those that nobody does.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use harness::pair::{Monitor, Pair, Transport};
use harness::{VmmOptions, programs};
use serde::Serialize;
use serde_json::json;

use crate::attached::{Attached, Watcher};
use crate::{Arguments, LIMIT, rotated};

/// One kind of migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
struct Kind {
    watcher: Watcher,
    probes: bool,
}

pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    let mut kinds = vec![(Watcher::Nobody, true), (Watcher::Tool, true)];
    if arguments.bpftrace {
        kinds.push((Watcher::Bpftrace, true));
    }
    if arguments.without_probes.is_some() {
        kinds.push((Watcher::Nobody, false));
    }
    let with = programs::vmm()?;
    for round in 0..arguments.runs {
        for (watcher, probes) in rotated(&kinds, round) {
            let program = match (&arguments.without_probes, probes) {
                (Some(without), false) => without,
                _ => &with,
            };
            migrate(round, Kind { watcher, probes }, program)?;
        }
    }
    Ok(())
}

/// Migrates a fresh guest once and prints what its monitor says of the downtime, which it knows to the
/// nanosecond by a clock of its own.
fn migrate(round: usize, kind: Kind, program: &Path) -> Result<()> {
    let options = VmmOptions {
        memory: "64M".into(),
        cmdline: "dirty=1M".into(),
        program: Some(program.to_owned()),
        ..VmmOptions::default()
    };
    let mut pair = Pair::spawn(Monitor::Blackout, Transport::Unix, &options, LIMIT)?;
    pair.guest.wait_progress(0, LIMIT)?;
    let pids = [pair.source.pid(), pair.destination.pid()];
    let folder = pair.source.dir();
    let attached = Attached::start(kind.watcher, &pids, &folder)?;
    let answer = pair.source.qmp.migrate(&pair.uri, LIMIT)?;
    ensure!(answer["status"] == "completed", "{answer}");
    let downtime_ns = answer["blackout"]["downtime-ns"].as_u64();
    let attach_ns = attached.as_ref().map(|attached| attached.took.as_nanos());
    if let Some(attached) = attached {
        attached.stop()?;
    }
    let line = json!({
        "part": "downtime",
        "round": round,
        "kind": kind,
        "downtime_ns": downtime_ns.with_context(|| format!("no downtime in {answer}"))?,
        "attach_ns": attach_ns,
    });
    println!("{line}");
    Ok(())
}
