//! A monitor without probes: two of its VMs, of which one is the other's continuation or is not.

use blackout::analysis::{self, View};
use blackout::recording::Frame;

use crate::report::{golden, load};
use crate::tape::Arg::{I, S, U};
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

/// The same, of a QEMU that was built with the trace backend `dtrace`.
fn of_qemu() -> Tape {
    let mut tape = Tape::new("testbed");
    let source = tape.process(SOURCE, &["qemu", "migration", "vcpu"]);
    let destination = tape.process(DESTINATION, &["qemu", "vcpu"]);
    let begun_ns = tape.now_ns();
    let migrates = source[1];
    let checkpoint = |tape: &mut Tape, task, name| {
        tape.foreign(task, "vmstate_downtime_checkpoint", &[S(name)]);
    };
    tape.foreign(migrates, "migrate_set_state", &[S("setup")]);
    tape.pass_us(200)
        .foreign(migrates, "migrate_set_state", &[S("active")]);
    tape.vm_ioctl(migrates, KVM_GET_DIRTY_LOG, 30);
    tape.pass_us(400);
    checkpoint(&mut tape, migrates, "src-downtime-start");
    let stopped_ns = tape.pass_us(50).now_ns();
    tape.foreign(
        migrates,
        "vm_state_notify",
        &[I(0), I(7), S("finish-migrate")],
    );
    tape.pass_us(90);
    checkpoint(&mut tape, migrates, "src-vm-stopped");
    // QEMU reads its clock before and after what it reports on, in whole microseconds.
    tape.pass_us(4)
        .foreign(migrates, "savevm_section_start", &[S("ram"), U(2)]);
    tape.vm_ioctl(migrates, KVM_GET_DIRTY_LOG, 60);
    tape.pass_us(300)
        .foreign(migrates, "savevm_section_end", &[S("ram"), U(2), I(0)]);
    let took = |tape: &mut Tape, task, name, phase, of, us| {
        tape.foreign(task, name, &[S(phase), S(of), U(0), I(us)]);
    };
    tape.pass_us(2);
    took(
        &mut tape,
        migrates,
        "vmstate_downtime_save",
        "iterable",
        "ram",
        364,
    );
    checkpoint(&mut tape, migrates, "src-iterable-saved");
    tape.vm_ioctl(source[2], KVM_GET_REGS, 12);
    for (name, us) in [("cpu", 70), ("kvm-irqchip", 30)] {
        tape.pass_us(us as u64 + 1);
        took(
            &mut tape,
            migrates,
            "vmstate_downtime_save",
            "non-iterable",
            name,
            us,
        );
    }
    checkpoint(&mut tape, migrates, "src-non-iterable-saved");
    tape.pass_us(500);
    took(
        &mut tape,
        destination[0],
        "vmstate_downtime_load",
        "non-iterable",
        "cpu",
        100,
    );
    checkpoint(&mut tape, destination[0], "dst-precopy-loadvm-completed");
    tape.vm_ioctl(destination[1], KVM_SET_REGS, 15);
    tape.pass_us(80);
    checkpoint(&mut tape, destination[0], "dst-precopy-bh-vm-started");
    let started_ns = tape.pass_us(10).now_ns();
    tape.foreign(migrates, "migrate_set_state", &[S("completed")]);
    tape.edges(source[2], 0, 0, begun_ns, stopped_ns);
    tape.edges(destination[1], 0, started_ns, started_ns, 0);
    tape
}

#[test]
fn the_probes_of_qemu_are_in_the_tree() {
    let report = golden("qemu", &[of_qemu()]);
    let [migration] = &report.migrations[..] else {
        panic!("{} migrations", report.migrations.len())
    };
    assert_eq!((migration.view, migration.id), (View::Kernel, None));
    let spans = || migration.spans.iter();
    let place = |name: &str, detail: &str| {
        let found = spans().position(|span| span.name == name && span.detail.contains(detail));
        found.unwrap_or_else(|| panic!("no {name} {detail}"))
    };
    let (ram, section) = (place("vmstate_save", "ram"), place("savevm_section", "ram"));
    let stage = place("src-iterable-saved", "");
    assert!(
        stage < ram && ram < section,
        "a parent stands before its children"
    );
    assert_eq!(
        [stage, ram, section].map(|at| migration.spans[at].depth),
        [0, 1, 2]
    );
    // The downtime begins where QEMU says so, 50 us before the vCPU was out.
    let dark_ns = migration.blackout_ns.unwrap();
    assert_eq!(migration.downtime_ns, Some(dark_ns + 50_000));
    assert_eq!(migration.doubts, [""; 0]);
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
