//! `cargo xtask bench overhead`: what the tool costs those whom it records.
//!
//! `bench-overhead` migrates with and without it in turn, counts a guest's exits, and has a recorder
//! write 100,000 events a second; beside it stands a bpftrace script that gathers the same, and a
//! monitor that was built without probes. Each figure has an aim; other work on the machine blurs them,
//! so each difference stands with the interval that holds it.

use std::path::PathBuf;
use std::process::Command;

use anyhow::Result;
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::compare::{self, Ratio, median, ratio};
use crate::artifacts::{self, Platform};
use crate::command;
use crate::setup::{self, Purpose};

/// Arguments of `cargo xtask bench overhead`.
#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// Migrations of each kind, and windows of each kind in which exits are counted.
    #[arg(long, default_value_t = 30)]
    runs: usize,
    /// What to measure.
    #[arg(long, value_delimiter = ',', default_value = "downtime,exits,volume")]
    parts: Vec<String>,
    /// For how long a recorder is given many events, s.
    #[arg(long, default_value_t = 60)]
    seconds: u64,
    /// Where `overhead.json` goes.
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
}

/// The aims.
const DOWNTIME: f64 = 1.01;
/// Of the exits of a guest that has [`RATE`] a second.
const EXITS: f64 = 0.03;
/// Many, for a guest that does something besides.
const RATE: f64 = 30_000.0;
const OF_BPFTRACE: f64 = 0.5;
const ATTACH_MS: f64 = 150.0;
const MEMORY_MIB: f64 = 40.0;
const EVENT_BYTES: f64 = 24.0;

/// What `bench-overhead` prints.
#[derive(Debug, Deserialize, Serialize)]
#[serde(tag = "part", rename_all = "lowercase")]
enum Line {
    Downtime {
        kind: Kind,
        downtime_ns: u64,
        attach_ns: Option<u64>,
    },
    Exits {
        watcher: Watcher,
        per_second: f64,
        watcher_cpu_ms: Option<f64>,
    },
    Volume {
        events: u64,
        seconds: f64,
        complete: bool,
        peak_kib: u64,
        recorder_cpu_ms: f64,
        bytes: u64,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
struct Kind {
    watcher: Watcher,
    probes: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
enum Watcher {
    Nobody,
    Tool,
    Bpftrace,
}

/// Runs the benchmark, prints what it shows, writes the file. 1 when an aim is missed.
pub(crate) fn run(arguments: &Arguments) -> Result<u8> {
    setup::ensure(&[Purpose::Build, Purpose::Test])?;
    let lines = measure(arguments)?;
    let mut aims = Aims::default();
    downtime(&lines, &mut aims);
    exits(&lines, &mut aims);
    volume(&lines, &mut aims);
    compare::write(
        arguments.out.as_deref(),
        "overhead.json",
        &json!({
            "schema": "blackout.bench-overhead/1",
            "lines": lines,
        }),
    )?;
    Ok(u8::from(aims.missed))
}

fn measure(arguments: &Arguments) -> Result<Vec<Line>> {
    let artifacts = artifacts::build(Platform::Host)?;
    // All of it comes before other work on this machine, where the rights suffice.
    let mut command = Command::new("nice");
    command
        .args(["-n", "-19"])
        .arg(&artifacts.bench_overhead)
        .args(["--parts", &arguments.parts.join(",")])
        .args(["--runs", &arguments.runs.to_string()])
        .args(["--seconds", &arguments.seconds.to_string()])
        .envs(artifacts.environment(None));
    if arguments.parts.iter().any(|part| part == "downtime") {
        command
            .arg("--without-probes")
            .arg(artifacts::build_without_probes()?);
    }
    if command::find("bpftrace").is_some() {
        command.arg("--bpftrace");
    }
    let mut lines = Vec::new();
    compare::each_line(&mut command, |line: Line| {
        eprintln!("{:>4}: {line:?}", lines.len() + 1);
        lines.push(line);
    })?;
    Ok(lines)
}

/// Says of each figure whether it is what is aimed at.
#[derive(Default)]
struct Aims {
    missed: bool,
}

impl Aims {
    fn say(&mut self, figure: String, met: bool, aim: &str) {
        self.missed |= !met;
        let word = if met { "met" } else { "MISSED" };
        println!("{figure:<78} aim {aim}: {word}");
    }
}

fn downtime(lines: &[Line], aims: &mut Aims) {
    let of = |wanted: Kind| {
        let times = lines.iter().filter_map(|line| match line {
            Line::Downtime {
                kind, downtime_ns, ..
            } if *kind == wanted => Some(*downtime_ns),
            _ => None,
        });
        sorted(times)
    };
    let with = |watcher| {
        of(Kind {
            watcher,
            probes: true,
        })
    };
    let nobody = with(Watcher::Nobody);
    let without_probes = of(Kind {
        watcher: Watcher::Nobody,
        probes: false,
    });
    if nobody.is_empty() {
        return;
    }
    println!(
        "downtime without anybody: median {:.3} ms",
        median(&nobody) / 1e6
    );
    if let Some(tool) = ratio(&with(Watcher::Tool), &nobody) {
        let met = tool.value < DOWNTIME || tool.low < 1.0;
        aims.say(
            said("downtime, recorded / not", tool),
            met,
            "< 1.01, or not told from 1",
        );
    }
    if let Some(script) = ratio(&with(Watcher::Bpftrace), &nobody) {
        println!("{}", said("downtime, with bpftrace / not", script));
    }
    if let Some(probes) = ratio(&nobody, &without_probes) {
        let met = probes.low <= 1.0;
        aims.say(
            said("downtime, with probes / built without", probes),
            met,
            "not told from 1",
        );
    }
    let attached = sorted(lines.iter().filter_map(|line| match line {
        Line::Downtime {
            kind, attach_ns, ..
        } if kind.watcher == Watcher::Tool => *attach_ns,
        _ => None,
    }));
    if !attached.is_empty() {
        let ms = median(&attached) / 1e6;
        let figure = format!("from the recorder's start to everything attached: median {ms:.1} ms");
        aims.say(figure, ms < ATTACH_MS, "< 150 ms");
    }
}

fn exits(lines: &[Line], aims: &mut Aims) {
    let of = |wanted| {
        let rates = lines.iter().filter_map(|line| match line {
            Line::Exits {
                watcher,
                per_second,
                ..
            } if *watcher == wanted => Some(*per_second as u64),
            _ => None,
        });
        sorted(rates)
    };
    let (nobody, tool, script) = (
        of(Watcher::Nobody),
        of(Watcher::Tool),
        of(Watcher::Bpftrace),
    );
    let Some(recorded) = ratio(&tool, &nobody) else {
        return;
    };
    println!(
        "exits without anybody: median {:.0} in a second of CPU time",
        median(&nobody)
    );
    println!("{}", said("exits, recorded / not", recorded));
    let Some(traced) = ratio(&script, &nobody) else {
        return;
    };
    println!("{}", said("exits, with bpftrace / not", traced));
    // What one exit costs more, ns: the rates' inverses.
    let more = |rates: &[u64]| 1e9 / median(rates) - 1e9 / median(&nobody);
    let (ours, theirs) = (more(&tool), more(&script));
    let figure = format!("an exit costs {ours:.0} ns more recorded, {theirs:.0} ns with bpftrace");
    aims.say(figure, ours <= theirs * OF_BPFTRACE, "<= half");
    // The guest above does nothing else. One whose CPU time goes into other things loses so much of it.
    let share = ours * RATE / 1e9;
    let figure = format!(
        "of a guest with {RATE} exits a second that is {:.1} %",
        share * 100.0
    );
    aims.say(figure, share < EXITS, "< 3 %");
    let cpu = |wanted| {
        let times = lines.iter().filter_map(|line| match line {
            Line::Exits {
                watcher,
                watcher_cpu_ms,
                ..
            } if *watcher == wanted => *watcher_cpu_ms,
            _ => None,
        });
        median(&sorted(times.map(|ms| (ms * 1e6) as u64))) / 1e6
    };
    println!(
        "CPU time of the watcher in a window: {:.1} ms, bpftrace's {:.1} ms",
        cpu(Watcher::Tool),
        cpu(Watcher::Bpftrace)
    );
}

fn volume(lines: &[Line], aims: &mut Aims) {
    for line in lines {
        let Line::Volume {
            events,
            seconds,
            complete,
            peak_kib,
            recorder_cpu_ms,
            bytes,
        } = line
        else {
            continue;
        };
        let (mib, each) = (*peak_kib as f64 / 1024.0, *bytes as f64 / *events as f64);
        let figure = format!(
            "{:.0} events a second for {seconds:.0} s",
            *events as f64 / seconds
        );
        aims.say(figure, *complete, "none lost");
        aims.say(
            format!("the recorder's memory: {mib:.1} MiB at most"),
            mib < MEMORY_MIB,
            "< 40 MiB",
        );
        aims.say(
            format!("an event on disk: {each:.1} bytes"),
            each <= EVENT_BYTES,
            "<= 24",
        );
        println!(
            "the recorder's CPU time: {:.0} ns an event",
            recorder_cpu_ms * 1e6 / *events as f64
        );
    }
}

fn sorted(values: impl Iterator<Item = u64>) -> Vec<u64> {
    let mut values: Vec<_> = values.collect();
    values.sort_unstable();
    values
}

fn said(what: &str, Ratio { value, low, high }: Ratio) -> String {
    format!("{what}: {value:.4}, 95 % {low:.4}–{high:.4}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn exits_of(watcher: Watcher, rates: [f64; 3]) -> impl Iterator<Item = Line> {
        rates.into_iter().map(move |per_second| Line::Exits {
            watcher,
            per_second,
            watcher_cpu_ms: (watcher != Watcher::Nobody).then_some(1.0),
        })
    }

    #[test]
    fn a_tool_that_costs_more_than_half_of_bpftrace_misses_an_aim() {
        let lines = |tool: f64| -> Vec<Line> {
            let nobody = exits_of(Watcher::Nobody, [100_000.0; 3]);
            let tool = exits_of(Watcher::Tool, [tool; 3]);
            let script = exits_of(Watcher::Bpftrace, [96_000.0; 3]);
            nobody.chain(tool).chain(script).collect()
        };
        let missed = |tool| {
            let mut aims = Aims::default();
            exits(&lines(tool), &mut aims);
            aims.missed
        };
        assert!(!missed(99_000.0));
        assert!(missed(97_500.0));
        assert!(missed(90_000.0));
    }

    #[test]
    fn lines_are_those_that_the_program_prints() {
        let line = r#"{"part":"downtime","round":0,"kind":{"watcher":"nobody","probes":true},
            "downtime_ns":7,"attach_ns":null}"#;
        let line: Line = serde_json::from_str(line).unwrap();
        assert!(matches!(line, Line::Downtime { downtime_ns: 7, .. }));
    }
}
