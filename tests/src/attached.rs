//! When bpftrace has attached, which it does not say, and how it is ended.

use std::fs;
use std::process::Child;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::skip::emulated;

/// How long it may take.
const LIMIT: Duration = Duration::from_secs(120);

/// Waits until the process `pid`, which has begun to attach, does not open anything more: each probe that
/// bpftrace attaches is a descriptor of its own.
pub fn wait(pid: u32) -> Result<()> {
    let quiet = Duration::from_secs(if emulated() { 5 } else { 2 });
    let deadline = Instant::now() + LIMIT;
    let mut before = 0;
    let mut since = Instant::now();
    loop {
        let folder = format!("/proc/{pid}/fd");
        let now = fs::read_dir(&folder).with_context(|| folder)?.count();
        if now != before {
            (before, since) = (now, Instant::now());
        }
        if since.elapsed() >= quiet {
            return Ok(());
        }
        ensure!(Instant::now() < deadline, "{pid} still attaches");
        thread::sleep(Duration::from_millis(100));
    }
}

/// Has bpftrace, or another recorder, print what it has gathered and end. bpftrace does not notice an
/// interrupt that comes while it is not waiting for events (0.17 at least), so it may take more than one.
pub fn end(recorder: &mut Child) -> Result<()> {
    let pid = Pid::from_raw(recorder.id().cast_signed());
    let deadline = Instant::now() + LIMIT;
    while recorder.try_wait()?.is_none() {
        ensure!(Instant::now() < deadline, "{pid} does not end");
        kill(pid, Signal::SIGINT)?;
        // It prints for a while; another interrupt then does no harm.
        let looks = Instant::now() + Duration::from_secs(5);
        while recorder.try_wait()?.is_none() && Instant::now() < looks {
            thread::sleep(Duration::from_millis(20));
        }
    }
    Ok(())
}
