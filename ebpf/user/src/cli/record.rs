//! `blackout record`.

use std::ffi::OsString;
use std::fs;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use signal_hook::consts::{SIGINT, SIGTERM};

use super::{DEFAULT_RECORDING, Outcome};
use crate::capture::sites::Pattern;
use crate::capture::{self, Child, Coverage, Options, Recorder, Summary, object};

/// Watch virtual machine monitors, and write down what bounds and fills a blackout
///
/// Traced are the processes given and no others. The recording ends on SIGINT or SIGTERM, after
/// --duration, or when all of them have ended; the processes are left alone then. `blackout doctor`
/// says what this kernel lets it see.
#[derive(Debug, clap::Args)]
#[command(after_help = super::EXIT_CODES)]
pub(super) struct Args {
    /// A process to record; may be repeated
    #[arg(short, long = "pid", value_name = "PID")]
    pids: Vec<u32>,

    /// Record the processes of this name, or whose program has this file name; may be repeated
    #[arg(long = "name", value_name = "NAME")]
    names: Vec<String>,

    /// Record every process that has a VM, and those that come while the recording goes on
    #[arg(long)]
    all: bool,

    /// Where to write the recording
    #[arg(short, long, default_value = DEFAULT_RECORDING, value_name = "FILE")]
    output: PathBuf,

    /// End after this many seconds
    #[arg(long, value_name = "SECONDS", value_parser = seconds)]
    duration: Option<Duration>,

    /// Exit with 1 when events were lost
    #[arg(long)]
    strict: bool,

    /// USDT probes to record, `*` standing for anything; may be repeated
    #[arg(long = "probe", default_value = "vmm:*", value_name = "PROVIDER:NAME")]
    probes: Vec<Pattern>,

    /// A vCPU that is out of KVM_RUN for longer than this is reported
    #[arg(long, default_value_t = 200, value_name = "MICROSECONDS")]
    gap: u32,

    /// Room for events that were not yet written, in the kernel
    #[arg(long, default_value_t = 4, value_name = "MIB", value_parser = clap::value_parser!(u32).range(1..=1024))]
    buffer: u32,

    /// Create this file as soon as everything is attached, for scripts that wait for it
    #[arg(long, value_name = "FILE")]
    ready: Option<PathBuf>,

    /// An eBPF object file to use in place of the one that was built in
    #[arg(long, value_name = "FILE")]
    bpf_object: Option<PathBuf>,

    /// A command to start and record; nothing of it runs before everything is attached
    #[arg(last = true, value_name = "COMMAND")]
    command: Vec<OsString>,
}

pub(super) fn run(args: &Args) -> anyhow::Result<Outcome> {
    let pids = pids(args)?;
    let object = object(args.bpf_object.as_deref())?;
    let options = Options {
        gap_ns: u64::from(args.gap) * 1000,
        all: args.all,
        buffer: args.buffer << 20,
    };
    let stop = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM] {
        signal_hook::flag::register(signal, Arc::clone(&stop)).context("cannot catch signals")?;
    }
    let mut recorder = Recorder::start(&object, options, args.probes.clone(), &args.output)?;
    let mut sites = 0;
    for pid in &pids {
        sites += recorder
            .add(*pid)
            .with_context(|| format!("cannot record process {pid}"))?;
    }
    let mut child = None;
    if !args.command.is_empty() {
        let mut started = Child::spawn(&args.command)?;
        sites += recorder
            .add(started.pid())
            .with_context(|| format!("cannot record `{}`", started.name()))?;
        started.go()?;
        child = Some(started);
    }
    let processes = pids.len() + usize::from(child.is_some());
    say_ready(args, recorder.coverage(), (processes, sites))?;
    let end = args.duration.map(|duration| Instant::now() + duration);
    while !stop.load(Ordering::Relaxed)
        && end.is_none_or(|end| Instant::now() < end)
        && recorder.is_anyone_alive()
    {
        recorder.turn()?;
    }
    let summary = recorder.finish()?;
    if let Some(status) = child.as_mut().and_then(Child::ended) {
        eprintln!("blackout: `{}` ended: {status}", args.command[0].display());
    }
    say_end(args, &summary);
    Ok(if summary.lost > 0 && args.strict {
        Outcome::Bad
    } else {
        Outcome::Done
    })
}

/// The processes that the recording begins with, besides a command's.
fn pids(args: &Args) -> anyhow::Result<Vec<u32>> {
    let mut pids = args.pids.clone();
    for name in &args.names {
        let named = capture::with_name(name);
        if named.is_empty() {
            bail!("no process is called {name}");
        }
        pids.extend(named);
    }
    if args.all {
        pids.extend(capture::with_vm());
    } else if pids.is_empty() && args.command.is_empty() {
        bail!("nothing to record: give --pid PID, --name NAME, --all, or -- COMMAND");
    }
    pids.sort_unstable();
    pids.dedup();
    Ok(pids)
}

fn say_ready(
    args: &Args,
    coverage: &[Coverage],
    (processes, sites): (usize, usize),
) -> anyhow::Result<()> {
    for covered in coverage.iter().filter(|covered| covered.way.is_none()) {
        let why = covered
            .refused
            .last()
            .map_or("", |refusal| refusal.why.as_str());
        eprintln!("blackout: without {}: {why}", covered.source.name());
    }
    eprintln!(
        "blackout: recording {processes} {}, {sites} probe sites, into {}",
        if processes == 1 {
            "process"
        } else {
            "processes"
        },
        args.output.display()
    );
    if let Some(ready) = &args.ready {
        fs::write(ready, "ready\n").with_context(|| format!("cannot write {}", ready.display()))?;
    }
    Ok(())
}

fn say_end(args: &Args, summary: &Summary) {
    let cost = &summary.cost;
    let programs = match (cost.bpf_runs, cost.bpf_ns) {
        (Some(runs), Some(ns)) => {
            format!("eBPF {} in {runs} runs, ", milliseconds(ns))
        }
        _ => String::new(),
    };
    eprintln!(
        "blackout: {} events, {} lost; cost: {programs}recorder {} of CPU; {}",
        cost.events,
        summary.lost,
        milliseconds(cost.cpu_ns),
        args.output.display()
    );
    if summary.lost > 0 {
        eprintln!("blackout: figures of this recording are in doubt; try a larger --buffer");
    }
}

fn milliseconds(ns: u64) -> String {
    format!("{}.{:03} ms", ns / 1_000_000, ns / 1000 % 1000)
}

fn seconds(text: &str) -> Result<Duration, String> {
    let seconds = text.parse::<f64>().map_err(|error| error.to_string())?;
    Duration::try_from_secs_f64(seconds).map_err(|error| error.to_string())
}
