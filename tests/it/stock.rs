//! What `ebpf/docs/investigating.md` says of gdb and perf, done with the real ones.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use blackout_abi::probes::PROBES;
use harness::pair::{Monitor, Pair, Transport};
use harness::{VmmOptions, programs, skip};
use nix::fcntl::OFlag;
use nix::sys::signal::{Signal, kill};
use nix::sys::stat::Mode;
use nix::unistd::{Pid, mkfifo};

/// The testbed is emulated, and may share its machine.
const LIMIT: Duration = Duration::from_secs(300);

#[test]
fn gdb_lists_every_probe() -> Result<()> {
    if missing("gdb") {
        skip!("gdb is not on this machine");
    }
    let output = Command::new("gdb")
        .args(["-nx", "-batch", "-ex", "info probes stap vmm"])
        .arg(programs::vmm()?)
        .output()?;
    let text = String::from_utf8(output.stdout)?;
    for probe in PROBES {
        let listed = text
            .lines()
            .any(|line| line.split_whitespace().nth(2) == Some(probe.name));
        ensure!(listed, "gdb does not list {}: {text}", probe.name);
    }
    Ok(())
}

#[test]
fn gdb_stops_where_the_downtime_begins() -> Result<()> {
    if missing("gdb") {
        skip!("gdb is not on this machine");
    }
    let mut pair = Pair::spawn(Monitor::Blackout, Transport::Unix, &options(), LIMIT)?;
    let output = pair.source.dir().join("gdb");
    let file = fs::File::create(&output)?;
    let mut gdb = Command::new("gdb");
    gdb.args(["-nx", "-batch", "-p", &pair.source.pid().to_string()]);
    for command in [
        "break -probe-stap vmm:migration_stop_vm_begin",
        "continue",
        "bt",
        "set language c",
        "print (char *) $_probe_arg0",
    ] {
        gdb.args(["-ex", command]);
    }
    gdb.stdin(Stdio::null()).stdout(file).stderr(Stdio::null());
    let mut gdb = gdb.spawn()?;
    let said = || fs::read_to_string(&output).unwrap_or_default();
    let deadline = Instant::now() + LIMIT;
    // It says nothing more before the breakpoint is hit; a moment later the monitor runs again.
    while !said().contains("Breakpoint 1 at") {
        ensure!(Instant::now() < deadline, "gdb did not attach: {}", said());
        thread::sleep(Duration::from_millis(100));
    }
    let answer = pair.source.qmp.migrate(&pair.uri, LIMIT)?;
    ensure!(answer["status"] == "completed", "{answer}");
    gdb.wait()?;
    for words in ["vmm::migration::", "\"finish-migrate\""] {
        ensure!(said().contains(words), "no {words} in {}", said());
    }
    Ok(())
}

#[test]
fn perf_records_a_migration_by_its_probes() -> Result<()> {
    if missing("perf") {
        skip!("perf is not on this machine");
    }
    // perf remembers programs in the home folder.
    let home = tempfile::tempdir()?;
    let Some(_probes) = Probes::add(home.path())? else {
        skip!("this kernel or this user has no uprobes for perf");
    };
    let mut pair = Pair::spawn(Monitor::Blackout, Transport::Unix, &options(), LIMIT)?;
    let data = home.path().join("perf.data");
    let [control, ack] = ["control", "ack"].map(|name| home.path().join(name));
    for fifo in [&control, &ack] {
        mkfifo(fifo, Mode::S_IRUSR | Mode::S_IWUSR)?;
    }
    let mut recorder = Command::new("perf")
        .env("HOME", home.path())
        .args(["record", "-k", "CLOCK_MONOTONIC", "-e", "sdt_vmm:*", "-p"])
        .arg(format!("{},{}", pair.source.pid(), pair.destination.pid()))
        .args(["--delay", "-1", "--control"])
        .arg(format!("fifo:{},{}", control.display(), ack.display()))
        .arg("-o")
        .arg(&data)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .context("perf record")?;
    enable(&control, &ack)?;
    let answer = pair.source.qmp.migrate(&pair.uri, LIMIT)?;
    ensure!(answer["status"] == "completed", "{answer}");
    kill(Pid::from_raw(recorder.id().cast_signed()), Signal::SIGINT)?;
    recorder.wait()?;
    let script = Command::new("perf")
        .env("HOME", home.path())
        .args([
            "script",
            "--ns",
            "-F",
            "comm,pid,tid,time,event,trace",
            "-i",
        ])
        .arg(&data)
        .output()?;
    let text = String::from_utf8_lossy(&script.stdout);
    let count = |name: &str| text.matches(&format!("sdt_vmm:{name}:")).count();
    let said = String::from_utf8_lossy(&script.stderr);
    ensure!(count("migration_stop_vm_begin") == 1, "{text}{said}");
    let (begun, ended) = (
        count("vm_state_handler_begin"),
        count("vm_state_handler_end"),
    );
    ensure!(begun > 1 && begun == ended, "{begun}, {ended}: {text}");
    let report = report(home.path(), &script.stdout)?;
    for words in ["migration_stop_vm finish-migrate", " main ", "downtime  "] {
        ensure!(report.contains(words), "no {words:?} in {report}");
    }
    Ok(())
}

/// Has perf enable its events, and waits until it says that it has: of many that takes a while.
fn enable(control: &Path, ack: &Path) -> Result<()> {
    // Opened for both, neither waits for perf.
    let open = |path| {
        let mut options = fs::File::options();
        options.read(true).write(true);
        options.custom_flags(OFlag::O_NONBLOCK.bits()).open(path)
    };
    let (mut control, mut ack) = (open(control)?, open(ack)?);
    control.write_all(b"enable\n")?;
    let deadline = Instant::now() + LIMIT;
    // It says nothing else, and no more than this.
    while ack.read(&mut [0; 16]).unwrap_or(0) == 0 {
        ensure!(Instant::now() < deadline, "perf did not attach");
        thread::sleep(Duration::from_millis(100));
    }
    Ok(())
}

fn options() -> VmmOptions {
    VmmOptions {
        memory: "32M".into(),
        ..VmmOptions::default()
    }
}

/// Our own report of what `perf script` printed.
fn report(folder: &Path, script: &[u8]) -> Result<String> {
    let (text, recording) = (folder.join("perf.txt"), folder.join("perf.rec"));
    fs::write(&text, script)?;
    let tool = programs::tool()?;
    let mut import = Command::new(&tool);
    import.args(["import", "perf"]).arg(text).arg("--exe");
    import.arg(programs::vmm()?).arg("-o").arg(&recording);
    let imported = import.output()?;
    ensure!(imported.status.success(), "{imported:?}");
    let report = Command::new(tool).arg("report").arg(recording).output()?;
    Ok(String::from_utf8(report.stdout)?)
}

fn missing(program: &str) -> bool {
    let output = Command::new(program).arg("--version").output();
    !output.is_ok_and(|output| output.status.success())
}

/// The monitor's probes as perf's events, until it is dropped.
struct Probes<'a> {
    home: &'a Path,
}

impl<'a> Probes<'a> {
    /// Adds them; `None` where the kernel takes none.
    fn add(home: &'a Path) -> Result<Option<Self>> {
        let vmm = programs::vmm()?;
        let vmm = vmm.to_str().context("the monitor's path is not UTF-8")?;
        let known = perf(home, &["buildid-cache", "--add", vmm])?;
        ensure!(known.status.success(), "{known:?}");
        let probes = Probes { home };
        let added = perf(home, &["probe", "--add", "sdt_vmm:*"])?;
        if !added.status.success() {
            println!("{}", String::from_utf8_lossy(&added.stderr));
        }
        Ok(added.status.success().then_some(probes))
    }
}

impl Drop for Probes<'_> {
    fn drop(&mut self) {
        // None were added where the kernel takes none.
        let _ = perf(self.home, &["probe", "--quiet", "--del", "sdt_vmm:*"]);
    }
}

fn perf(home: &Path, arguments: &[&str]) -> Result<Output> {
    let mut perf = Command::new("perf");
    let perf = perf.env("HOME", home).args(arguments);
    perf.output().with_context(|| format!("{perf:?}"))
}
