//! Which CPU runs what, for tests that measure: a vCPU that shares its CPU stands still whenever
//! the other thread runs, for as long as the scheduler likes.

use std::fs::{self, File};
use std::hint::spin_loop;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::channel;
use std::thread::{self, JoinHandle};

use anyhow::{Context, Result, ensure};
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::{Pid, gettid};

/// A CPU for vCPUs alone.
#[derive(Clone, Copy, Debug)]
pub struct Cpus {
    vcpus: usize,
}

impl Cpus {
    /// Takes the first two that this thread may use, and moves it, with the processes and threads
    /// that it starts from here on, to one of them. `None` where there is only one.
    pub fn split() -> Result<Option<Self>> {
        let this = Pid::from_raw(0);
        let allowed = sched_getaffinity(this)?;
        let mut usable = (0..CpuSet::count()).filter(|cpu| allowed.is_set(*cpu) == Ok(true));
        let (Some(vcpus), Some(others)) = (usable.next(), usable.next()) else {
            return Ok(None);
        };
        pin(this, others)?;
        Ok(Some(Cpus { vcpus }))
    }

    /// Keeps the vCPUs' CPU awake for as long as the result lives.
    pub fn keep_awake(&self) -> Result<Awake> {
        Awake::start(self.vcpus)
    }

    /// Gives the vCPUs of the monitor `pid` their CPU.
    pub fn pin_vcpus(&self, pid: u32) -> Result<()> {
        for task in vcpu_threads(pid)? {
            let tid = task.file_name().context("a task has a number")?;
            pin(Pid::from_raw(tid.to_string_lossy().parse()?), self.vcpus)?;
        }
        Ok(())
    }
}

/// Keeps the vCPUs' CPU awake while it lives: one that sleeps takes up to 100 us to begin with a thread,
/// which looks from outside as if another one had been in the way. It turns on that CPU for as long as
/// nobody else wants it.
#[derive(Debug)]
pub struct Awake {
    over: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Awake {
    fn start(cpu: usize) -> Result<Self> {
        let over = Arc::new(AtomicBool::new(false));
        let (sender, tid) = channel();
        let turning = Arc::clone(&over);
        let turn = move || {
            let _ = sender.send(gettid());
            while !turning.load(Ordering::Relaxed) {
                spin_loop();
            }
        };
        let awake = Awake {
            over,
            thread: Some(thread::spawn(turn)),
        };
        let tid = tid.recv()?;
        let mut chrt = Command::new("chrt");
        chrt.args(["--idle", "--pid", "0", &tid.to_string()]);
        let status = chrt.status().context("chrt")?;
        ensure!(status.success(), "chrt ended with {status}");
        pin(tid, cpu)?;
        Ok(awake)
    }
}

impl Drop for Awake {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// How long a monitor's vCPUs were ready to run and had no CPU: `/proc/PID/task/TID/schedstat`.
#[derive(Debug)]
pub struct RunDelay {
    vcpus: Vec<File>,
}

/// How long they had one.
#[derive(Debug)]
pub struct OnCpu {
    vcpus: RunDelay,
}

impl OnCpu {
    /// Of the monitor `pid`.
    pub fn open(pid: u32) -> Result<Self> {
        let vcpus = RunDelay::open(pid)?;
        Ok(OnCpu { vcpus })
    }

    /// So far, all vCPUs together, ns.
    pub fn ns(&self) -> Result<u64> {
        self.vcpus.sum(0)
    }
}

impl RunDelay {
    /// Of the monitor `pid`.
    pub fn open(pid: u32) -> Result<Self> {
        let vcpus = vcpu_threads(pid)?.into_iter();
        let open = |task: PathBuf| File::open(task.join("schedstat"));
        Ok(RunDelay {
            vcpus: vcpus.map(open).collect::<Result<_, _>>()?,
        })
    }

    /// So far, all vCPUs together, ns.
    pub fn ns(&self) -> Result<u64> {
        self.sum(1)
    }

    /// The sum of one of the fields: time on a CPU, time ready to run, number of turns.
    fn sum(&self, field: usize) -> Result<u64> {
        let mut sum = 0;
        for vcpu in &self.vcpus {
            let mut text = [0; 64];
            let length = vcpu.read_at(&mut text, 0)?;
            let text = std::str::from_utf8(&text[..length])?;
            let value = text.split_whitespace().nth(field).context("schedstat")?;
            sum += value.parse::<u64>()?;
        }
        Ok(sum)
    }
}

/// The folders in /proc of the monitor's vCPU threads.
pub fn vcpu_threads(pid: u32) -> Result<Vec<PathBuf>> {
    let tasks = format!("/proc/{pid}/task");
    let mut vcpus = Vec::new();
    for task in fs::read_dir(&tasks).with_context(|| tasks.clone())? {
        let task = task?.path();
        // The second is QEMU's. KVM's own threads take the name of the vCPU that made them.
        let name = fs::read_to_string(task.join("comm"))?;
        if name.starts_with("vcpu") || name.starts_with("CPU ") {
            vcpus.push(task);
        }
    }
    Ok(vcpus)
}

fn pin(thread: Pid, cpu: usize) -> Result<()> {
    let mut set = CpuSet::new();
    set.set(cpu)?;
    sched_setaffinity(thread, &set).with_context(|| format!("pinning {thread} to CPU {cpu}"))
}
