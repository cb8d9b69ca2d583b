//! A machine that is reset is the one that was switched on.

use std::env::consts::ARCH;
use std::time::Duration;

use anyhow::{Result, ensure};
use blackout_abi::guest::command;
use harness::{GuestView, Vmm, VmmOptions, programs};
use serde_json::{Value, json};

use crate::migrate::{LIMIT, Running, small};

/// The guest does not live to say that it is done.
fn ask_for_reset(guest: &GuestView) {
    let _ = guest.command(command::RESET, 0, Duration::from_millis(200));
}

fn wait_reset(vmm: &mut Vmm, guest: bool, reason: &str) -> Result<()> {
    let event = vmm.qmp.wait_event("RESET", LIMIT)?;
    let expected = json!({ "guest": guest, "reason": reason });
    ensure!(event["data"] == expected, "{event}");
    Ok(())
}

#[test]
fn a_guest_boots_again_and_again() -> Result<()> {
    let arm = ARCH == "aarch64";
    let options = VmmOptions {
        memory: "64M".into(),
        cpus: 2,
        cmdline: if arm {
            "its_devices=16 its_events=4 dirty=1M".into()
        } else {
            "dirty=1M".into()
        },
        ..VmmOptions::default()
    };
    let Running { mut vmm, guest } = Running::boot(&options)?;
    for _ in 0..5 {
        // What it leaves behind: vCPUs that run, interrupts that wait.
        guest.command(command::RAISE_MASKED, 3, LIMIT)?;
        ask_for_reset(&guest);
        wait_reset(&mut vmm, true, "guest-reset")?;
        guest.wait_ready(LIMIT)?;
        for cpu in 0..2 {
            guest.wait_progress(cpu, LIMIT)?;
        }
        let (taken, _) = guest.command(command::TAKE_PENDING, 0, LIMIT)?;
        ensure!(taken == 0, "interrupt {taken} has come through a reset");
        if arm {
            let (right, wrong) = guest.command(command::CHECK_EVENTS, 0, LIMIT)?;
            ensure!((right, wrong) == (64, 0), "{right} and {wrong} events");
        }
    }
    ensure!(vmm.qmp.status()? == "running");
    Ok(())
}

#[test]
fn a_person_resets_a_machine_in_any_state_of_its_own() -> Result<()> {
    let Running { mut vmm, guest } = Running::boot(&small())?;
    vmm.qmp.execute("system_reset", Value::Null)?;
    wait_reset(&mut vmm, false, "host-qmp-system-reset")?;
    ensure!(vmm.qmp.status()? == "running");
    guest.wait_ready(LIMIT)?;
    guest.wait_progress(0, LIMIT)?;

    vmm.qmp.execute("stop", Value::Null)?;
    vmm.qmp.execute("system_reset", Value::Null)?;
    ensure!(vmm.qmp.status()? == "prelaunch");
    ensure!(guest.counter(0) == 0, "the guest ran on");
    vmm.qmp.execute("cont", Value::Null)?;
    guest.wait_ready(LIMIT)?;
    guest.wait_progress(0, LIMIT)
}

#[test]
fn a_reset_guest_moves_whole() -> Result<()> {
    let mut options = small();
    options.extra.push("--verify-ram".into());
    let mut source = Running::boot(&options)?;
    source.vmm.qmp.execute("system_reset", Value::Null)?;
    source.guest.wait_ready(LIMIT)?;
    let mut destination = Running::wait_for(&options)?;
    let uri = destination.uri();
    let answer = source.vmm.qmp.migrate(&uri, LIMIT)?;
    ensure!(answer["status"] == "completed", "{answer}");
    destination.runs()?;
    // The guest is the other's now, and its program was never there.
    for vmm in [&mut source.vmm, &mut destination.vmm] {
        vmm.qmp.expect_error("system_reset", Value::Null)?;
    }
    destination.runs()
}

#[test]
fn a_machine_is_reset_while_it_moves() -> Result<()> {
    let mut options = small();
    options.extra.push("--verify-ram".into());
    let mut source = Running::boot(&options)?;
    let mut destination = Running::wait_for(&options)?;
    let arguments = json!({ "uri": destination.uri() });
    source.vmm.qmp.execute("migrate", arguments)?;
    // It may come too late, and is refused then.
    let reset = source.vmm.qmp.execute("system_reset", Value::Null);
    println!("reset during the migration: {reset:?}");
    let answer = source.vmm.qmp.wait_migrated(LIMIT)?;
    ensure!(answer["status"] == "completed", "{answer}");
    destination.guest.wait_ready(LIMIT)?;
    destination.runs()
}

#[test]
fn a_guest_that_is_arriving_is_not_reset() -> Result<()> {
    let options = small();
    let mut source = Running::boot(&options)?;
    // A destination may have a program, for the resets of the guest that it will have.
    let program = programs::guest()?.display().to_string();
    let mut with_program = options.clone();
    with_program.extra.extend(["--payload".into(), program]);
    let mut destination = Running::wait_for(&with_program)?;
    let refused = destination
        .vmm
        .qmp
        .expect_error("system_reset", Value::Null)?;
    ensure!(refused.desc.contains("inmigrate"), "{refused:?}");
    let answer = source.vmm.qmp.migrate(&destination.uri(), LIMIT)?;
    ensure!(answer["status"] == "completed", "{answer}");
    destination.runs()?;
    destination.vmm.qmp.execute("system_reset", Value::Null)?;
    destination.guest.wait_ready(LIMIT)?;
    destination.runs()
}
