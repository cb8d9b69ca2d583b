//! `blackout record`.

use std::ffi::OsString;
use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::ExitStatus;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use rustix::process::getpgrp;
use rustix::termios::tcgetpgrp;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

use super::{DEFAULT_RECORDING, Outcome};
use crate::capture::sites::Pattern;
use crate::capture::{self, Backend, Child, Coverage, Options, Recorder, Summary, object};

/// Watch virtual machine monitors, and write down what bounds and fills a blackout
///
/// Traced are the processes given and no others. The recording ends on SIGINT or SIGTERM, after
/// --duration, or when all of them have ended; the processes are left alone then. `blackout doctor`
/// says what this kernel lets it see.
///
/// Processes in containers are named by the ids that they have here. A COMMAND is given the signals
/// that end a recording, and the recording goes on until it has ended; a second signal ends it at
/// once.
///
/// Rights: CAP_BPF and CAP_PERFMON; CAP_DAC_READ_SEARCH where tracefs is root's alone, as it mostly is;
/// CAP_SYS_PTRACE for processes of other users. All are given up once everything is attached. Kept are
/// those four while something may still have to be attached to (--all, and a process that is no monitor
/// yet), and CAP_KILL for a COMMAND. Only with CAP_SYS_ADMIN does the kernel say what the programs cost.
#[derive(Debug, clap::Args)]
#[command(after_help = EXIT_CODES)]
pub(super) struct Args {
    /// A process to record; may be repeated
    #[arg(short, long = "pid", value_name = "PID")]
    pids: Vec<u32>,

    /// Record the processes of this name, or whose program has this file name; may be repeated
    #[arg(long = "name", value_name = "NAME")]
    names: Vec<String>,

    /// Record the processes that run this program, also in containers and where the file was
    /// replaced since; may be repeated
    #[arg(long = "exe", value_name = "PATH")]
    exes: Vec<PathBuf>,

    /// Record every process that has a VM, and those that come while the recording goes on
    #[arg(long)]
    all: bool,

    /// Where to write the recording
    #[arg(short, long, default_value = DEFAULT_RECORDING, value_name = "FILE")]
    output: PathBuf,

    /// End after this many seconds
    #[arg(long, value_name = "SECONDS", value_parser = super::seconds)]
    duration: Option<Duration>,

    /// Exit with 1 when events were lost
    #[arg(long)]
    strict: bool,

    /// USDT probes to record, `*` standing for anything; may be repeated. By default those of
    /// blackout-vmm, and those that tell of migrations in QEMU
    #[arg(long = "probe", value_name = "PROVIDER:NAME")]
    probes: Vec<Pattern>,

    /// A vCPU that is out of KVM_RUN for longer than this is reported
    #[arg(long, default_value_t = 200, value_name = "MICROSECONDS")]
    gap: u32,

    /// By which way KVM's calls are to be seen; the report says which one it was
    #[arg(long, value_enum, default_value_t, value_name = "WAY")]
    backend: Backend,

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

const EXIT_CODES: &str = "\
Exit codes:
  0  done
  1  done, and events were lost (--strict)
  3  could not run: bad arguments, a missing right
With -- COMMAND, its own exit code if that is not 0, or 128 and the number of the signal that ended it";

pub(super) fn run(args: &Args) -> anyhow::Result<Outcome> {
    let pids = pids(args)?;
    let object = object(args.bpf_object.as_deref())?;
    let options = Options {
        gap_ns: u64::from(args.gap) * 1000,
        all: args.all,
        buffer: args.buffer << 20,
        backend: args.backend,
    };
    let wanted = match args.probes.as_slice() {
        [] => Pattern::understood(),
        asked => asked.to_vec(),
    };
    let caught = Arc::new(AtomicUsize::new(0));
    for signal in [SIGHUP, SIGINT, SIGTERM] {
        let number = usize::try_from(signal)?;
        signal_hook::flag::register_usize(signal, Arc::clone(&caught), number)
            .context("cannot catch signals")?;
    }
    let mut recorder = Recorder::start(&object, options, wanted, &args.output)?;
    let (mut sites, mut processes) = (0, 0);
    for pid in &pids {
        match recorder.add(*pid) {
            Ok(found) => (sites, processes) = (sites + found, processes + 1),
            // Who records all there are does not mind that one has ended since it was found.
            Err(_) if args.all && has_ended(*pid) => {}
            Err(error) => {
                return Err(error).with_context(|| format!("cannot record process {pid}"));
            }
        }
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
    processes += usize::from(child.is_some());
    say_ready(args, recorder.coverage(), (processes, sites))?;
    recorder.give_up_rights(child.is_some())?;
    let end = args.duration.map(|duration| Instant::now() + duration);
    let mut told = false;
    while end.is_none_or(|end| Instant::now() < end) && recorder.is_anyone_alive() {
        let ended = told && child.as_mut().and_then(Child::ended).is_some();
        match (caught.swap(0, Ordering::Relaxed), &child) {
            (0, _) if !ended => {}
            (signal, Some(child)) if !told => {
                pass_on(i32::try_from(signal)?, child)?;
                told = true;
            }
            _ => break,
        }
        recorder.turn()?;
    }
    let summary = recorder.finish()?;
    let status = child.as_mut().and_then(Child::ended);
    if let (Some(status), Some(child)) = (status, &child) {
        eprintln!("blackout: `{}` ended: {status}", child.name());
    }
    say_end(args, &summary);
    Ok(match status.map(code) {
        Some(code) if code != 0 => Outcome::Command(code),
        _ if summary.lost > 0 && args.strict => Outcome::Bad,
        _ => Outcome::Done,
    })
}

/// Whether a process is gone, or nothing but an exit code that its parent has not read yet.
fn has_ended(pid: u32) -> bool {
    fs::read_link(format!("/proc/{pid}/exe")).is_err()
}

/// Gives the command a signal that was meant for it too. A terminal gives its own to every process
/// in the foreground, and twice is not the same as once.
fn pass_on(signal: i32, child: &Child) -> anyhow::Result<()> {
    let terminal = fs::File::open("/dev/tty");
    let by_terminal =
        terminal.is_ok_and(|tty| tcgetpgrp(tty).is_ok_and(|group| group == getpgrp()));
    if signal != SIGINT || !by_terminal {
        child.signal(signal)?;
    }
    Ok(())
}

/// A command's exit code, as a shell gives it.
fn code(status: ExitStatus) -> u8 {
    let code = status.code();
    let code = code.or(status.signal().map(|signal| signal.saturating_add(128)));
    code.and_then(|code| u8::try_from(code).ok())
        .unwrap_or(u8::MAX)
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
    for exe in &args.exes {
        let running = capture::with_exe(exe)?;
        if running.is_empty() {
            bail!("no process runs {}", exe.display());
        }
        pids.extend(running);
    }
    if args.all {
        pids.extend(capture::with_vm());
    } else if pids.is_empty() && args.command.is_empty() {
        bail!("nothing to record: give --pid PID, --name NAME, --exe PATH, --all, or -- COMMAND");
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
