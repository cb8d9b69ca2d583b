//! The ITS survives a migration, and one that can't be saved does not end the guest.

use std::env::consts::ARCH;
use std::time::Duration;

use anyhow::{Result, ensure};
use blackout_abi::guest::command;
use harness::{GuestView, Vmm, VmmOptions, skip};

/// The testbed is emulated, and may share its machine.
const LIMIT: Duration = Duration::from_secs(300);

const DEVICES: u64 = 256;
const EVENTS: u64 = 16;
/// The event that is raised and not taken before the migration.
const PENDING: u64 = 1234;
const FIRST_LPI: u64 = 8192;

#[test]
fn its_state_arrives_whole_with_one_vcpu() -> Result<()> {
    if ARCH != "aarch64" {
        skip!("only arm64 has an ITS");
    }
    arrives_whole(1, "")
}

#[test]
fn its_state_arrives_whole_with_four_vcpus() -> Result<()> {
    if ARCH != "aarch64" {
        skip!("only arm64 has an ITS");
    }
    arrives_whole(4, "")
}

#[test]
fn its_state_arrives_whole_with_a_two_level_device_table() -> Result<()> {
    if ARCH != "aarch64" {
        skip!("only arm64 has an ITS");
    }
    arrives_whole(1, "its_indirect=1")
}

#[test]
fn its_with_a_device_outside_ram_fails_the_migration_alone() -> Result<()> {
    if ARCH != "aarch64" {
        skip!("only arm64 has an ITS");
    }
    fails_alone(1)
}

#[test]
fn its_with_a_table_outside_ram_fails_the_migration_alone() -> Result<()> {
    if ARCH != "aarch64" {
        skip!("only arm64 has an ITS");
    }
    fails_alone(2)
}

/// Migrates a guest with an LPI that is pending. At the destination RAM is the same at the
/// switchover, the vCPUs go on from where they were, the LPI is taken, and each event still raises
/// its own LPI on its own vCPU.
fn arrives_whole(cpus: u32, words: &str) -> Result<()> {
    let options = options(cpus, words);
    let mut source = Vmm::spawn(&options)?;
    let guest = GuestView::open(source.pid())?;
    guest.wait_ready(LIMIT)?;
    ensure!(guest.events() == DEVICES * EVENTS);
    let (lpi, _) = guest.command(command::RAISE_MASKED, PENDING, LIMIT)?;
    ensure!(lpi == FIRST_LPI + PENDING, "event {PENDING} is LPI {lpi}");

    let destination = migrate(&mut source, &options)?;
    let before = guest.counters(cpus as usize);
    let guest = GuestView::open(destination.pid())?;
    for (vcpu, &before) in before.iter().enumerate() {
        let after = guest.counter(vcpu);
        ensure!(
            after >= before,
            "vCPU {vcpu} fell back from {before} to {after}"
        );
        guest.wait_progress(vcpu, LIMIT)?;
    }
    let taken = guest.command(command::TAKE_PENDING, 0, LIMIT)?;
    ensure!(
        taken == (lpi, 1),
        "LPI {lpi} was pending, (LPI, times) taken is {taken:?}"
    );
    let came = guest.command(command::CHECK_EVENTS, 0, LIMIT)?;
    ensure!(
        came == (DEVICES * EVENTS, 0),
        "(right, wrong) LPIs are {came:?}"
    );
    Ok(())
}

/// Has the guest spoil its ITS: the migration fails, QMP says why, and the guest runs on. Mended,
/// it migrates.
fn fails_alone(how: u64) -> Result<()> {
    let options = options(1, "");
    let mut source = Vmm::spawn(&options)?;
    let guest = GuestView::open(source.pid())?;
    guest.wait_ready(LIMIT)?;
    guest.command(command::BREAK_ITS, how, LIMIT)?;

    let uri = uri(&source);
    let mut destination = Vmm::spawn(&options.incoming(&uri))?;
    let answer = source.qmp.migrate(&uri, LIMIT)?;
    ensure!(answer["status"] == "failed", "{answer}");
    let error = answer["error-desc"].as_str().unwrap_or_default();
    ensure!(
        error.contains("its") && error.contains("Bad address"),
        "{error}"
    );
    ensure!(source.qmp.status()? == "running");
    ensure!(destination.qmp.status()? != "running");
    guest.wait_progress(0, LIMIT)?;

    guest.command(command::MEND_ITS, 0, LIMIT)?;
    drop(destination);
    let destination = migrate(&mut source, &options)?;
    let guest = GuestView::open(destination.pid())?;
    let came = guest.command(command::CHECK_EVENTS, 0, LIMIT)?;
    ensure!(
        came == (DEVICES * EVENTS, 0),
        "(right, wrong) LPIs are {came:?}"
    );
    Ok(())
}

fn options(cpus: u32, words: &str) -> VmmOptions {
    VmmOptions {
        cpus,
        cmdline: format!("its_devices={DEVICES} its_events={EVENTS} dirty=1M {words}"),
        extra: vec!["--verify-ram".into()],
        ..VmmOptions::default()
    }
}

fn uri(source: &Vmm) -> String {
    format!("unix:{}", source.dir().join("migration").display())
}

fn migrate(source: &mut Vmm, options: &VmmOptions) -> Result<Vmm> {
    let uri = uri(source);
    let destination = Vmm::spawn(&options.incoming(&uri))?;
    let answer = source.qmp.migrate(&uri, LIMIT)?;
    ensure!(answer["status"] == "completed", "{answer}");
    Ok(destination)
}
