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

pub(crate) fn wait_status(running: &mut Running, wanted: &str) -> Result<Value> {
    wait_until(running, |answer| answer["status"] == wanted)
}

/// Asks until the answer to `query-migrate` is as `wanted`.
pub(crate) fn wait_until(running: &mut Running, wanted: impl Fn(&Value) -> bool) -> Result<Value> {
    let until = Instant::now() + LIMIT;
    loop {
        let answer = running.vmm.qmp.execute("query-migrate", Value::Null)?;
        if wanted(&answer) {
            return Ok(answer);
        }
        if Instant::now() > until {
            bail!("never what is waited for: {answer}");
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

/// How far the guest gets in a while.
fn progress(running: &Running) -> u64 {
    let before = running.guest.counter(0);
    thread::sleep(Duration::from_millis(500));
    running.guest.counter(0) - before
}

#[test]
fn a_guest_that_does_not_converge_is_slowed_down_while_it_migrates() -> Result<()> {
    let mut source = Running::boot(&small())?;
    let destination = Running::wait_for(&small())?;
    let auto_converge = json!([{ "capability": "auto-converge", "state": true }]);
    let qmp = &mut source.vmm.qmp;
    qmp.execute(
        "migrate-set-capabilities",
        json!({ "capabilities": auto_converge }),
    )?;
    // Nothing fits no limit, however little the guest runs.
    let slow = json!({ "max-bandwidth": 2 << 20, "downtime-limit": 0,
        "cpu-throttle-initial": 80, "max-cpu-throttle": 80 });
    qmp.execute("migrate-set-parameters", slow)?;
    let freely = progress(&source);
    source
        .vmm
        .qmp
        .execute("migrate", json!({ "uri": destination.uri() }))?;
    let throttled = wait_until(&mut source, |answer| {
        !answer["cpu-throttle-percentage"].is_null()
    })?;
    ensure!(
        throttled["cpu-throttle-percentage"].as_u64() == Some(80),
        "{throttled}"
    );
    let slowly = progress(&source);
    ensure!(
        0 < slowly && slowly < freely / 2,
        "{slowly} instead of {freely}"
    );

    source.vmm.qmp.execute("migrate_cancel", Value::Null)?;
    let answer = source.vmm.qmp.wait_migrated(LIMIT)?;
    ensure!(
        answer["cpu-throttle-percentage"].is_null(),
        "the guest is slowed down still: {answer}"
    );
    let again = progress(&source);
    ensure!(again > slowly, "{again} after {slowly}");
    Ok(())
}

#[test]
fn a_migration_that_takes_too_long_is_given_up() -> Result<()> {
    let mut source = Running::boot(&small())?;
    let destination = Running::wait_for(&small())?;
    let qmp = &mut source.vmm.qmp;
    // So slow that not even the first round ends in time.
    let slow = json!({ "max-bandwidth": 10_000, "migration-timeout": 1 });
    qmp.execute("migrate-set-parameters", slow)?;
    qmp.execute("migrate", json!({ "uri": destination.uri() }))?;
    let answer = qmp.wait_migrated(LIMIT)?;
    ensure!(answer["status"] == "failed", "{answer}");
    let reason = answer["error-desc"].as_str().unwrap_or_default();
    ensure!(reason.contains("migration-timeout, 1 s"), "{answer}");
    source.runs()
}
