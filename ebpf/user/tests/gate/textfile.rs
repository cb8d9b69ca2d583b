//! The textfile, on the way that it takes in production: a node exporter serves it, a Prometheus
//! scrapes that, and is asked.

use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::migrations;

/// The machine may be busy.
const LIMIT: Duration = Duration::from_secs(60);

/// Ends the program when the test ends.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn prometheus_has_the_verdict_by_the_node_exporter() {
    let folder = tempfile::tempdir().unwrap();
    let textfiles = folder.path().join("textfiles");
    fs::create_dir(&textfiles).unwrap();
    let textfile = check(folder.path(), &textfiles.join("blackout.prom"));
    let exporter = free_port();
    let Some(_exporter) = start(
        "prometheus-node-exporter",
        &[
            "--collector.disable-defaults".to_owned(),
            "--collector.textfile".to_owned(),
            format!("--collector.textfile.directory={}", textfiles.display()),
            format!("--web.listen-address={exporter}"),
        ],
    ) else {
        return;
    };
    let config = folder.path().join("prometheus.yml");
    let job = format!(
        "scrape_configs:\n- job_name: node\n  scrape_interval: 1s\n  \
         static_configs:\n  - targets: ['{exporter}']\n"
    );
    fs::write(&config, job).unwrap();
    let prometheus = free_port();
    let Some(_prometheus) = start(
        "prometheus",
        &[
            format!("--config.file={}", config.display()),
            format!(
                "--storage.tsdb.path={}",
                folder.path().join("data").display()
            ),
            format!("--web.listen-address={prometheus}"),
        ],
    ) else {
        return;
    };
    assert_eq!(value(prometheus, "blackout_verdict{span=\"check\"}"), 1.0);
    let median =
        "blackout_span_seconds{side=\"both\",span=\"downtime\",set=\"current\",quantile=\"0.5\"}";
    let written = textfile.lines().find_map(|line| line.strip_prefix(median));
    let written: f64 = written.unwrap().trim().parse().unwrap();
    assert_eq!(value(prometheus, median), written);
    assert_eq!(value(prometheus, "node_textfile_scrape_error"), 0.0);
}

#[test]
fn promtool_has_nothing_to_say_of_the_textfile() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("blackout.prom");
    check(folder.path(), &path);
    let mut promtool = Command::new("promtool");
    promtool.args(["check", "metrics"]);
    match promtool.stdin(fs::File::open(path).unwrap()).output() {
        Ok(output) => assert!(
            output.status.success() && output.stderr.is_empty(),
            "{output:?}"
        ),
        Err(error) => skip(&format!("promtool: {error}")),
    }
}

/// Has `blackout check` write the textfile of a regression; what it wrote.
fn check(folder: &Path, textfile: &Path) -> String {
    let set = |name: &str, downtime_ns, seed| {
        let report = blackout::report::schema::Report {
            schema: blackout::report::schema::SCHEMA.to_owned(),
            migrations: migrations(20, downtime_ns, seed),
        };
        let path = folder.join(name);
        fs::write(&path, serde_json::to_string(&report).unwrap()).unwrap();
        path
    };
    let output = Command::new(env!("CARGO_BIN_EXE_blackout"))
        .arg("check")
        .arg("--baseline")
        .arg(set("baseline.json", 50_000, 1))
        .arg("--current")
        .arg(set("current.json", 60_000, 2))
        .arg("--out")
        .arg(format!("openmetrics={}", textfile.display()))
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    fs::read_to_string(textfile).unwrap()
}

/// Waits until Prometheus has scraped the series; its value.
fn value(prometheus: SocketAddr, series: &str) -> f64 {
    let end = Instant::now() + LIMIT;
    loop {
        // As it starts, it says so, and not in JSON.
        let answer = get(prometheus, &format!("/api/v1/query?query={series}"));
        let answer = answer.and_then(|body| serde_json::from_str(&body).ok());
        let answer: Value = answer.unwrap_or_default();
        let value = answer["data"]["result"][0]["value"][1].as_str();
        if let Some(value) = value {
            return value.parse().unwrap();
        }
        assert!(Instant::now() < end, "no {series}: {answer}");
        thread::sleep(Duration::from_millis(200));
    }
}

/// The body of what is at that path; `None` while nobody answers.
fn get(address: SocketAddr, path: &str) -> Option<String> {
    let mut stream = TcpStream::connect(address).ok()?;
    stream.set_read_timeout(Some(LIMIT)).ok()?;
    write!(stream, "GET {path} HTTP/1.0\r\n\r\n").ok()?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).ok()?;
    Some(answer.split_once("\r\n\r\n")?.1.to_owned())
}

/// Starts a program; `None`, with a line that `cargo xtask test` counts, where it is not there.
fn start(program: &str, arguments: &[String]) -> Option<Running> {
    let mut command = Command::new(program);
    command.args(arguments);
    command.stdout(Stdio::null()).stderr(Stdio::null());
    match command.spawn() {
        Ok(child) => Some(Running(child)),
        Err(error) => {
            skip(&format!("{program}: {error}"));
            None
        }
    }
}

fn skip(why: &str) {
    let test = thread::current().name().unwrap_or("?").to_owned();
    println!("SKIP: {test}: {why}");
}

fn free_port() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap()
}
