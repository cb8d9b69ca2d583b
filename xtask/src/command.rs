//! Running other programs with errors that say which one failed and how.

use std::collections::HashSet;
use std::ffi::OsStr;
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal, kill_process};

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

/// A child process, killed when dropped, with all that it has started: a build's compilers, a fuzzer's
/// target. They are found by their parents and not by a process group of their own, which would not
/// hear of Ctrl-C.
struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        // The number of a child that has ended and was waited for may be another process's by now.
        if !matches!(self.0.try_wait(), Ok(None)) {
            return;
        }
        let tree = stopped(self.0.id());
        // All of these fail only for a process that has ended already.
        for pid in tree {
            let _ = kill_process(pid, Signal::KILL);
        }
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The process `root` and those under it, stopped, so that none starts another meanwhile.
fn stopped(root: u32) -> HashSet<Pid> {
    let mut tree = HashSet::new();
    let root = i32::try_from(root).ok().and_then(Pid::from_raw);
    let mut new: Vec<_> = root.into_iter().collect();
    while !new.is_empty() {
        for pid in new.drain(..) {
            let _ = kill_process(pid, Signal::STOP);
            tree.insert(pid);
        }
        let under = processes().into_iter();
        let under = under.filter(|(pid, parent)| tree.contains(parent) && !tree.contains(pid));
        new.extend(under.map(|(pid, _)| pid));
    }
    tree
}

/// Every process and its parent.
fn processes() -> Vec<(Pid, Pid)> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let parent_of = |entry: fs::DirEntry| {
        let pid = entry.file_name().to_str()?.parse().ok()?;
        let stat = fs::read_to_string(entry.path().join("stat")).ok()?;
        // The name, in parentheses, may have blanks; the state and the parent follow it.
        let (_, rest) = stat.rsplit_once(')')?;
        let parent = rest.split_whitespace().nth(1)?.parse().ok()?;
        Some((Pid::from_raw(pid)?, Pid::from_raw(parent)?))
    };
    entries.filter_map(parent_of).collect()
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_gives_up_leaves_nobody_behind() {
        let mut grandparent = Command::new("sh");
        grandparent.args(["-c", "sh -c 'sleep 600 & echo $!; wait' & wait"]);
        let mut said = String::new();
        let ended = stream(&mut grandparent, Duration::from_secs(1), |line| {
            said.push_str(line);
        });
        assert!(ended.unwrap().is_none() && !said.is_empty());
        // One that nobody has waited for yet is dead all the same; a signal takes its time.
        let state = || fs::read_to_string(format!("/proc/{said}/stat")).unwrap_or_default();
        let is_dead = || state().is_empty() || state().contains(") Z ");
        let deadline = Instant::now() + Duration::from_secs(10);
        while !is_dead() {
            assert!(Instant::now() < deadline, "{}", state());
            thread::sleep(Duration::from_millis(10));
        }
    }
}
