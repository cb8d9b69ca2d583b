//! A Linux guest's shell on its serial console, behind the monitor's socket.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// How long one read waits, so that limits are kept.
const LOOK: Duration = Duration::from_millis(50);

/// What the guest's init says when a command can be typed.
const READY: &str = "guest: ready";

/// A client of the console.
#[derive(Debug)]
pub struct Shell {
    stream: UnixStream,
    /// All that the guest has written since it was connected to.
    seen: String,
    /// How much of it was searched already.
    read: usize,
    commands: u32,
}

impl Shell {
    /// Connects to the console at `path`.
    pub fn connect(path: &Path) -> Result<Self> {
        let stream = UnixStream::connect(path)
            .with_context(|| format!("the console at {}", path.display()))?;
        stream.set_read_timeout(Some(LOOK))?;
        Ok(Shell {
            stream,
            seen: String::new(),
            read: 0,
            commands: 0,
        })
    }

    /// Waits until the guest has booted.
    pub fn wait_ready(&mut self, limit: Duration) -> Result<()> {
        self.wait_for(READY, limit).map(drop)
    }

    /// Waits until the guest writes `text`; returns what came before it since the last wait.
    pub fn wait_for(&mut self, text: &str, limit: Duration) -> Result<String> {
        let deadline = Instant::now() + limit;
        loop {
            let new = self.seen.get(self.read..).unwrap_or_default();
            if let Some(at) = new.find(text) {
                let before = new[..at].to_owned();
                self.read += at + text.len();
                return Ok(before);
            }
            if Instant::now() > deadline {
                bail!(
                    "no '{text}' within {limit:?}; the console:\n{}",
                    self.tail()
                );
            }
            self.receive()?;
        }
    }

    /// Runs `command` and returns what it printed.
    pub fn run(&mut self, command: &str, limit: Duration) -> Result<String> {
        self.start(command)?;
        let number = self.commands;
        self.wait_for(&format!("begin-{number}"), limit)?;
        let printed = self.wait_for(&format!("end-{number}"), limit)?;
        Ok(printed.replace('\r', "").trim().to_owned())
    }

    /// Types `command` and does not wait for what it prints.
    pub fn start(&mut self, command: &str) -> Result<()> {
        self.commands += 1;
        let number = self.commands;
        // The quotes keep what is typed, which comes back, apart from what is printed.
        self.type_line(&format!(
            "echo beg''in-{number}; {command}; echo en''d-{number}"
        ))
    }

    /// Types `line`, for what is no shell.
    pub fn type_line(&mut self, line: &str) -> Result<()> {
        self.stream
            .write_all(format!("{line}\n").as_bytes())
            .context("typing on the console")
    }

    fn receive(&mut self) -> Result<()> {
        let mut bytes = [0; 4096];
        match self.stream.read(&mut bytes) {
            Ok(0) => bail!("the monitor closed the console:\n{}", self.tail()),
            Ok(count) => self
                .seen
                .push_str(&String::from_utf8_lossy(&bytes[..count])),
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
            Err(error) => return Err(error).context("reading the console"),
        }
        Ok(())
    }

    /// The console's last lines.
    fn tail(&self) -> String {
        let lines: Vec<_> = self.seen.lines().collect();
        lines[lines.len().saturating_sub(30)..].join("\n")
    }
}
