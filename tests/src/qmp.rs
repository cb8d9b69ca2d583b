//! A blocking QMP client.

use std::collections::VecDeque;
use std::io::{BufRead, BufReader, ErrorKind, IoSlice, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use serde_json::{Value, json};

/// How long a command may take to be answered.
const ANSWER: Duration = Duration::from_secs(60);

/// An error that QMP answered with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QmpError {
    /// `GenericError`, `CommandNotFound`, …
    pub class: String,
    /// The text for a person.
    pub desc: String,
}

impl std::fmt::Display for QmpError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {}", self.class, self.desc)
    }
}

impl std::error::Error for QmpError {}

/// A client that has finished the negotiation.
#[derive(Debug)]
pub struct Qmp {
    stream: BufReader<UnixStream>,
    events: VecDeque<Value>,
    partial: Vec<u8>,
}

impl Qmp {
    /// Connects to the socket at `path`, waiting up to `limit` until it is there.
    pub fn connect(path: &Path, limit: Duration) -> Result<Self> {
        let deadline = Instant::now() + limit;
        let stream = loop {
            match UnixStream::connect(path) {
                Ok(stream) => break stream,
                Err(_) if Instant::now() < deadline => thread::sleep(Duration::from_millis(2)),
                Err(e) => return Err(e).with_context(|| format!("QMP at {}", path.display())),
            }
        };
        let mut qmp = Qmp {
            stream: BufReader::new(stream),
            events: VecDeque::new(),
            partial: Vec::new(),
        };
        let greeting = qmp.read(deadline)?.context("no QMP greeting")?;
        if greeting.get("QMP").is_none() {
            bail!("not a QMP greeting: {greeting}");
        }
        qmp.execute("qmp_capabilities", Value::Null)?;
        Ok(qmp)
    }

    /// Runs one command; `arguments` is an object or null. An error that QMP answers with can be
    /// had back by `downcast_ref::<QmpError>()`.
    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value> {
        let mut request = json!({ "execute": command });
        if !arguments.is_null() {
            request["arguments"] = arguments;
        }
        let mut line = serde_json::to_vec(&request)?;
        line.push(b'\n');
        self.stream
            .get_mut()
            .write_all(&line)
            .with_context(|| format!("sending {command}"))?;
        let deadline = Instant::now() + ANSWER;
        loop {
            let message = self
                .read(deadline)?
                .with_context(|| format!("{command} was not answered"))?;
            if let Some(value) = message.get("return") {
                return Ok(value.clone());
            }
            if let Some(error) = message.get("error") {
                let text = |key| error[key].as_str().unwrap_or_default().to_owned();
                return Err(QmpError {
                    class: text("class"),
                    desc: text("desc"),
                }
                .into());
            }
            self.events.push_back(message);
        }
    }

    /// Passes a descriptor to the monitor, which from then on knows it as `name`.
    pub fn pass(&mut self, name: &str, fd: &impl AsRawFd) -> Result<()> {
        // It goes with the line's first byte; the rest is the command that names it.
        let stream = self.stream.get_ref().as_raw_fd();
        let (part, fds) = ([IoSlice::new(b" ")], [fd.as_raw_fd()]);
        let passed = [ControlMessage::ScmRights(&fds)];
        sendmsg::<()>(stream, &part, &passed, MsgFlags::empty(), None)?;
        self.execute("getfd", json!({ "fdname": name })).map(drop)
    }

    /// The error that `command` answers with; fails when it succeeds.
    pub fn expect_error(&mut self, command: &str, arguments: Value) -> Result<QmpError> {
        match self.execute(command, arguments) {
            Ok(value) => bail!("{command} should have failed, but returned {value}"),
            Err(error) => Ok(error.downcast::<QmpError>()?),
        }
    }

    /// Waits for the next event called `name`; earlier ones with other names are dropped.
    pub fn wait_event(&mut self, name: &str, limit: Duration) -> Result<Value> {
        let deadline = Instant::now() + limit;
        loop {
            let event = match self.events.pop_front() {
                Some(event) => event,
                None => self
                    .read(deadline)?
                    .with_context(|| format!("no event {name}"))?,
            };
            if event["event"] == name {
                return Ok(event);
            }
        }
    }

    /// Starts a migration to `uri` and waits until it is over, however it ends; returns the last
    /// `query-migrate`.
    pub fn migrate(&mut self, uri: &str, limit: Duration) -> Result<Value> {
        self.execute("migrate", json!({ "uri": uri }))?;
        self.wait_migrated(limit)
    }

    /// Waits until the migration is over, however it ends; returns the last `query-migrate`.
    pub fn wait_migrated(&mut self, limit: Duration) -> Result<Value> {
        let deadline = Instant::now() + limit;
        loop {
            let answer = self.execute("query-migrate", Value::Null)?;
            match answer["status"].as_str().unwrap_or("none") {
                "completed" | "failed" | "cancelled" | "unknown" | "none" => return Ok(answer),
                status if Instant::now() > deadline => bail!("the migration is still {status}"),
                _ => thread::sleep(Duration::from_millis(5)),
            }
        }
    }

    /// The run state that `query-status` names.
    pub fn status(&mut self) -> Result<String> {
        let answer = self.execute("query-status", Value::Null)?;
        Ok(answer["status"].as_str().unwrap_or_default().to_owned())
    }

    /// The next message, or `None` when there is none until `deadline`.
    fn read(&mut self, deadline: Instant) -> Result<Option<Value>> {
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(None);
            }
            self.stream.get_ref().set_read_timeout(Some(left))?;
            match self.stream.read_until(b'\n', &mut self.partial) {
                Ok(0) => bail!("QMP closed the connection"),
                Ok(_) => {
                    let line = std::mem::take(&mut self.partial);
                    return Ok(Some(serde_json::from_slice(&line)?));
                }
                Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
                Err(e) => return Err(e).context("reading from QMP"),
            }
        }
    }
}
