//! When bpftrace has attached: it does not say so.

use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

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
