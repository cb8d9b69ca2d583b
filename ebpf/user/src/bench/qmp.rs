//! As much of QMP as it takes to have a guest migrated.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::Error;

/// How long an answer may take.
const ANSWER: Duration = Duration::from_secs(60);

/// How long it may take from the socket's being there until someone listens, and how often to try.
const LISTEN: Duration = Duration::from_secs(10);
const POLL: Duration = Duration::from_millis(2);

/// The longest line that is read.
const LINE_MAX: u64 = 1 << 24;

/// A client of one monitor.
pub(super) struct Qmp {
    monitor: &'static str,
    stream: BufReader<UnixStream>,
}

impl Qmp {
    /// Connects to the socket at `path`, and negotiates.
    pub(super) fn connect(monitor: &'static str, path: &Path) -> Result<Self, Error> {
        let deadline = Instant::now() + LISTEN;
        let connect = || loop {
            match UnixStream::connect(path) {
                // The socket is there a moment before anyone listens.
                Err(error)
                    if error.kind() == io::ErrorKind::ConnectionRefused
                        && Instant::now() < deadline =>
                {
                    thread::sleep(POLL);
                }
                Err(error) => return Err(error),
                Ok(stream) => {
                    stream.set_read_timeout(Some(ANSWER))?;
                    return Ok(BufReader::new(stream));
                }
            }
        };
        let stream = connect().map_err(|source| Error::Qmp { monitor, source })?;
        let mut qmp = Self { monitor, stream };
        // The greeting.
        qmp.line()?;
        qmp.run("qmp_capabilities", Value::Null)?;
        Ok(qmp)
    }

    /// Runs one command; `arguments` is an object or null.
    ///
    /// # Errors
    /// [`Error::Refused`], [`Error::Qmp`].
    pub(super) fn run(&mut self, command: &'static str, arguments: Value) -> Result<Value, Error> {
        let mut request = json!({ "execute": command });
        if !arguments.is_null() {
            request["arguments"] = arguments;
        }
        let written = writeln!(self.stream.get_mut(), "{request}");
        written.map_err(|source| self.failed(source))?;
        loop {
            let mut message = self.line()?;
            if let Some(value) = message.get_mut("return") {
                return Ok(value.take());
            }
            // Anything else is an event.
            if let Some(error) = message.get("error") {
                return Err(Error::Refused {
                    monitor: self.monitor,
                    command,
                    answer: error["desc"].as_str().unwrap_or_default().to_owned(),
                });
            }
        }
    }

    fn line(&mut self) -> Result<Value, Error> {
        let mut line = String::new();
        let read = self.stream.by_ref().take(LINE_MAX).read_line(&mut line);
        read.map_err(|source| self.failed(source))?;
        if line.is_empty() {
            return Err(self.failed(io::ErrorKind::UnexpectedEof.into()));
        }
        serde_json::from_str(&line).map_err(|error| self.failed(error.into()))
    }

    fn failed(&self, source: io::Error) -> Error {
        Error::Qmp {
            monitor: self.monitor,
            source,
        }
    }
}
