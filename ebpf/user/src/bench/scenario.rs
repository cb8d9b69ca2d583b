//! One migration of one guest, between two processes of one monitor.

use std::env;
use std::ffi::{OsStr, OsString};
use std::io;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::Error;
use super::process::{Process, timeout};
use super::qmp::Qmp;

/// How long a monitor, or the recorder, may take to start or to end.
const START: Duration = Duration::from_secs(60);

/// How often the migration's status is asked for. Each question is a command that the monitor
/// answers while it migrates.
const POLL: Duration = Duration::from_millis(50);

/// What is migrated, and how.
#[derive(Clone, Debug)]
pub struct Scenario {
    /// Arguments that give the source its guest.
    pub guest: Vec<OsString>,
    /// Arguments of both monitors.
    pub machine: Vec<OsString>,
    /// Migrate over TCP on loopback rather than a unix socket.
    pub tcp: bool,
    /// How long the guest runs before it is migrated.
    pub settle: Duration,
    /// How long a migration may take.
    pub limit: Duration,
}

impl Scenario {
    /// Starts `monitor` twice, migrates the guest from one to the other, and writes `recording`. A
    /// migration that fails is a result, too: the recording tells.
    ///
    /// # Errors
    /// When it could not come to a migration, or not be recorded.
    pub fn run(&self, monitor: &Path, recording: &Path) -> Result<(), Error> {
        let folder = tempfile::Builder::new()
            .prefix("blackout-bench-")
            .tempdir()
            .map_err(|source| system("make a temporary folder", source))?;
        let folder = folder.path();
        let uri = self.uri(folder)?;
        let (source, mut control) = self.start(monitor, folder, "source", &self.guest)?;
        let incoming = ["--incoming", &uri].map(OsString::from);
        let (destination, _) = self.start(monitor, folder, "destination", &incoming)?;
        let recorder = record(&[source.id(), destination.id()], recording, folder)?;
        // The first time that code runs is not the time to measure it: a `stop` takes the stop
        // path, with the probes just put on it, once.
        control.run("stop", Value::Null)?;
        control.run("cont", Value::Null)?;
        thread::sleep(self.settle);
        control.run("migrate", json!({ "uri": uri }))?;
        self.wait(&mut control)?;
        recorder.interrupt(START)
    }

    /// Waits until the migration is over.
    fn wait(&self, source: &mut Qmp) -> Result<(), Error> {
        let deadline = Instant::now() + self.limit;
        while Instant::now() < deadline {
            let answer = source.run("query-migrate", Value::Null)?;
            if matches!(
                answer["status"].as_str(),
                Some("completed" | "failed" | "cancelled")
            ) {
                return Ok(());
            }
            thread::sleep(POLL);
        }
        Err(timeout("the migration", self.limit))
    }

    fn uri(&self, folder: &Path) -> Result<String, Error> {
        if !self.tcp {
            return Ok(format!("unix:{}", folder.join("migration").display()));
        }
        let free = TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr());
        let address = free.map_err(|source| system("find a free port", source))?;
        Ok(format!("tcp:{address}"))
    }

    fn start(
        &self,
        monitor: &Path,
        folder: &Path,
        name: &'static str,
        arguments: &[OsString],
    ) -> Result<(Process, Qmp), Error> {
        let socket = folder.join(format!("{name}.qmp"));
        let mut address = OsString::from("unix:");
        address.push(&socket);
        let mut command = Command::new(monitor);
        command
            .args(["--serial", "null", "--qmp"])
            .arg(address)
            .args(&self.machine)
            .args(arguments);
        let mut process = Process::start(&mut command, folder.join(format!("{name}.said")))?;
        process.wait_for(&socket, START)?;
        let qmp = Qmp::connect(name, &socket)?;
        Ok((process, qmp))
    }
}

/// Has this program record the processes, as one of its own: what it costs falls on no monitor.
fn record(pids: &[u32], recording: &Path, folder: &Path) -> Result<Process, Error> {
    let own = env::current_exe().map_err(|source| system("find this program", source))?;
    let ready = folder.join("ready");
    let option = |name: &str, value: &OsStr| [OsString::from(name), value.to_owned()];
    let mut command = Command::new(own);
    command
        .arg("record")
        .args(option("--output", recording.as_os_str()))
        .args(option("--ready", ready.as_os_str()));
    for pid in pids {
        command.args(["--pid", &pid.to_string()]);
    }
    let mut recorder = Process::start(&mut command, PathBuf::from(folder).join("record.said"))?;
    recorder.wait_for(&ready, START)?;
    Ok(recorder)
}

fn system(what: &str, source: io::Error) -> Error {
    Error::System {
        what: what.to_owned(),
        source,
    }
}
