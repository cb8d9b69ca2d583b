//! Programs that run beside this one, and end with it.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use super::Error;

/// How often whatever is waited for is looked at.
const POLL: Duration = Duration::from_millis(5);

/// A program that was started; killed when it is dropped.
#[derive(Debug)]
pub(super) struct Process {
    child: Child,
    program: PathBuf,
    /// The file with what it says.
    said: PathBuf,
}

impl Process {
    /// Starts `command`, with what it says in the file `said`.
    pub(super) fn start(command: &mut Command, said: PathBuf) -> Result<Self, Error> {
        let program = PathBuf::from(command.get_program());
        let failed = |source| Error::Start(program.clone(), source);
        let child = command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::create(&said).map_err(failed)?)
            .spawn()
            .map_err(failed)?;
        Ok(Self {
            child,
            program,
            said,
        })
    }

    pub(super) fn id(&self) -> u32 {
        self.child.id()
    }

    /// Waits until `file` is there.
    ///
    /// # Errors
    /// [`Error::Ended`] when the program ends before, [`Error::Timeout`].
    pub(super) fn wait_for(&mut self, file: &Path, limit: Duration) -> Result<(), Error> {
        let deadline = Instant::now() + limit;
        while !file.exists() {
            if let Ok(Some(status)) = self.child.try_wait() {
                return Err(self.ended(status));
            }
            if Instant::now() > deadline {
                let what = format!("the start of {}", self.program.display());
                return Err(timeout(what, limit));
            }
            thread::sleep(POLL);
        }
        Ok(())
    }

    /// Ends it as Ctrl-C would, and waits for that.
    ///
    /// # Errors
    /// [`Error::Ended`] when it does not end well, [`Error::Timeout`].
    pub(super) fn interrupt(mut self, limit: Duration) -> Result<(), Error> {
        let deadline = Instant::now() + limit;
        if let Some(pid) = Pid::from_raw(self.child.id().cast_signed()) {
            // It may have ended by itself; its status tells.
            let _ = kill_process(pid, Signal::INT);
        }
        loop {
            match self.child.try_wait() {
                Ok(Some(status)) if status.success() => return Ok(()),
                Ok(Some(status)) => return Err(self.ended(status)),
                _ if Instant::now() > deadline => {
                    let what = format!("the end of {}", self.program.display());
                    return Err(timeout(what, limit));
                }
                _ => thread::sleep(POLL),
            }
        }
    }

    fn ended(&self, status: ExitStatus) -> Error {
        let said = fs::read(&self.said).unwrap_or_default();
        let said = String::from_utf8_lossy(&said);
        let last: Vec<_> = said.lines().rev().take(3).collect();
        Error::Ended {
            program: self.program.clone(),
            status,
            said: last.into_iter().rev().collect::<Vec<_>>().join(" / "),
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // One that has ended already can't be killed, and needs not be.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What is said of something that took too long.
pub(super) fn timeout(what: impl Into<String>, limit: Duration) -> Error {
    Error::Timeout {
        what: what.into(),
        seconds: limit.as_secs(),
    }
}
