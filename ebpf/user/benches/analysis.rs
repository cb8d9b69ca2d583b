//! How fast a large recording is read: `cargo bench -p blackout --bench analysis`.
//!
//! Writes a recording of a million events, half of them probes and half ioctls, and has the program
//! make a report and a Chrome trace of it. Exits with 1 where an aim is missed, by wall-clock time on
//! this machine: other work on it counts.

use std::fs;
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use blackout::recording::{
    ArgDef, FdKind, Frame, Header, Hit, Ioctl, ProbeDef, Process, Value, ValueKind, Writer,
};

const EVENTS: u64 = 1_000_000;

/// At most so long for a report, s.
const REPORT_S: f64 = 2.0;

/// At least so many events of a Chrome trace in a second.
const EXPORT_RATE: f64 = 500_000.0;

/// At most so many bytes for an event, in the file and in memory.
const EVENT_BYTES: f64 = 24.0;
const MEMORY_BYTES: f64 = 200.0;

fn main() -> ExitCode {
    match run() {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<bool> {
    let folder = tempfile::tempdir()?;
    let recording = folder.path().join("recording");
    write(&recording)?;
    let bytes = fs::metadata(&recording)?.len() as f64 / EVENTS as f64;
    println!("on disk: {bytes:.1} bytes an event");
    let report = tool(&["report"], &recording)?;
    println!(
        "report: {:.2} s, {:.0} bytes of memory an event",
        report.seconds, report.bytes
    );
    let trace = tool(&["export", "chrome", "--output", "/dev/null"], &recording)?;
    let rate = EVENTS as f64 / trace.seconds;
    println!(
        "Chrome trace: {rate:.0} events a second, {:.0} bytes of memory an event",
        trace.bytes
    );
    Ok(bytes <= EVENT_BYTES
        && report.seconds < REPORT_S
        && rate >= EXPORT_RATE
        && report.bytes.max(trace.bytes) < MEMORY_BYTES)
}

fn write(path: &Path) -> Result<()> {
    let mut writer = Writer::create(path, Header::default())?;
    let (pid, probe) = (4711, 0);
    let (comm, exe) = ("monitor".to_owned(), "/usr/bin/monitor".to_owned());
    writer.write(&Frame::Process(Process { pid, comm, exe }))?;
    let arg = |name: &str| ArgDef {
        name: name.to_owned(),
        kind: ValueKind::U64,
    };
    writer.write(&Frame::Probe(ProbeDef {
        id: probe,
        provider: "vmm".to_owned(),
        name: "downtime_end".to_owned(),
        args: vec![arg("id"), arg("ns")],
    }))?;
    for event in (0..EVENTS).step_by(2) {
        let (tid, ts_ns) = (4712, 1_000_000_000 + event * 5_000);
        let args = vec![Value::U64(event), Value::U64(ts_ns)];
        writer.write(&Frame::Hit(Hit {
            ts_ns,
            pid,
            tid,
            probe,
            args,
        }))?;
        writer.write(&Frame::Ioctl(Ioctl {
            pid,
            tid,
            enter_ns: ts_ns + 1_000,
            exit_ns: ts_ns + 1_700,
            fd: 12,
            fd_kind: FdKind::Vm,
            cmd: 0x4010_ae42,
            ret: 0,
            attr: None,
        }))?;
    }
    writer.finish(1_000_000_000 + EVENTS * 5_000)?;
    Ok(())
}

/// What a run of the program took.
struct Took {
    seconds: f64,
    /// Memory at its most, for each event.
    bytes: f64,
}

fn tool(arguments: &[&str], recording: &Path) -> Result<Took> {
    let start = Instant::now();
    let mut child = Command::new(env!("CARGO_BIN_EXE_blackout"))
        .args(arguments)
        .arg(recording)
        .stdout(Stdio::null())
        .spawn()
        .context("starting blackout")?;
    let mut peak_kib = 0;
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        peak_kib = peak_kib.max(memory_kib(child.id()));
        thread::sleep(Duration::from_millis(1));
    };
    ensure!(
        status.success(),
        "blackout {} ended with {status}",
        arguments.join(" ")
    );
    Ok(Took {
        seconds: start.elapsed().as_secs_f64(),
        bytes: peak_kib as f64 * 1024.0 / EVENTS as f64,
    })
}

/// `VmHWM` of `proc_pid_status(5)`; 0 for a process that is gone.
fn memory_kib(pid: u32) -> u64 {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let number = line.and_then(|line| line.split_whitespace().next()?.parse().ok());
    number.unwrap_or(0)
}
