//! What the tests of the recorder share: a recording read whole, and programs that end with a test.

use std::collections::HashSet;
use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use blackout::recording::{Ending, Frame, Hit, Reader};
use harness::programs;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

const LIMIT: Duration = Duration::from_secs(60);

/// Skips the test where the tool has no rights or the kernel does not let it.
macro_rules! need_tool {
    () => {
        let doctor = std::process::Command::new(harness::programs::tool()?)
            .arg("doctor")
            .output()?;
        if !doctor.status.success() {
            harness::skip!("{}", String::from_utf8_lossy(&doctor.stdout));
        }
    };
}
pub(crate) use need_tool;

/// A recording, read whole.
pub(crate) struct Recording {
    /// Every frame, in file order.
    pub(crate) frames: Vec<Frame>,
    /// How it ended.
    pub(crate) ending: Ending,
}

impl Recording {
    /// Reads all of the file.
    pub(crate) fn read(path: &Path) -> Result<Self> {
        let mut reader = Reader::open(path)?;
        let frames = reader.by_ref().collect::<Result<_, _>>()?;
        Ok(Self {
            frames,
            ending: reader.ending(),
        })
    }

    /// The hits of the probe called `name`.
    pub(crate) fn hits(&self, name: &str) -> impl Iterator<Item = &Hit> {
        let ids: HashSet<_> = self
            .probes()
            .filter(|probe| probe.1 == name)
            .map(|probe| probe.0)
            .collect();
        self.all_hits().filter(move |hit| ids.contains(&hit.probe))
    }

    /// The names of the probes that were hit.
    pub(crate) fn names(&self) -> impl Iterator<Item = &str> {
        let hit: HashSet<_> = self.all_hits().map(|hit| hit.probe).collect();
        self.probes()
            .filter(move |probe| hit.contains(&probe.0))
            .map(|probe| probe.1)
    }

    fn probes(&self) -> impl Iterator<Item = (u32, &str)> {
        self.frames.iter().filter_map(|frame| match frame {
            Frame::Probe(probe) => Some((probe.id, probe.name.as_str())),
            _ => None,
        })
    }

    fn all_hits(&self) -> impl Iterator<Item = &Hit> {
        self.frames.iter().filter_map(|frame| match frame {
            Frame::Hit(hit) => Some(hit),
            _ => None,
        })
    }

    /// The KVM ioctls.
    pub(crate) fn ioctls(&self) -> impl Iterator<Item = &blackout::recording::Ioctl> {
        self.frames.iter().filter_map(|frame| match frame {
            Frame::Ioctl(call) => Some(call),
            _ => None,
        })
    }

    /// How many events were lost.
    pub(crate) fn lost(&self) -> u64 {
        let lost = self.frames.iter().map(|frame| match frame {
            Frame::Lost { count, .. } => *count,
            _ => 0,
        });
        lost.sum()
    }
}

/// A child that does not outlive its test.
pub(crate) struct Killed(pub(crate) Child);

impl Killed {
    /// Sends it a signal.
    pub(crate) fn signal(&self, signal: Signal) -> Result<()> {
        Ok(kill(Pid::from_raw(self.0.id().cast_signed()), signal)?)
    }
}

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Waits until a file is there.
pub(crate) fn wait_for(file: &Path) -> Result<()> {
    let end = Instant::now() + LIMIT;
    while !fs::exists(file)? {
        ensure!(Instant::now() < end, "{} did not appear", file.display());
        thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

/// Starts a recorder in a process group of its own, as a service's is, and waits until it has
/// attached.
pub(crate) fn recorder(dir: &Path, whom: &[impl AsRef<str>]) -> Result<Killed> {
    let ready = dir.join("ready");
    let _ = fs::remove_file(&ready);
    let mut command = Command::new(programs::tool()?);
    command
        .args(["record", "--output"])
        .arg(dir.join("recording"));
    command.arg("--ready").arg(&ready);
    command.args(whom.iter().map(AsRef::as_ref));
    std::os::unix::process::CommandExt::process_group(&mut command, 0);
    let child = command.stderr(Stdio::piped()).spawn()?;
    let mut recorder = Killed(child);
    let end = Instant::now() + LIMIT;
    while !ready.exists() {
        if let Some(status) = recorder.0.try_wait()? {
            anyhow::bail!(
                "the recorder ended with {status}: {}",
                said(&mut recorder.0)
            );
        }
        ensure!(Instant::now() < end, "the recorder did not attach");
        thread::sleep(Duration::from_millis(5));
    }
    Ok(recorder)
}

fn said(child: &mut Child) -> String {
    let stderr = child.stderr.take().map(std::io::read_to_string);
    stderr.and_then(Result::ok).unwrap_or_default()
}

/// Ends the recorder as a service manager does, and reads what it wrote.
pub(crate) fn finish(mut recorder: Killed, dir: &Path) -> Result<Recording> {
    recorder.signal(Signal::SIGTERM)?;
    let status = recorder.0.wait()?;
    ensure!(status.success(), "{status}: {}", said(&mut recorder.0));
    Recording::read(&dir.join("recording"))
}
