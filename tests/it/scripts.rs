//! The shipped bpftrace scripts, run by the real bpftrace on a monitor that migrates.

use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use harness::{GuestView, Vmm, VmmOptions, attached, programs, skip};

/// The testbed is emulated, and may share its machine: there bpftrace takes minutes to compile a script
/// with every probe.
const LIMIT: Duration = Duration::from_secs(600);

/// Each script, and what it has to print of a migration. The testbed does not see this machine's files.
const SCRIPTS: [(&str, &str, &[&str]); 4] = [
    (
        "downtime.bt",
        include_str!("../../ebpf/scripts/downtime.bt"),
        &["migration_stop_vm", "device_save", "vm_state_handler"],
    ),
    (
        "handlers.bt",
        include_str!("../../ebpf/scripts/handlers.bt"),
        &["main]"],
    ),
    (
        "its.bt",
        include_str!("../../ebpf/scripts/its.bt"),
        &["its  devices"],
    ),
    (
        "pause.bt",
        include_str!("../../ebpf/scripts/pause.bt"),
        &["after kick us", "@us"],
    ),
];

#[test]
fn every_script_follows_a_migration() -> Result<()> {
    let bpftrace = Command::new("bpftrace").arg("--version").output();
    if !bpftrace.is_ok_and(|output| output.status.success()) {
        skip!("bpftrace is not on this machine");
    }
    for (name, script, expected) in SCRIPTS {
        let output = follow(script).with_context(|| format!("{name} on a migration"))?;
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
fn follow(script: &str) -> Result<String> {
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
    let file = source.dir().join("script.bt");
    fs::write(&file, script)?;
    let mut tracer = attach(&file, source.pid(), &output)?;
    let answer = source.qmp.migrate(&uri, LIMIT)?;
    ensure!(answer["status"] == "completed", "{answer}");
    attached::end(&mut tracer)?;
    Ok(fs::read_to_string(output)?)
}

/// Starts bpftrace, and waits until it has attached.
fn attach(script: &Path, pid: u32, output: &Path) -> Result<Child> {
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
        let said = fs::read_to_string(output)?;
        ensure!(Instant::now() < deadline, "bpftrace did not attach: {said}");
        thread::sleep(Duration::from_millis(100));
    }
    attached::wait(child.id())?;
    Ok(child)
}
