//! How fast large recordings are read, and in how much memory: `cargo bench -p blackout --bench
//! analysis`.
//!
//! Writes recordings of one and of four million events, half of them probes and half ioctls, at the
//! pace of 100,000 a second and with a migration in the middle, and has the program make a report and
//! a Chrome trace of each. Exits with 1 where an aim is missed, by wall-clock time on this machine:
//! other work on it counts.

use std::fs;
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use blackout::import::definitions;
use blackout::recording::{FdKind, Frame, Header, Hit, Ioctl, Process, Value, Writer};
use blackout_abi::probes;

/// Events of the recordings, in millions.
const MILLIONS: [u64; 2] = [1, 4];

/// Between two events, ns.
const PACE_NS: u64 = 10_000;

/// At most so long for a report on a million events, s.
const REPORT_S: f64 = 2.0;

/// At least so many events of a Chrome trace in a second.
const EXPORT_RATE: f64 = 500_000.0;

/// At most so many bytes for an event in the file.
const EVENT_BYTES: f64 = 24.0;

/// At most so much memory, MiB, and at most so much more for four times the events: what a migration
/// needs, and nothing for the rest.
const MEMORY_MIB: f64 = 256.0;
const MORE_MIB: f64 = 16.0;

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
    let mut is_good = true;
    let mut before: Option<[f64; 2]> = None;
    for millions in MILLIONS {
        let recording = folder.path().join(millions.to_string());
        let events = millions * 1_000_000;
        write(&recording, events)?;
        let bytes = fs::metadata(&recording)?.len() as f64 / events as f64;
        println!("{millions} M events, {bytes:.1} bytes each on disk");
        let report = tool(&["report"], &recording)?;
        println!(
            "  report        {:6.2} s  {:8.0} events/s  {:5.0} MiB at most",
            report.seconds,
            report.rate(events),
            report.mib
        );
        let trace = tool(&["export", "chrome", "--output", "/dev/null"], &recording)?;
        println!(
            "  Chrome trace  {:6.2} s  {:8.0} events/s  {:5.0} MiB at most",
            trace.seconds,
            trace.rate(events),
            trace.mib
        );
        let mib = [report.mib, trace.mib];
        let more = before.map_or([0.0; 2], |before| [mib[0] - before[0], mib[1] - before[1]]);
        is_good &= bytes <= EVENT_BYTES
            && report.seconds < REPORT_S * millions as f64
            && trace.rate(events) >= EXPORT_RATE
            && mib.iter().all(|mib| *mib < MEMORY_MIB)
            && more.iter().all(|more| *more < MORE_MIB);
        before = Some(mib);
    }
    println!(
        "{}",
        if is_good {
            "all aims are met"
        } else {
            "an aim is missed"
        }
    );
    Ok(is_good)
}

fn write(path: &Path, events: u64) -> Result<()> {
    let mut writer = Writer::create(path, Header::default())?;
    let (pid, tid) = (4711, 4712);
    let (comm, exe) = ("monitor".to_owned(), "/usr/bin/monitor".to_owned());
    writer.write(&Frame::Process(Process { pid, comm, exe }))?;
    for probe in definitions() {
        writer.write(&Frame::Probe(probe))?;
    }
    let hit = |writer: &mut Writer<_>, ts_ns, name: &str, args: Vec<Value>| -> Result<()> {
        let probe = probes::probe_id(name).with_context(|| format!("no probe {name}"))?;
        Ok(writer.write(&Frame::Hit(Hit {
            ts_ns,
            pid,
            tid,
            probe: probe.into(),
            args,
        }))?)
    };
    let (word, zero) = (|text: &str| Value::Str(text.to_owned()), Value::I64(0));
    for event in (0..events).step_by(4) {
        let ts_ns = 1_000_000_000 + event * PACE_NS;
        if event == events / 2 {
            let begun = vec![Value::U64(7), word("unix:/migration"), word("precopy")];
            hit(&mut writer, ts_ns - 4, "migrate_begin", begun)?;
            hit(
                &mut writer,
                ts_ns - 3,
                "migration_stop_vm_begin",
                vec![word("finish-migrate")],
            )?;
            hit(
                &mut writer,
                ts_ns - 2,
                "migration_stop_vm_end",
                vec![zero.clone()],
            )?;
            hit(
                &mut writer,
                ts_ns - 1,
                "migrate_end",
                vec![word("completed"), zero.clone()],
            )?;
        }
        hit(
            &mut writer,
            ts_ns,
            "ram_round_begin",
            vec![Value::U64(event)],
        )?;
        for ioctl in [1, 2] {
            let enter_ns = ts_ns + ioctl * PACE_NS;
            writer.write(&Frame::Ioctl(Ioctl {
                pid,
                tid,
                enter_ns,
                exit_ns: enter_ns + 700,
                fd: 12,
                fd_kind: FdKind::Vm,
                cmd: 0x4020_ae76,
                ret: 0,
                attr: None,
            }))?;
        }
        let said = vec![Value::U64(1), Value::U64(4096), zero.clone()];
        hit(&mut writer, ts_ns + 3 * PACE_NS, "ram_round_end", said)?;
    }
    writer.finish(1_000_000_000 + events * PACE_NS)?;
    Ok(())
}

/// What a run of the program took.
struct Took {
    seconds: f64,
    /// Memory at its most.
    mib: f64,
}

impl Took {
    /// Events in a second.
    fn rate(&self, events: u64) -> f64 {
        events as f64 / self.seconds
    }
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
        mib: peak_kib as f64 / 1024.0,
    })
}

/// `VmHWM` of `proc_pid_status(5)`; 0 for a process that is gone.
fn memory_kib(pid: u32) -> u64 {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let number = line.and_then(|line| line.split_whitespace().next()?.parse().ok());
    number.unwrap_or(0)
}
