//! A guest that moves arrives whole, again and again.

use std::env::consts::ARCH;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use blackout_abi::guest::command;
use harness::skip::slow;
use harness::{GuestView, Resources, Vmm, VmmOptions, skip};
use serde_json::{Value, json};

pub(crate) const LIMIT: Duration = Duration::from_secs(120);

/// A guest that runs in a monitor, and its RAM seen from outside.
pub(crate) struct Running {
    pub(crate) vmm: Vmm,
    pub(crate) guest: GuestView,
}

impl Running {
    /// Boots a guest and waits until it has set itself up.
    pub(crate) fn boot(options: &VmmOptions) -> Result<Self> {
        let vmm = Vmm::spawn(options)?;
        let guest = GuestView::open(vmm.pid())?;
        guest.wait_ready(LIMIT)?;
        Ok(Running { vmm, guest })
    }

    /// A destination that listens on a unix socket of its own; see [`Running::path`].
    pub(crate) fn wait_for(options: &VmmOptions) -> Result<Self> {
        let mut vmm = Vmm::spawn(&options.incoming("defer"))?;
        let uri = format!("unix:{}", vmm.dir().join("migration").display());
        vmm.qmp.execute("migrate-incoming", json!({ "uri": uri }))?;
        let guest = GuestView::open(vmm.pid())?;
        Ok(Running { vmm, guest })
    }

    /// Where it listens.
    pub(crate) fn path(&self) -> PathBuf {
        self.vmm.dir().join("migration")
    }

    /// Where it listens, as a URI.
    pub(crate) fn uri(&self) -> String {
        format!("unix:{}", self.path().display())
    }

    /// The guest runs here, and goes on.
    pub(crate) fn runs(&mut self) -> Result<()> {
        let status = self.vmm.qmp.status()?;
        ensure!(
            status == "running",
            "the VM is {status}; {}",
            self.vmm.stderr()
        );
        self.guest.wait_progress(0, LIMIT)
    }
}

/// A small guest that keeps some memory dirty.
pub(crate) fn small() -> VmmOptions {
    VmmOptions {
        memory: "32M".into(),
        cmdline: "dirty=256K".into(),
        ..VmmOptions::default()
    }
}

/// Migrates and checks that the guest is the destination's, no less far than it was, and going on.
pub(crate) fn migrate(
    source: &mut Running,
    destination: &mut Running,
    uri: &str,
    cpus: usize,
) -> Result<Value> {
    let before = source.guest.counters(cpus);
    let answer = source.vmm.qmp.migrate(uri, LIMIT)?;
    ensure!(answer["status"] == "completed", "{answer}");
    let at_switchover = source.guest.counters(cpus);
    let there = destination.vmm.qmp.wait_migrated(LIMIT)?;
    ensure!(there["status"] == "completed", "{there}");
    ensure!(source.vmm.qmp.status()? == "postmigrate");
    destination.runs()?;
    for cpu in 0..cpus {
        destination.guest.wait_progress(cpu, LIMIT)?;
        let (then, left, now) = (
            before[cpu],
            at_switchover[cpu],
            destination.guest.counter(cpu),
        );
        ensure!(
            then <= left && left < now,
            "vCPU {cpu} went from {then} to {left} to {now}"
        );
    }
    ensure!(
        source.guest.counters(cpus) == at_switchover,
        "the source's guest still runs"
    );
    Ok(answer)
}

pub(crate) fn verified(cpus: u32, cmdline: &str) -> VmmOptions {
    VmmOptions {
        memory: "64M".into(),
        cpus,
        cmdline: cmdline.into(),
        extra: vec!["--verify-ram".into()],
        ..VmmOptions::default()
    }
}

fn arrives_whole(cpus: u32) -> Result<()> {
    let options = verified(cpus, "dirty=1M");
    let mut source = Running::boot(&options)?;
    let vmm = Vmm::spawn(&options.incoming("tcp:127.0.0.1:0"))?;
    let guest = GuestView::open(vmm.pid())?;
    let mut destination = Running { vmm, guest };
    let listening = destination.vmm.qmp.execute("query-migrate", Value::Null)?;
    let port = listening["socket-address"][0]["port"]
        .as_str()
        .unwrap_or_default()
        .to_owned();
    let uri = format!("tcp:127.0.0.1:{port}");
    let answer = migrate(&mut source, &mut destination, &uri, cpus as usize)?;

    let blackout = &answer["blackout"];
    let downtime = blackout["downtime-ns"].as_u64().unwrap_or_default();
    ensure!(downtime > 0 && answer["downtime"].as_u64() == Some(downtime.div_ceil(1_000_000)));
    for side in ["source", "destination"] {
        let spans = blackout["spans"].as_array().into_iter().flatten();
        let spans: Vec<_> = spans.filter(|span| span["side"] == side).collect();
        ensure!(spans.len() > 10, "{side}: {spans:?}");
        ensure!(
            spans.iter().all(|span| span["rc"] == 0),
            "{side}: {spans:?}"
        );
    }
    Ok(())
}

#[test]
fn guest_ram_is_equal_at_the_switchover_with_one_vcpu() -> Result<()> {
    arrives_whole(1)
}

#[test]
fn guest_ram_is_equal_at_the_switchover_with_four_vcpus() -> Result<()> {
    arrives_whole(4)
}

/// 256 devices of 16 events: all of them arrive, the one that was pending first.
fn interrupts_arrive(cpus: u32) -> Result<()> {
    const EVENTS: u64 = 256 * 16;
    if ARCH != "aarch64" {
        skip!("only arm64 has an ITS");
    }
    let options = verified(cpus, "its_devices=256 its_events=16 dirty=1M");
    let mut source = Running::boot(&options)?;
    ensure!(
        source.guest.events() == EVENTS,
        "{} events are mapped",
        source.guest.events()
    );
    source.guest.command(command::RAISE_MASKED, 77, LIMIT)?;
    let mut destination = Running::wait_for(&options)?;
    let uri = destination.uri();
    migrate(&mut source, &mut destination, &uri, cpus as usize)?;
    let (lpi, _) = destination.guest.command(command::TAKE_PENDING, 0, LIMIT)?;
    ensure!(lpi == 8192 + 77, "the pending LPI was {lpi}");
    let (right, wrong) = destination.guest.command(command::CHECK_EVENTS, 0, LIMIT)?;
    ensure!(
        (right, wrong) == (EVENTS, 0),
        "{right} events arrived right, {wrong} did not"
    );
    Ok(())
}

#[test]
fn interrupts_arrive_with_one_vcpu() -> Result<()> {
    interrupts_arrive(1)
}

#[test]
fn interrupts_arrive_with_four_vcpus() -> Result<()> {
    interrupts_arrive(4)
}

#[test]
fn a_guest_moves_on_and_on_and_nothing_leaks() -> Result<()> {
    let hops = if ARCH == "aarch64" { 20 } else { 50 };
    let options = small();
    let mut here = Running::boot(&options)?;
    let mut first = None;
    for hop in 1..=hops {
        let mut there = Running::wait_for(&options)?;
        let uri = there.uri();
        migrate(&mut here, &mut there, &uri, 1)?;
        let pid = there.vmm.pid();
        first = Some(match first {
            None => Resources::of(pid)?,
            Some(before) => {
                Resources::settled(pid, before).with_context(|| format!("hop {hop}"))?
            }
        });
        here = there;
    }
    println!("{hops} migrations, the last destination holds {first:?}");
    Ok(())
}

/// The source's own process, and a destination's, after many attempts that failed.
#[test]
fn attempts_that_fail_leave_nothing_behind() -> Result<()> {
    let attempts = if slow() { 50 } else { 10 };
    let options = small();
    let mut source = Running::boot(&options)?;
    let mut destination = Vmm::spawn(&options.incoming("defer"))?;
    let mut before = None;
    for attempt in 0..=attempts {
        let uri = format!(
            "unix:{}",
            destination.dir().join(format!("m{attempt}")).display()
        );
        destination
            .qmp
            .execute("migrate-incoming", json!({ "uri": uri }))?;
        destination.qmp.execute("migrate_cancel", Value::Null)?;
        let cancelled = destination.qmp.wait_migrated(LIMIT)?;
        ensure!(cancelled["status"] == "cancelled", "{cancelled}");
        let answer = source.vmm.qmp.migrate(&uri, LIMIT)?;
        ensure!(answer["status"] == "failed", "{answer}");
        let (source, destination) = (source.vmm.pid(), destination.pid());
        before = Some(match before {
            None => (Resources::of(source)?, Resources::of(destination)?),
            Some((held, waited)) => (
                Resources::settled(source, held)?,
                Resources::settled(destination, waited)?,
            ),
        });
    }
    source.runs()
}
