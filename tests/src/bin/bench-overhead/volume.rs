//! A recorder that has much to write: what it needs, and what it loses.

use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use kvm_ioctls::{Cap, Kvm};
use serde_json::json;
use vmm::probes;

use crate::Arguments;
use crate::attached::{Attached, Watcher};

/// Pause between two bursts of events.
const NAP: Duration = Duration::from_millis(1);

pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    let folder = tempfile::tempdir()?;
    let kvm = Kvm::new()?;
    let attached = Attached::start(Watcher::Tool, &[std::process::id()], folder.path())?;
    let recorder = attached.context("no recorder")?;
    let (start, mut made) = (Instant::now(), 0);
    let end = Duration::from_secs(arguments.seconds);
    loop {
        let elapsed = start.elapsed().min(end);
        let due = (elapsed.as_secs_f64() * arguments.rate as f64) as u64;
        while made < due {
            // One half probes, the other ioctls, as a busy migration has them.
            probes::downtime_end(made, made);
            kvm.check_extension_int(Cap::Irqchip);
            made += 2;
        }
        if elapsed == end {
            break;
        }
        thread::sleep(NAP);
    }
    let seconds = start.elapsed().as_secs_f64();
    let peak_kib = peak_kib(recorder.pid())?;
    let cpu = recorder.cpu()?;
    // `--strict` makes a loss a failure.
    let complete = recorder.stop()?;
    let bytes = fs::metadata(folder.path().join("recording"))?.len();
    let line = json!({
        "part": "volume",
        "events": made,
        "seconds": seconds,
        "complete": complete,
        "peak_kib": peak_kib,
        "recorder_cpu_ms": cpu.as_secs_f64() * 1e3,
        "bytes": bytes,
    });
    println!("{line}");
    Ok(())
}

/// The most memory that a process has ever had: `VmHWM` of `proc_pid_status(5)`.
fn peak_kib(pid: u32) -> Result<u64> {
    let path = format!("/proc/{pid}/status");
    let text = fs::read_to_string(&path).with_context(|| path.clone())?;
    let line = text.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let number = line.and_then(|line| line.split_whitespace().next());
    Ok(number.with_context(|| path.clone())?.parse()?)
}
