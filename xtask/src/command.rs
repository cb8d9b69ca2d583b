//! Running other programs with errors that say which one failed and how.

use std::ffi::OsStr;
use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// Runs `command` with its output on the terminal; an exit code other than zero is an error.
pub(crate) fn run(command: &mut Command) -> Result<()> {
    let status = command
        .status()
        .with_context(|| format!("cannot start {}", name(command)))?;
    if !status.success() {
        bail!("{} failed: {status}", describe(command));
    }
    Ok(())
}

/// Runs `command` and returns what it printed on standard output.
///
/// Its standard error goes to the terminal, and an exit code other than zero is an error.
pub(crate) fn output(command: &mut Command) -> Result<String> {
    let output = command
        .stderr(Stdio::inherit())
        .output()
        .with_context(|| format!("cannot start {}", name(command)))?;
    if !output.status.success() {
        bail!("{} failed: {}", describe(command), output.status);
    }
    String::from_utf8(output.stdout).with_context(|| format!("{} printed no text", name(command)))
}

/// Runs `command` and hands each line of its standard output to `line` as it comes.
///
/// Returns `None` when it did not end within `timeout`; it is killed then, and when the caller
/// unwinds.
pub(crate) fn stream(
    command: &mut Command,
    timeout: Duration,
    line: impl FnMut(&str),
) -> Result<Option<ExitStatus>> {
    let started = Instant::now();
    stream_until(command, || started.elapsed() >= timeout, line)
}

/// How often [`stream_until`] asks whether it shall go on.
const POLL: Duration = Duration::from_secs(1);

/// Like [`stream`], until `give_up` says so, which is asked about once a second.
pub(crate) fn stream_until(
    command: &mut Command,
    mut give_up: impl FnMut() -> bool,
    mut line: impl FnMut(&str),
) -> Result<Option<ExitStatus>> {
    let mut child = Killed(
        command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot start {}", name(command)))?,
    );
    let output = child
        .0
        .stdout
        .take()
        .context("the program's output is not there")?;
    let (sender, lines) = channel();
    // The thread ends with the output: when the program and all that inherited its output are gone.
    thread::spawn(move || {
        let mut output = BufReader::new(output);
        let mut buffer = Vec::new();
        while output
            .read_until(b'\n', &mut buffer)
            .is_ok_and(|length| length > 0)
        {
            let text = String::from_utf8_lossy(buffer.trim_ascii_end()).into_owned();
            buffer.clear();
            if sender.send(text).is_err() {
                return;
            }
        }
    });
    let mut asked = Instant::now();
    loop {
        match lines.recv_timeout(POLL) {
            Ok(text) => line(&text),
            Err(RecvTimeoutError::Disconnected) => break,
            Err(RecvTimeoutError::Timeout) => {}
        }
        // A program that never stops talking must not keep itself alive by it.
        if asked.elapsed() >= POLL {
            if give_up() {
                drop(child);
                // What was begun but not ended by a newline tells where it hung.
                lines.recv_timeout(POLL).iter().for_each(|text| line(text));
                return Ok(None);
            }
            asked = Instant::now();
        }
    }
    let status = child
        .0
        .wait()
        .with_context(|| format!("cannot wait for {}", name(command)))?;
    Ok(Some(status))
}

/// What `command` printed if it could be started and succeeded; silent otherwise.
pub(crate) fn probe(command: &mut Command) -> Option<String> {
    let output = command
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .output()
        .ok()?;
    output
        .status
        .success()
        .then(|| String::from_utf8_lossy(&output.stdout).into_owned())
}

/// The first file called `program` on PATH or in the folders of administrators' programs.
pub(crate) fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin"].map(PathBuf::from))
        .map(|folder| folder.join(program))
        .find(|file| file.is_file())
}

/// A child process, killed when dropped.
struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        // Both fail only when the process has ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn name(command: &Command) -> String {
    command.get_program().to_string_lossy().into_owned()
}

fn describe(command: &Command) -> String {
    let words: Vec<_> = std::iter::once(command.get_program())
        .chain(command.get_args())
        .map(OsStr::to_string_lossy)
        .collect();
    format!("`{}`", words.join(" "))
}
