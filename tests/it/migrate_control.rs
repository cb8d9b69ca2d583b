//! A migration that a client holds back, lets go on, and sets limits to.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use harness::VmmOptions;
use serde_json::{Value, json};

use crate::migrate::{LIMIT, Running};

fn small() -> VmmOptions {
    VmmOptions {
        cmdline: "dirty=256K".into(),
        ..VmmOptions::default()
    }
}

fn wait_status(running: &mut Running, wanted: &str) -> Result<Value> {
    let until = Instant::now() + LIMIT;
    loop {
        let answer = running.vmm.qmp.execute("query-migrate", Value::Null)?;
        if answer["status"] == wanted {
            return Ok(answer);
        }
        if Instant::now() > until {
            bail!("not {wanted}: {answer}");
        }
        thread::sleep(Duration::from_millis(5));
    }
}

/// Switches `pause-before-switchover` on and begins to migrate.
fn paused_before_the_switchover() -> Result<(Running, Running)> {
    let mut source = Running::boot(&small())?;
    let destination = Running::wait_for(&small())?;
    let pause = json!([{ "capability": "pause-before-switchover", "state": true }]);
    let qmp = &mut source.vmm.qmp;
    qmp.execute("migrate-set-capabilities", json!({ "capabilities": pause }))?;
    qmp.execute("migrate", json!({ "uri": destination.uri() }))?;
    wait_status(&mut source, "pre-switchover")?;
    ensure!(source.vmm.qmp.status()? == "finish-migrate");
    Ok((source, destination))
}

#[test]
fn a_migration_that_is_paused_before_the_switchover_goes_on() -> Result<()> {
    let (mut source, mut destination) = paused_before_the_switchover()?;
    let qmp = &mut source.vmm.qmp;
    let early = qmp.expect_error("migrate-continue", json!({ "state": "active" }))?;
    let expected = "Migration not in expected state: pre-switchover";
    ensure!(early.desc == expected, "{early}");
    let capabilities = json!({ "capabilities": [] });
    let busy = qmp.expect_error("migrate-set-capabilities", capabilities)?;
    ensure!(
        busy.desc.contains("migration process in progress"),
        "{busy}"
    );
    qmp.execute("migrate-continue", json!({ "state": "pre-switchover" }))?;
    let answer = qmp.wait_migrated(LIMIT)?;
    ensure!(answer["status"] == "completed", "{answer}");
    destination.runs()
}

#[test]
fn a_migration_that_is_paused_before_the_switchover_can_be_cancelled() -> Result<()> {
    let (mut source, _destination) = paused_before_the_switchover()?;
    source.vmm.qmp.execute("migrate_cancel", Value::Null)?;
    let answer = source.vmm.qmp.wait_migrated(LIMIT)?;
    ensure!(answer["status"] == "cancelled", "{answer}");
    source.runs()
}

#[test]
fn a_destination_that_dies_before_the_switchover_is_noticed() -> Result<()> {
    let (mut source, mut destination) = paused_before_the_switchover()?;
    destination.vmm.kill()?;
    let answer = source.vmm.qmp.wait_migrated(LIMIT)?;
    ensure!(answer["status"] == "failed", "{answer}");
    source.runs()
}

#[test]
fn a_downtime_limit_can_be_set_while_a_migration_runs() -> Result<()> {
    let mut source = Running::boot(&small())?;
    let mut destination = Running::wait_for(&small())?;
    let mut set = |name: &str, value: u64| {
        let qmp = &mut source.vmm.qmp;
        qmp.execute("migrate-set-parameters", json!({ name: value }))
    };
    // So slow that the guest dirties more than a round sends.
    set("max-bandwidth", 2 << 20)?;
    set("downtime-limit", 0)?;
    let uri = destination.uri();
    source.vmm.qmp.execute("migrate", json!({ "uri": uri }))?;
    wait_status(&mut source, "active")?;
    let changes = json!({ "max-bandwidth": 0, "downtime-limit": 2000 });
    source.vmm.qmp.execute("migrate-set-parameters", changes)?;
    let answer = source.vmm.qmp.wait_migrated(LIMIT)?;
    ensure!(answer["status"] == "completed", "{answer}");
    destination.runs()
}
