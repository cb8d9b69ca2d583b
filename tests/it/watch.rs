//! `blackout watch`: a service that keeps what migrates, and a Prometheus that reads it.

use std::env;
use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use harness::pair::{Monitor, Pair, Transport};
use harness::{VmmOptions, programs, skip, tool};
use nix::sys::signal::Signal;
use serde_json::Value;

use crate::recorded::{Killed, need_tool, wait_for};

const LIMIT: Duration = Duration::from_secs(120);

/// A running watcher.
struct Watching {
    process: Killed,
    address: SocketAddr,
}

impl Watching {
    fn start(folder: &Path) -> Result<Self> {
        Self::start_with(folder, &[])
    }

    fn start_with(folder: &Path, more: &[&str]) -> Result<Self> {
        let ready = folder.with_extension("ready");
        let _ = fs::remove_file(&ready);
        let mut watch = Command::new(programs::tool()?);
        watch.args([
            "watch",
            "--listen",
            "127.0.0.1:0",
            "--keep",
            "50",
            "--folder",
        ]);
        watch.arg(folder).arg("--ready").arg(&ready).args(more);
        let process = Killed(watch.stderr(Stdio::null()).spawn()?);
        wait_for(&ready)?;
        let end = Instant::now() + LIMIT;
        let address = loop {
            // It may be there before it is filled.
            if let Ok(address) = fs::read_to_string(&ready)?.trim().parse() {
                break address;
            }
            ensure!(Instant::now() < end, "no address");
        };
        Ok(Self { process, address })
    }

    fn metrics(&self) -> Result<String> {
        get(self.address, "/metrics")
    }

    /// Waits until the metrics have a line that begins like this, and gives its value.
    fn value(&self, series: &str) -> Result<f64> {
        let end = Instant::now() + LIMIT;
        loop {
            let metrics = self.metrics()?;
            let mut values = metrics.lines().filter_map(|line| line.strip_prefix(series));
            if let Some(value) = values.next() {
                return Ok(value.trim().parse()?);
            }
            ensure!(Instant::now() < end, "no {series} in {metrics}");
            thread::sleep(Duration::from_millis(200));
        }
    }
}

#[test]
fn a_watcher_keeps_migrations_whose_processes_are_gone() -> Result<()> {
    need_tool!();
    let dir = tempfile::tempdir()?;
    let folder = dir.path().join("kept");
    let mut watching = Watching::start(&folder)?;
    let id = migrate()?;
    // Other VMs of this machine may migrate as well.
    let migrations = "blackout_migrations_total{status=\"completed\",view=\"probes\"}";
    ensure!(watching.value(migrations)? >= 1.0);
    for family in ["downtime_seconds", "guest_blackout_seconds"] {
        ensure!(watching.value(&format!("blackout_{family}_count{{view=\"probes\"}}"))? >= 1.0);
        let sum = watching.value(&format!("blackout_{family}_sum{{view=\"probes\"}}"))?;
        ensure!(sum > 0.0 && sum < 60.0, "{family}: {sum} s");
    }
    let metrics = watching.metrics()?;
    ensure!(
        metrics.contains("kind=\"handler\""),
        "no handlers: {metrics}"
    );
    ensure!(metrics.ends_with("# EOF\n"));
    ensure!(get(watching.address, "/").is_err());
    ensure!(reports(&folder, id)?, "the migration was not kept");

    // Killed at once, it loses no more than a second; the next one keeps what it left.
    let id = migrate()?;
    thread::sleep(Duration::from_millis(1500));
    watching.process.0.kill()?;
    watching.process.0.wait()?;
    let mut watching = Watching::start(&folder)?;
    ensure!(
        files(&folder, "part")?.len() == 1,
        "what was left is still there"
    );
    ensure!(reports(&folder, id)?, "what was left was not kept");
    watching.process.signal(Signal::SIGTERM)?;
    ensure!(watching.process.0.wait()?.success());
    ensure!(files(&folder, "part")?.is_empty());
    Ok(())
}

#[test]
fn a_prometheus_reads_a_watcher() -> Result<()> {
    need_tool!();
    let dir = tempfile::tempdir()?;
    let watching = Watching::start(&dir.path().join("kept"))?;
    let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?;
    let config = dir.path().join("prometheus.yml");
    fs::write(
        &config,
        format!(
            "scrape_configs:\n- job_name: blackout\n  scrape_interval: 1s\n  \
             static_configs:\n  - targets: ['{}']\n",
            watching.address
        ),
    )?;
    let mut prometheus = Command::new("prometheus");
    prometheus.arg(format!("--config.file={}", config.display()));
    prometheus.arg(format!(
        "--storage.tsdb.path={}",
        dir.path().join("data").display()
    ));
    prometheus.arg(format!("--web.listen-address={port}"));
    let started = prometheus
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn();
    let Ok(prometheus) = started else {
        skip!("no prometheus");
    };
    let _prometheus = Killed(prometheus);
    migrate()?;
    let median = "histogram_quantile(0.5,sum(blackout_downtime_seconds_bucket)by(le))";
    let end = Instant::now() + LIMIT;
    loop {
        let answer = get(port, &format!("/api/v1/query?query={median}"));
        let answer = answer.and_then(|body| Ok(serde_json::from_str::<Value>(&body)?));
        let value = answer
            .as_ref()
            .ok()
            .map(|answer| &answer["data"]["result"][0]["value"][1]);
        let seconds: Option<f64> = value
            .and_then(Value::as_str)
            .and_then(|text| text.parse().ok());
        if let Some(seconds) = seconds.filter(|seconds| seconds.is_finite()) {
            println!("the median downtime that Prometheus sees: {seconds} s");
            ensure!(seconds > 0.0 && seconds < 60.0);
            return Ok(());
        }
        ensure!(Instant::now() < end, "Prometheus has nothing: {answer:?}");
        thread::sleep(Duration::from_millis(300));
    }
}

#[test]
fn a_collector_takes_a_migration_as_a_trace() -> Result<()> {
    need_tool!();
    let Some(python) = env::var_os("BLACKOUT_PYTHON") else {
        skip!("BLACKOUT_PYTHON is not set: no Python with rotel here");
    };
    // Rotel is a collector of its own make: it shares no code with what sends.
    let where_it_is =
        "import importlib.util as u; print(*u.find_spec('rotel').submodule_search_locations)";
    let found = Command::new(python).args(["-c", where_it_is]).output()?;
    if !found.status.success() {
        skip!("that Python has no rotel");
    }
    let program = Path::new(String::from_utf8(found.stdout)?.trim()).join("rotel-agent");
    let dir = tempfile::tempdir()?;
    let log = dir.path().join("log");
    let port = || TcpListener::bind("127.0.0.1:0")?.local_addr();
    let (http, grpc) = (port()?, port()?);
    let mut collector = Command::new(program);
    collector.args(["start", "--exporter", "blackhole", "--debug-log", "traces"]);
    collector.args(["--debug-log-verbosity", "detailed"]);
    collector.arg(format!("--otlp-http-endpoint={http}"));
    collector.arg(format!("--otlp-grpc-endpoint={grpc}"));
    let output = fs::File::create(&log)?;
    collector.stderr(output.try_clone()?).stdout(output);
    let _collector = Killed(collector.spawn()?);

    let url = format!("http://{http}");
    let folder = dir.path().join("kept");
    let watching = Watching::start_with(&folder, &["--otlp", &url])?;
    let id = migrate()?;
    let sent = "blackout_traces_total{result=\"sent\"}";
    ensure!(watching.value(sent)? >= 1.0);
    let metrics = watching.metrics()?;
    ensure!(!metrics.contains("result=\"failed\""), "{metrics}");
    let end = Instant::now() + LIMIT;
    loop {
        let seen = fs::read_to_string(&log)?;
        let parts = [
            &id.to_string(),
            "migration source",
            "migration destination",
            "downtime",
            "do_vm_stop",
            "ioctl KVM_",
        ];
        let missing: Vec<_> = parts.iter().filter(|part| !seen.contains(**part)).collect();
        if missing.is_empty() {
            return Ok(());
        }
        ensure!(
            Instant::now() < end,
            "the collector has no {missing:?}: {seen}"
        );
        thread::sleep(Duration::from_millis(300));
    }
}

/// Migrates a VM whose monitors end with it; gives the migration's id.
fn migrate() -> Result<u64> {
    let options = VmmOptions {
        memory: "32M".into(),
        ..VmmOptions::default()
    };
    let mut pair = Pair::spawn(Monitor::Blackout, Transport::Unix, &options, LIMIT)?;
    // A newcomer is seen by its first ioctls, and attached to a few times a second.
    thread::sleep(Duration::from_secs(1));
    let answer = pair.source.qmp.migrate(&pair.uri, LIMIT)?;
    ensure!(answer["status"] == "completed", "{answer}");
    answer["blackout"]["id"].as_u64().context("no id")
}

/// Whether one of the recordings that were kept has the migration.
fn reports(folder: &Path, id: u64) -> Result<bool> {
    for recording in files(folder, "rec")? {
        let report = tool::report(&recording)?;
        let migrations = report["migrations"].as_array().context("no migrations")?;
        if migrations.iter().any(|migration| migration["id"] == id) {
            return Ok(true);
        }
    }
    Ok(false)
}

fn files(folder: &Path, ending: &str) -> Result<Vec<std::path::PathBuf>> {
    let mut files = Vec::new();
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path
            .extension()
            .is_some_and(|extension| extension == ending)
        {
            files.push(path);
        }
    }
    Ok(files)
}

/// The body of what is at that path, if it is there.
fn get(address: SocketAddr, path: &str) -> Result<String> {
    let mut stream = TcpStream::connect(address)?;
    stream.set_read_timeout(Some(LIMIT))?;
    write!(stream, "GET {path} HTTP/1.0\r\nHost: localhost\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let (head, body) = answer.split_once("\r\n\r\n").context("no head")?;
    if !head.starts_with("HTTP/1.0 200") && !head.starts_with("HTTP/1.1 200") {
        bail!("{head}");
    }
    Ok(body.to_owned())
}
