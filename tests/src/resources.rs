//! What a process holds on to, for tests that nothing leaks.

use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

/// What a process holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Resources {
    /// Open files.
    pub fds: usize,
    /// Threads.
    pub threads: usize,
    /// Memory of its own in small pages, KiB: guest RAM, which is shared memory, is not in it.
    pub private_kib: u64,
}

/// How long a thread may take to end after it has done its work.
const SETTLE: Duration = Duration::from_secs(5);

impl Resources {
    /// What `pid` holds, once it holds no more files and threads than `before`, and no more memory
    /// but for a mebibyte.
    ///
    /// # Errors
    /// When it still holds more after some seconds: it leaks.
    pub fn settled(pid: u32, before: Resources) -> Result<Self> {
        let deadline = Instant::now() + SETTLE;
        loop {
            let now = Resources::of(pid)?;
            let grown = now.private_kib.saturating_sub(before.private_kib);
            if now.fds <= before.fds && now.threads <= before.threads && grown < 1024 {
                return Ok(now);
            }
            ensure!(
                Instant::now() < deadline,
                "it holds {now:?}, and held {before:?}"
            );
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// What `pid` holds now.
    pub fn of(pid: u32) -> Result<Self> {
        let count = |what: &str| -> Result<usize> {
            let folder = format!("/proc/{pid}/{what}");
            Ok(fs::read_dir(&folder)
                .with_context(|| folder.clone())?
                .count())
        };
        // Unlike /proc/PID/status, this is counted page by page and not estimated.
        let path = format!("/proc/{pid}/smaps_rollup");
        let maps = fs::read_to_string(&path).with_context(|| path.clone())?;
        let kib = |name: &str| -> Result<u64> {
            let line = maps.lines().find_map(|line| line.strip_prefix(name));
            let number = line.and_then(|rest| rest.split_whitespace().next());
            let number = number.with_context(|| format!("{path} has no {name}"))?;
            Ok(number.parse()?)
        };
        // A huge page is 2 MiB for whatever few bytes the kernel thought it good for.
        let private_kib = kib("Anonymous:")?.saturating_sub(kib("AnonHugePages:")?);
        Ok(Resources {
            fds: count("fd")?,
            threads: count("task")?,
            private_kib,
        })
    }
}
