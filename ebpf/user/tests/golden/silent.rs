//! A monitor without probes: two of its VMs, of which one is the other's continuation or is not.

use blackout::analysis::{self, View};
use blackout::recording::Frame;

use crate::report::{golden, load};
use crate::tape::{Tape, Task};

pub(crate) const SOURCE: u32 = 300;
pub(crate) const DESTINATION: u32 = 400;

const KVM_GET_DIRTY_LOG: u32 = 0x4010_ae42;
const KVM_GET_REGS: u32 = 0x8090_ae81;
const KVM_SET_REGS: u32 = 0x4090_ae82;

/// A migration of two vCPUs with `pause_us` between the two sides.
pub(crate) fn migration(pause_us: u64) -> Tape {
    let mut tape = Tape::new("testbed");
    let source = tape.process(SOURCE, &["monitor", "one", "two"]);
    let destination = tape.process(DESTINATION, &["monitor", "one", "two"]);
    let begun_ns = tape.now_ns();
    tape.pass_us(900);
    tape.vm_ioctl(source[0], KVM_GET_DIRTY_LOG, 30);
    tape.pass_us(400);
    let mut stopped = Vec::new();
    for _ in &source[1..] {
        stopped.push(tape.pass_us(70).now_ns());
    }
    for vcpu in &source[1..] {
        tape.vm_ioctl(*vcpu, KVM_GET_REGS, 12);
    }
    tape.vm_ioctl(source[0], KVM_GET_DIRTY_LOG, 20);
    tape.pass_us(pause_us);
    let mut started = Vec::new();
    for vcpu in &destination[1..] {
        tape.vm_ioctl(*vcpu, KVM_SET_REGS, 15);
    }
    for _ in &destination[1..] {
        started.push(tape.pass_us(9).now_ns());
    }
    let vcpus = |tasks: &[Task]| tasks[1..].to_vec();
    for (index, (vcpu, at)) in (0..).zip(vcpus(&source).into_iter().zip(stopped)) {
        tape.edges(vcpu, index, 0, begun_ns, at);
    }
    for (index, (vcpu, at)) in (0..).zip(vcpus(&destination).into_iter().zip(started)) {
        tape.edges(vcpu, index, at, at, 0);
    }
    tape
}

#[test]
fn a_migration_that_only_the_kernel_saw() {
    let report = golden("silent", &[migration(600)]);
    let [migration] = &report.migrations[..] else {
        panic!("{} migrations", report.migrations.len())
    };
    assert_eq!((migration.view, migration.id), (View::Kernel, None));
    // From the last exit on; the downtime began 70 us before, with the first.
    let dark_ns = (12 * 2 + 20 + 600 + 15 * 2 + 9) * 1000;
    assert_eq!(migration.blackout_ns, Some(dark_ns));
    assert_eq!(migration.downtime_ns, Some(dark_ns + 70_000));
    let explained = f64::from(12 * 2 + 20 + 15 * 2) * 1e3 / (dark_ns + 70_000) as f64;
    assert!((migration.explained.unwrap() - explained).abs() < 1e-4);
    assert_eq!(migration.vcpus.len(), 2);
}

#[test]
fn what_is_no_migration_is_not_taken_for_one() {
    let found = |tape: &Tape| analysis::find(&[load("tape", &tape.bytes())]).len();
    let whole = || migration(600);
    assert_eq!(found(&whole()), 1);
    let without = |cmd| {
        let keep = move |frame: &Frame| !matches!(frame, Frame::Ioctl(one) if one.cmd == cmd);
        whole().retain(keep)
    };
    // One shuts down and another boots: nobody reads what the first had, or nobody writes it.
    assert_eq!(found(&without(KVM_GET_REGS)), 0);
    assert_eq!(found(&without(KVM_SET_REGS)), 0);
    let vcpu_of = |frame: &Frame, process| matches!(frame, Frame::VcpuEdges(one) if one.pid == process && one.vcpu == Some(1));
    for process in [SOURCE, DESTINATION] {
        let fewer = whole().retain(|frame| !vcpu_of(frame, process));
        assert_eq!(found(&fewer), 0, "another machine");
    }
    assert_eq!(found(&whole().only(SOURCE)), 0);
    assert_eq!(found(&whole().only(DESTINATION)), 0);
    let late = migration(61_000_000);
    assert_eq!(found(&late), 0, "a minute later");
}
