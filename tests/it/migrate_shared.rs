//! A guest that moves to another process of this host, and its RAM with it.

use std::fs;
use std::os::unix::fs::MetadataExt;

use anyhow::{Context, Result, bail, ensure};
use harness::{GuestView, VmmOptions};
use serde_json::{Value, json};

use crate::migrate::{LIMIT, Running};

fn options() -> VmmOptions {
    VmmOptions {
        memory: "256M".into(),
        cpus: 2,
        cmdline: "dirty=16M".into(),
        extra: vec!["--verify-ram".into()],
        ..VmmOptions::default()
    }
}

/// Which memory a monitor's guest RAM is.
fn memory(running: &Running) -> Result<u64> {
    for entry in fs::read_dir(format!("/proc/{}/fd", running.vmm.pid()))? {
        let path = entry?.path();
        let name = fs::read_link(&path).unwrap_or_default();
        if name.to_string_lossy().contains("blackout-ram") {
            return Ok(fs::metadata(path)?.ino());
        }
    }
    bail!("the monitor has no guest RAM")
}

fn share(source: &mut Running) -> Result<()> {
    let mode = json!({ "mode": "cpr-transfer" });
    source.vmm.qmp.execute("migrate-set-parameters", mode)?;
    Ok(())
}

#[test]
fn a_guest_is_handed_on_and_on_in_one_memory() -> Result<()> {
    let mut source = Running::boot(&options())?;
    let ram = memory(&source)?;
    for _ in 0..3 {
        let mut destination = Running::wait_for(&options())?;
        ensure!(memory(&destination)? != ram);
        share(&mut source)?;
        let answer = source.vmm.qmp.migrate(&destination.uri(), LIMIT)?;
        ensure!(answer["status"] == "completed", "{answer}");
        ensure!(answer["ram"]["transferred"] == 0, "{answer}");
        ensure!(memory(&destination)? == ram, "RAM was copied");
        let there = destination.vmm.qmp.wait_migrated(LIMIT)?;
        ensure!(there["blackout"]["mode"] == "cpr-transfer", "{there}");

        let refused = source.vmm.qmp.expect_error("cont", Value::Null)?;
        ensure!(refused.desc.contains("handed over"), "{refused}");
        destination.guest = GuestView::open(destination.vmm.pid())?;
        drop(source);
        destination.runs()?;
        source = destination;
    }
    source.guest.wait_progress(1, LIMIT)
}

#[test]
fn a_destination_that_dies_leaves_the_guest_and_its_ram() -> Result<()> {
    let mut source = Running::boot(&options())?;
    let mut destination = Running::wait_for(&options())?;
    share(&mut source)?;
    let pause = json!([{ "capability": "pause-before-switchover", "state": true }]);
    let qmp = &mut source.vmm.qmp;
    qmp.execute("migrate-set-capabilities", json!({ "capabilities": pause }))?;
    qmp.execute("migrate", json!({ "uri": destination.uri() }))?;
    while qmp.execute("query-migrate", Value::Null)?["status"] != "pre-switchover" {}
    destination.vmm.kill()?;
    let answer = qmp.wait_migrated(LIMIT)?;
    ensure!(answer["status"] == "failed", "{answer}");
    source.runs()
}

#[test]
fn ram_can_only_be_handed_over_on_one_host() -> Result<()> {
    let mut source = Running::boot(&options())?;
    let mut destination = Running::wait_for(&options().incoming("defer"))?;
    destination.vmm.qmp.execute("migrate_cancel", Value::Null)?;
    destination.vmm.qmp.wait_migrated(LIMIT)?;
    let listen = json!({ "uri": "tcp:127.0.0.1:0" });
    destination.vmm.qmp.execute("migrate-incoming", listen)?;
    let listening = destination.vmm.qmp.execute("query-migrate", Value::Null)?;
    let port = listening["socket-address"][0]["port"]
        .as_str()
        .context("no port")?;
    share(&mut source)?;
    let answer = source
        .vmm
        .qmp
        .migrate(&format!("tcp:127.0.0.1:{port}"), LIMIT)?;
    ensure!(answer["status"] == "failed", "{answer}");
    let why = answer["error-desc"].as_str().unwrap_or_default();
    ensure!(why.contains("it needs a unix socket"), "{why}");
    source.runs()
}
