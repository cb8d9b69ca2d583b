//! Looks into a running guest from outside: its progress, its mailbox, its RAM.
//!
//! A monitor's guest RAM is a memfd, which anyone with the right to look at the process can map
//! through `/proc/PID/fd`. Nothing here goes through the monitor, so it can be held against what
//! the monitor and the tool say.

use std::env::consts::ARCH;
use std::fs::{self, OpenOptions};
use std::mem::offset_of;
use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use blackout_abi::guest::{self, Counter, Gap, SharedPage, state};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};

/// A guest's RAM, addressed by offset into the memfd.
#[derive(Debug)]
pub struct GuestView {
    ram: GuestMemoryMmap,
    shared: u64,
}

impl GuestView {
    /// Maps the RAM of the guest that the monitor `pid` runs.
    pub fn open(pid: u32) -> Result<Self> {
        let path = memfd(pid)?;
        let file = OpenOptions::new().read(true).write(true).open(&path)?;
        let size = usize::try_from(file.metadata()?.len())?;
        let range = (GuestAddress(0), size, Some(FileOffset::new(file, 0)));
        let ram = GuestMemoryMmap::from_ranges_with_files([range])
            .with_context(|| format!("mapping {}", path.display()))?;
        let boot_page = match ARCH {
            "aarch64" => guest::AARCH64_BOOT_PAGE - guest::AARCH64_RAM_BASE,
            "x86_64" => guest::X86_64_BOOT_PAGE - guest::X86_64_RAM_BASE,
            other => bail!("no guest layout for {other}"),
        };
        Ok(GuestView {
            ram,
            shared: boot_page + guest::SHARED_PAGE_OFFSET,
        })
    }

    /// The progress of vCPU `index`.
    pub fn counter(&self, index: usize) -> u64 {
        self.load(counter_of(index) + offset_of!(Counter, value))
    }

    /// The progress of the first `count` vCPUs.
    pub fn counters(&self, count: usize) -> Vec<u64> {
        (0..count).map(|index| self.counter(index)).collect()
    }

    /// When vCPU `index` last made progress, by its own clock, in ticks; 0 if it has none.
    pub fn stamp(&self, index: usize) -> u64 {
        self.load(counter_of(index) + offset_of!(Counter, stamp))
    }

    /// The last two times, at most, in which vCPU `index` stood still, by its own clock.
    pub fn gaps(&self, index: usize) -> Vec<Gap> {
        let counter = counter_of(index);
        let count = self.load(counter + offset_of!(Counter, gap_count));
        let numbers = count.saturating_sub(2)..count;
        let gap = |number: u64| {
            let place = usize::from(number % 2 == 1);
            let at = counter + offset_of!(Counter, gaps) + place * size_of::<Gap>();
            Gap {
                from: self.load(at + offset_of!(Gap, from)),
                to: self.load(at + offset_of!(Gap, to)),
            }
        };
        numbers.map(gap).collect()
    }

    /// Events that the guest has mapped in its ITS.
    pub fn events(&self) -> u64 {
        self.load(offset_of!(SharedPage, events))
    }

    /// Devices that the guest has mapped in its ITS.
    pub fn devices(&self) -> u64 {
        self.load(offset_of!(SharedPage, devices))
    }

    /// Interrupts that the guest has taken: LPIs, or what its architecture has instead.
    pub fn interrupts(&self) -> u64 {
        self.load(offset_of!(SharedPage, lpis))
    }

    /// Waits until the guest has set itself up.
    ///
    /// # Errors
    /// When it says that it failed, or says nothing within `limit`.
    pub fn wait_ready(&self, limit: Duration) -> Result<()> {
        let deadline = Instant::now() + limit;
        loop {
            match self.load(offset_of!(SharedPage, state)) {
                state::READY => return Ok(()),
                state::FAILED => {
                    bail!(
                        "the guest's setup failed: {}",
                        self.load(offset_of!(SharedPage, error))
                    )
                }
                _ if Instant::now() > deadline => bail!("the guest is not ready after {limit:?}"),
                _ => thread::sleep(Duration::from_millis(2)),
            }
        }
    }

    /// Waits until vCPU `index` has gone on from where it is now.
    pub fn wait_progress(&self, index: usize, limit: Duration) -> Result<()> {
        let (from, deadline) = (self.counter(index), Instant::now() + limit);
        while self.counter(index) <= from {
            if Instant::now() > deadline {
                bail!("vCPU {index} made no progress within {limit:?}");
            }
            thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }

    /// Has the guest run one of [`guest::command`]'s commands; returns its two results.
    pub fn command(&self, command: u64, argument: u64, limit: Duration) -> Result<(u64, u64)> {
        let sequence = self.load(offset_of!(SharedPage, command_seq)) + 1;
        self.store(offset_of!(SharedPage, argument), argument)?;
        self.store(offset_of!(SharedPage, command), command)?;
        self.store(offset_of!(SharedPage, command_seq), sequence)?;
        let deadline = Instant::now() + limit;
        while self.load(offset_of!(SharedPage, done_seq)) != sequence {
            if Instant::now() > deadline {
                bail!("the guest did not do command {command} within {limit:?}");
            }
            thread::sleep(Duration::from_millis(1));
        }
        let result = self.load(offset_of!(SharedPage, result));
        Ok((result, self.load(offset_of!(SharedPage, result2))))
    }

    /// Fills RAM from `start` up to `end` with bytes that no compression makes less of. The guest
    /// must not use what lies there.
    pub fn fill(&self, start: u64, end: u64) -> Result<()> {
        let mut random = fastrand::Rng::with_seed(start);
        let mut chunk = vec![0; 1 << 20];
        for at in (start..end).step_by(chunk.len()) {
            random.fill(&mut chunk);
            self.ram.write_slice(&chunk, GuestAddress(at))?;
        }
        Ok(())
    }

    fn load(&self, offset: usize) -> u64 {
        let at = GuestAddress(self.shared + offset as u64);
        self.ram
            .load(at, Ordering::Acquire)
            .expect("the shared page lies inside RAM")
    }

    fn store(&self, offset: usize, value: u64) -> Result<()> {
        let at = GuestAddress(self.shared + offset as u64);
        Ok(self.ram.store(value, at, Ordering::Release)?)
    }
}

/// Where a vCPU's counter is in the shared page.
fn counter_of(index: usize) -> usize {
    offset_of!(SharedPage, counters) + index * size_of::<Counter>()
}

/// The memfds that monitors have guest RAM in: ours, and QEMU's.
const MEMFDS: [&str; 2] = ["/memfd:blackout-ram", "/memfd:memory-backend-memfd"];

/// The memfd with guest RAM among a process's files.
fn memfd(pid: u32) -> Result<PathBuf> {
    let files = format!("/proc/{pid}/fd");
    for entry in fs::read_dir(&files).with_context(|| files.clone())? {
        let path = entry?.path();
        let target = fs::read_link(&path).unwrap_or_default();
        let target = target.to_string_lossy();
        if MEMFDS.iter().any(|name| target.starts_with(name)) {
            return Ok(path);
        }
    }
    bail!("{files} has no guest RAM")
}
