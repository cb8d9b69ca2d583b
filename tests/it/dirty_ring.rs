//! Guests whose writes KVM lists in rings (`--dirty-ring-size`) arrive as whole as others.

use std::env::consts::ARCH;

use anyhow::{Result, ensure};
use blackout_abi::guest::command;
use harness::{VmmOptions, skip};
use kvm_ioctls::Kvm;

use crate::migrate::{LIMIT, Running, migrate, verified};

/// `KVM_CAP_DIRTY_LOG_RING` and `KVM_CAP_DIRTY_LOG_RING_ACQ_REL`.
const CAPABILITIES: [u64; 2] = [192, 223];
/// Fewer than the guest keeps pages dirty, so that its vCPUs run into the end of them.
const ENTRIES: [&str; 2] = ["--dirty-ring-size", "1024"];
const DIRTY: &str = "dirty=16M";

fn has_rings() -> Result<bool> {
    let kvm = Kvm::new()?;
    let has = |capability| kvm.check_extension_raw(capability) > 0;
    Ok(CAPABILITIES.into_iter().any(has))
}

fn ringed(cpus: u32, cmdline: &str) -> VmmOptions {
    let mut options = verified(cpus, cmdline);
    options.extra.extend(ENTRIES.map(str::to_owned));
    options
}

/// From a monitor with rings to one without, and back, which changes nothing for the guest. Where KVM
/// overruns its rings nothing arrives, and the guest stays.
fn arrives_whole(cpus: u32) -> Result<()> {
    if !has_rings()? {
        skip!("this KVM has no dirty rings");
    }
    let mut here = Running::boot(&ringed(cpus, DIRTY))?;
    for options in [
        verified(cpus, DIRTY),
        ringed(cpus, DIRTY),
        ringed(cpus, DIRTY),
    ] {
        let mut there = Running::wait_for(&options)?;
        let uri = there.uri();
        if let Err(error) = migrate(&mut here, &mut there, &uri, cpus as usize) {
            ensure!(format!("{error}").contains("overran"), "{error}");
            here.runs()?;
            skip!("this KVM overruns its dirty rings, and the monitor noticed");
        }
        here = there;
    }
    Ok(())
}

#[test]
fn guest_ram_is_equal_with_one_vcpu() -> Result<()> {
    arrives_whole(1)
}

#[test]
fn guest_ram_is_equal_with_four_vcpus() -> Result<()> {
    arrives_whole(4)
}

/// The tables of an ITS are written by KVM itself, not by a vCPU: no ring has them.
#[test]
fn tables_that_kvm_writes_by_itself_arrive() -> Result<()> {
    if ARCH != "aarch64" {
        skip!("only arm64 has an ITS");
    }
    if !has_rings()? {
        skip!("this KVM has no dirty rings");
    }
    let options = ringed(2, "its_devices=16 its_events=16 dirty=1M");
    let mut source = Running::boot(&options)?;
    let mut destination = Running::wait_for(&options)?;
    let uri = destination.uri();
    migrate(&mut source, &mut destination, &uri, 2)?;
    let (right, wrong) = destination.guest.command(command::CHECK_EVENTS, 0, LIMIT)?;
    ensure!(
        (right, wrong) == (256, 0),
        "{right} events arrived right, {wrong} did not"
    );
    Ok(())
}
