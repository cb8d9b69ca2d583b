//! `blackout doctor`.

use std::io::{self, Write};
use std::path::PathBuf;

use serde::Serialize;

use super::Outcome;
use crate::capture::kernel::{Fact, survey};
use crate::capture::{Backend, Coverage, Options, Programs, object};
use crate::doctor::calibrate::{Calibration, calibrate};
use crate::doctor::program::{examine_file, examine_process};

/// Say what this kernel lets `record` see, by which way, and what is missing
///
/// The facts are what attaching depends on. Then everything is attached once, to no process, and
/// taken away again: what the kernel takes is not guessed but tried.
///
/// --exe and --pid also look at a monitor: at what keeps its probes from firing or from being attached
/// to. --calibrate also measures: the tool records itself for a second.
#[derive(Debug, clap::Args)]
#[command(after_help = EXIT_CODES)]
pub(super) struct Args {
    /// Also look at this program's probes
    #[arg(long, value_name = "PATH")]
    exe: Option<PathBuf>,

    /// Also look at this process, and at its program's probes
    #[arg(short, long, value_name = "PID")]
    pid: Option<u32>,

    /// Also measure what recording costs here, for each event
    #[arg(long)]
    calibrate: bool,

    /// The way by which `record` is to see KVM's calls
    #[arg(long, value_enum, default_value_t, value_name = "WAY")]
    backend: Backend,

    /// Print JSON, schema `blackout.doctor/1`
    #[arg(long)]
    json: bool,

    /// An eBPF object file to use in place of the one that was built in
    #[arg(long, value_name = "FILE")]
    bpf_object: Option<PathBuf>,
}

const EXIT_CODES: &str = "\
Exit codes:
  0  `record` works here
  1  `record` does not work here, or not for all of the monitor; what is missing is marked `!!`
  3  could not run";

#[derive(Serialize)]
struct Findings {
    schema: &'static str,
    kernel: String,
    arch: String,
    facts: Vec<FactFound>,
    sources: Vec<SourceFound>,
    /// What was found of the monitor that was named.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    monitor: Vec<FactFound>,
    #[serde(skip_serializing_if = "Option::is_none")]
    calibration: Option<Calibration>,
    /// Why nothing could be tried.
    #[serde(skip_serializing_if = "Option::is_none")]
    not_tried: Option<String>,
    works: bool,
}

#[derive(Serialize)]
struct FactFound {
    name: &'static str,
    good: bool,
    optional: bool,
    found: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    help: Option<&'static str>,
}

#[derive(Serialize)]
struct SourceFound {
    name: &'static str,
    essential: bool,
    way: Option<&'static str>,
    refused: Vec<RefusalFound>,
}

#[derive(Serialize)]
struct RefusalFound {
    way: &'static str,
    why: String,
}

pub(super) fn run(args: &Args) -> anyhow::Result<Outcome> {
    let (coverage, not_tried) = match try_all(args) {
        Ok(coverage) => (coverage, None),
        Err(error) => (Vec::new(), Some(format!("{error:#}"))),
    };
    let system = rustix::system::uname();
    let sources: Vec<_> = coverage.iter().map(SourceFound::from).collect();
    let works = not_tried.is_none()
        && sources
            .iter()
            .all(|source| source.way.is_some() || !source.essential);
    let mut monitor = args.exe.as_deref().map_or_else(Vec::new, examine_file);
    monitor.extend(args.pid.map(examine_process).into_iter().flatten());
    let whole = monitor.iter().all(|fact| fact.good || fact.optional);
    let calibration = match works && args.calibrate {
        true => Some(calibrate(
            &object(args.bpf_object.as_deref())?,
            args.backend,
        )?),
        false => None,
    };
    let findings = Findings {
        schema: "blackout.doctor/1",
        kernel: system.release().to_string_lossy().into_owned(),
        arch: system.machine().to_string_lossy().into_owned(),
        facts: survey().into_iter().map(FactFound::from).collect(),
        sources,
        monitor: monitor.into_iter().map(FactFound::from).collect(),
        calibration,
        not_tried,
        works,
    };
    let mut out = io::stdout().lock();
    if args.json {
        serde_json::to_writer_pretty(&mut out, &findings)?;
        writeln!(out)?;
    } else {
        print(&mut out, &findings)?;
    }
    Ok(if works && whole {
        Outcome::Done
    } else {
        Outcome::Bad
    })
}

fn try_all(args: &Args) -> anyhow::Result<Vec<Coverage>> {
    let object = object(args.bpf_object.as_deref())?;
    let options = Options {
        gap_ns: 0,
        all: false,
        buffer: 4096,
        backend: args.backend,
    };
    Ok(Programs::load(&object, options)?.attach()?)
}

fn print(out: &mut impl Write, findings: &Findings) -> io::Result<()> {
    writeln!(out, "Linux {} on {}", findings.kernel, findings.arch)?;
    writeln!(out)?;
    print_facts(out, &findings.facts)?;
    writeln!(out)?;
    for source in &findings.sources {
        let mark = mark(source.way.is_some(), !source.essential);
        writeln!(
            out,
            "{mark} {:<26} {}",
            source.name,
            source.way.unwrap_or("no way")
        )?;
        for refusal in &source.refused {
            writeln!(out, "{:29} not by {}: {}", "", refusal.way, refusal.why)?;
        }
    }
    if let Some(why) = &findings.not_tried {
        writeln!(out, "!! nothing could be tried: {why}")?;
    }
    if !findings.monitor.is_empty() {
        writeln!(out)?;
        print_facts(out, &findings.monitor)?;
    }
    if let Some(calibration) = &findings.calibration {
        writeln!(out)?;
        print_calibration(out, calibration)?;
    }
    writeln!(out)?;
    let verdict = if !findings.works {
        "`record` does not work here"
    } else if findings
        .monitor
        .iter()
        .any(|fact| !fact.good && !fact.optional)
    {
        "`record` works here, but does not see all of this monitor"
    } else {
        "`record` works here"
    };
    writeln!(out, "{verdict}")
}

fn print_facts(out: &mut impl Write, facts: &[FactFound]) -> io::Result<()> {
    for fact in facts {
        let mark = mark(fact.good, fact.optional);
        writeln!(out, "{mark} {:<26} {}", fact.name, fact.found)?;
        if let Some(help) = fact.help {
            writeln!(out, "{:29} {help}", "")?;
        }
    }
    Ok(())
}

fn print_calibration(out: &mut impl Write, calibration: &Calibration) -> io::Result<()> {
    writeln!(
        out,
        "{:<52} {:>9} {:>9} {:>9}",
        "what recording costs, ns each", "without", "with", "more"
    )?;
    for cost in &calibration.costs {
        writeln!(
            out,
            "  {:<50} {:>9.1} {:>9.1} {:>9.1}",
            cost.what,
            cost.without_ns,
            cost.with_ns,
            cost.with_ns - cost.without_ns
        )?;
    }
    writeln!(
        out,
        "  {:<50} {:>29.1}",
        "the recorder's CPU time, an event", calibration.recorder_ns
    )?;
    writeln!(out, "attached in {:.1} ms", calibration.attach_ms)
}

fn mark(good: bool, optional: bool) -> &'static str {
    match (good, optional) {
        (true, _) => "ok",
        (false, true) => "--",
        (false, false) => "!!",
    }
}

impl From<Fact> for FactFound {
    fn from(fact: Fact) -> Self {
        Self {
            name: fact.name,
            good: fact.good,
            optional: fact.optional,
            found: fact.found,
            help: (!fact.good).then_some(fact.help),
        }
    }
}

impl From<&Coverage> for SourceFound {
    fn from(coverage: &Coverage) -> Self {
        let refused = coverage.refused.iter();
        Self {
            name: coverage.source.name(),
            essential: coverage.source.is_essential(),
            way: coverage.way,
            refused: refused
                .map(|refusal| RefusalFound {
                    way: refusal.way,
                    why: refusal.why.clone(),
                })
                .collect(),
        }
    }
}
