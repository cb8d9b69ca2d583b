//! The shipped bpftrace scripts, run by the real bpftrace on a monitor that migrates.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use harness::{GuestView, Vmm, VmmOptions, attached, programs, skip};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// The testbed is emulated, and may share its machine.
const LIMIT: Duration = Duration::from_secs(120);

/// What each script has to print of a migration.
const SCRIPTS: [(&str, &[&str]); 4] = [
    (
        "downtime.bt",
        &["migration_stop_vm", "device_save", "vm_state_handler"],
    ),
    ("handlers.bt", &["main]"]),
    ("its.bt", &["its  devices"]),
    ("pause.bt", &["after kick us", "@us"]),
];

#[test]
fn every_script_follows_a_migration() -> Result<()> {
    let bpftrace = Command::new("bpftrace").arg("--version").output();
    if !bpftrace.is_ok_and(|output| output.status.success()) {
        skip!("bpftrace is not on this machine");
    }
    for (name, expected) in SCRIPTS {
        let output = follow(name).with_context(|| format!("{name} on a migration"))?;
        for words in expected {
            ensure!(
                output.contains(words),
                "{name} did not print {words}: {output}"
            );
        }
        if cfg!(target_arch = "aarch64") && name == "its.bt" {
            let saved = |line: &str| line.split_whitespace().take(3).eq(["0", "16", "64"]);
            ensure!(output.lines().any(saved), "no save: {output}");
        }
    }
    Ok(())
}

/// What a script prints while a guest leaves the monitor that it is attached to.
fn follow(name: &str) -> Result<String> {
    let options = VmmOptions {
        memory: "32M".into(),
        cmdline: "its_devices=16 its_events=4".into(),
        ..VmmOptions::default()
    };
    let mut source = Vmm::spawn(&options)?;
    GuestView::open(source.pid())?.wait_ready(LIMIT)?;
    let uri = format!("unix:{}", source.dir().join("migration").display());
    let _destination = Vmm::spawn(&options.incoming(&uri))?;
    let output = source.dir().join("output");
    let mut tracer = attach(name, source.pid(), &output)?;
    let answer = source.qmp.migrate(&uri, LIMIT)?;
    ensure!(answer["status"] == "completed", "{answer}");
    kill(Pid::from_raw(tracer.id().cast_signed()), Signal::SIGINT)?;
    tracer.wait()?;
    Ok(fs::read_to_string(output)?)
}

/// Starts bpftrace, and waits until it has attached.
fn attach(name: &str, pid: u32, output: &Path) -> Result<Child> {
    let script = PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("../ebpf/scripts")
        .join(name);
    let file = fs::File::create(output)?;
    let child = Command::new("bpftrace")
        .args(["-B", "line", "-p", &pid.to_string()])
        .arg(script)
        .arg(programs::vmm()?)
        .stdin(Stdio::null())
        .stdout(file.try_clone()?)
        .stderr(file)
        .spawn()?;
    let deadline = Instant::now() + LIMIT;
    while !fs::read_to_string(output)?.contains("Attaching ") {
        ensure!(Instant::now() < deadline, "bpftrace did not attach");
        thread::sleep(Duration::from_millis(100));
    }
    attached::wait(child.id())?;
    Ok(child)
}
