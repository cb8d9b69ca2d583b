//! The tool as a child process.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use crate::programs;

/// How long the tool may take to attach.
const ATTACH: Duration = Duration::from_secs(120);

/// What `blackout report --json` printed.
pub type Report = Value;

/// A running `blackout record`.
#[derive(Debug)]
pub struct Recorder {
    child: Child,
    stderr: Option<JoinHandle<String>>,
    output: PathBuf,
}

impl Recorder {
    /// Records the processes `pids` into `output`; returns once every probe is attached.
    pub fn start(pids: &[u32], output: &Path) -> Result<Self> {
        let pids = pids.iter().map(|pid| format!("--pid={pid}"));
        Self::spawn(pids.collect(), output)
    }

    /// Records these processes as if they had no probes: by what KVM does for them alone.
    pub fn start_without_probes(pids: &[u32], output: &Path) -> Result<Self> {
        let mut whom: Vec<_> = pids.iter().map(|pid| format!("--pid={pid}")).collect();
        whom.push("--probe=none:none".to_owned());
        Self::spawn(whom, output)
    }

    /// Records every process that has a VM, also those that come; returns once it would see them.
    pub fn start_for_all(output: &Path) -> Result<Self> {
        Self::spawn(vec!["--all".to_owned()], output)
    }

    fn spawn(whom: Vec<String>, output: &Path) -> Result<Self> {
        let mut command = Command::new(programs::tool()?);
        command
            .arg("record")
            .arg("--output")
            .arg(output)
            .args(whom)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        let mut child = command
            .spawn()
            .with_context(|| format!("starting {command:?}"))?;
        let stderr = BufReader::new(child.stderr.take().context("no stderr")?);
        let (ready, is_ready) = mpsc::channel();
        let stderr = thread::spawn(move || collect(stderr, &ready));
        let mut recorder = Recorder {
            child,
            stderr: Some(stderr),
            output: output.to_owned(),
        };
        if is_ready.recv_timeout(ATTACH).is_err() {
            let _ = recorder.child.kill();
            bail!("blackout record did not attach: {}", recorder.said());
        }
        Ok(recorder)
    }

    /// Ends the recording as Ctrl-C would; returns what the tool said.
    pub fn stop(mut self) -> Result<String> {
        kill(Pid::from_raw(self.child.id().cast_signed()), Signal::SIGINT)?;
        let status = self.child.wait()?;
        let said = self.said();
        if !status.success() {
            bail!("blackout record ended with {status}: {said}");
        }
        Ok(said)
    }

    /// The recording's path.
    pub fn output(&self) -> &Path {
        &self.output
    }

    fn said(&mut self) -> String {
        let collected = self.stderr.take().map(JoinHandle::join);
        collected.and_then(Result::ok).unwrap_or_default()
    }
}

impl Drop for Recorder {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Reads the tool's stderr to its end and tells when it says that it records.
fn collect(mut stderr: impl BufRead, ready: &mpsc::Sender<()>) -> String {
    let mut all = String::new();
    loop {
        let start = all.len();
        match stderr.read_line(&mut all) {
            Ok(0) | Err(_) => return all,
            Ok(_) if all[start..].starts_with("blackout: recording ") => {
                // Nobody waits any more when the attach took too long.
                let _ = ready.send(());
                let _ = stderr.read_to_string(&mut all);
                return all;
            }
            Ok(_) => {}
        }
    }
}

/// Runs `blackout` with `arguments` and returns what it printed.
///
/// # Errors
/// When it ends with another exit code than 0; the error has what it said.
pub fn run(arguments: &[&str]) -> Result<String> {
    let mut command = Command::new(programs::tool()?);
    let output = command
        .args(arguments)
        .output()
        .with_context(|| format!("{command:?}"))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        bail!(
            "blackout {} ended with {}: {said}",
            arguments.join(" "),
            output.status
        );
    }
    Ok(String::from_utf8(output.stdout)?)
}

/// The report of a recording, as JSON.
pub fn report(recording: &Path) -> Result<Report> {
    let path = recording
        .to_str()
        .context("the recording's path is not UTF-8")?;
    Ok(serde_json::from_str(&run(&["report", "--json", path])?)?)
}
