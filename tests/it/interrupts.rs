//! Interrupts across a switchover: one that is pending is taken at the destination, and a timer
//! goes on.

use std::env::consts::ARCH;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use blackout_abi::guest::command::{RAISE_MASKED, TAKE_PENDING, TIMER};
use harness::{GuestView, Vmm, VmmOptions, skip};

const LIMIT: Duration = Duration::from_secs(120);

#[test]
fn a_pending_interrupt_is_taken_at_the_destination() -> Result<()> {
    for cpus in [1, 4] {
        let mut source = Vmm::spawn(&options(cpus))?;
        let guest = GuestView::open(source.pid())?;
        guest.wait_ready(LIMIT)?;
        let (raised, _) = guest.command(RAISE_MASKED, 13, LIMIT)?;
        ensure!(
            raised > 0 && raised != u64::MAX,
            "the guest raised nothing: {raised}"
        );
        let taken_before = guest.interrupts();

        let destination = migrate(&mut source, cpus)?;
        let guest = GuestView::open(destination.pid())?;
        ensure!(guest.interrupts() == taken_before, "it was not pending");
        let (taken, _) = guest.command(TAKE_PENDING, 0, LIMIT)?;
        ensure!(taken == raised, "raised {raised}, took {taken}");
        ensure!(guest.interrupts() == taken_before + 1);
        let (again, _) = guest.command(TAKE_PENDING, 0, LIMIT)?;
        ensure!(again == 0, "{again} came twice");
    }
    Ok(())
}

#[test]
fn a_timer_goes_on_at_the_destination() -> Result<()> {
    if ARCH != "x86_64" {
        skip!("the arm64 guest has no timer of its own");
    }
    let mut source = Vmm::spawn(&options(1))?;
    let guest = GuestView::open(source.pid())?;
    guest.wait_ready(LIMIT)?;
    guest.command(TIMER, 100, LIMIT)?;
    wait_ticks(&guest, 10)?;
    let destination = migrate(&mut source, 1)?;
    wait_ticks(&GuestView::open(destination.pid())?, 10)
}

fn options(cpus: u32) -> VmmOptions {
    VmmOptions {
        memory: "32M".into(),
        cpus,
        cmdline: "its_devices=4 its_events=4 dirty=64K".into(),
        ..VmmOptions::default()
    }
}

fn migrate(source: &mut Vmm, cpus: u32) -> Result<Vmm> {
    let uri = format!("unix:{}", source.dir().join("migration").display());
    let destination = Vmm::spawn(&options(cpus).incoming(&uri))?;
    let answer = source.qmp.migrate(&uri, LIMIT)?;
    ensure!(answer["status"] == "completed", "{answer}");
    Ok(destination)
}

fn wait_ticks(guest: &GuestView, ticks: u64) -> Result<()> {
    let (from, deadline) = (guest.interrupts(), Instant::now() + LIMIT);
    while guest.interrupts() < from + ticks {
        ensure!(Instant::now() < deadline, "the timer does not tick");
        thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}
