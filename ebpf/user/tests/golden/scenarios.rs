//! Migrations as the monitor's probes and the kernel tell them, one function each.
//!
//! They follow the stop path of `vmm/ARCHITECTURE.md`; durations are made up, but of the size that
//! the arm64 testbed shows.

use crate::steps::*;
use crate::tape::Arg::{I, S, U};
use crate::tape::{Tape, Task};

/// The pids of [`Pair::new`].
pub(crate) const SOURCE: u32 = 700;
pub(crate) const DESTINATION: u32 = 800;

/// A source and a destination of two vCPUs each, on one tape.
pub(crate) struct Pair {
    pub(crate) tape: Tape,
    source: Side,
    destination: Side,
}

impl Pair {
    pub(crate) fn new(hostname: &str, pids: (u32, u32)) -> Self {
        let mut tape = Tape::new(hostname);
        let source = Side::new(&mut tape, pids.0);
        let destination = Side::new(&mut tape, pids.1);
        Self {
            tape,
            source,
            destination,
        }
    }
}

/// A precopy migration that completes; both sides were recorded, with the kernel's inner view.
pub(crate) fn completed() -> Tape {
    let mut pair = Pair::new("testbed", (SOURCE, DESTINATION));
    precopy(&mut pair, 7);
    pair.tape.cost();
    pair.tape
}

/// There and back again: the destination of the first migration is the source of the second.
pub(crate) fn back_and_forth() -> Tape {
    let mut pair = Pair::new("testbed", (SOURCE, DESTINATION));
    precopy(&mut pair, 7);
    pair.tape.pass_us(50_000);
    pair.source = pair.destination;
    pair.destination = Side::new(&mut pair.tape, 900);
    precopy(&mut pair, 8);
    pair.tape
}

/// The connection is refused: the guest never stops.
pub(crate) fn refused() -> Tape {
    let mut pair = Pair::new("testbed", (SOURCE, DESTINATION));
    let Side { qmp, migration, .. } = pair.source;
    pair.tape
        .span(qmp, "qmp_command", &[S("migrate")], &[I(OK)], |tape| {
            tape.pass_us(40);
        });
    pair.tape.span(
        migration,
        "migrate",
        &[U(9), S(URI), S("normal")],
        &[S("failed"), I(-111)],
        |tape| {
            tape.pass_us(5);
            tape.span(
                migration,
                "migration_connect",
                &[S(URI)],
                &[I(-111)],
                |tape| {
                    tape.pass_us(210);
                },
            );
        },
    );
    pair.tape
}

/// The ITS cannot save its tables: the handlers all run, and the guest runs on at the source.
pub(crate) fn its_save_fails() -> Tape {
    let mut pair = Pair::new("testbed", (SOURCE, DESTINATION));
    let Side {
        migration, vcpus, ..
    } = pair.source;
    let incoming = pair.destination.migration;
    let tape = &mut pair.tape;
    tape.fire(migration, "migrate_begin", &[U(10), S(URI), S("normal")]);
    connect(tape, migration);
    tape.fire(incoming, "migrate_incoming_begin", &[S(URI)]);
    tape.pass_us(60);
    tape.fire(migration, "migration_thread_begin", &[U(10)]);
    round(tape, migration, 1, 1_000);
    let exits = stop(tape, &pair.source, EFAULT);
    tape.pass_us(20);
    tape.span(migration, "vm_start", &[S("running")], &[I(OK)], |tape| {
        notify(
            tape,
            migration,
            true,
            &[("gic", OK), ("its", OK)],
            |_, _| {},
        );
        tape.pass_us(8);
    });
    for (index, vcpu) in (0..).zip(vcpus) {
        tape.fire(vcpu, "vcpu_first_run", &[U(index)]);
        tape.pass_us(3);
        tape.gap(vcpu, index as u32, exits[index as usize], tape.now_ns());
    }
    tape.fire(migration, "migration_thread_end", &[I(EFAULT)]);
    tape.fire(migration, "migrate_end", &[S("failed"), I(EFAULT)]);
    tape.pass_us(100);
    tape.fire(
        incoming,
        "migrate_incoming_end",
        &[U(10), S("failed"), I(-104)],
    );
    pair.tape
}

/// `completed`, but one end probe was lost, the begins of another as well, and the recorder said
/// that from the stop on there was no room. And two ioctls of one thread overlap, as they cannot.
pub(crate) fn lossy() -> Tape {
    let mut tape = completed();
    let qmp = Task {
        pid: SOURCE,
        tid: SOURCE,
    };
    tape.set_attr(qmp, GIC, (1, 0), OK, |tape| {
        tape.pass_us(10);
    });
    tape.function(qmp, "vgic_v3_attr_regs_access", 5, &[]);
    tape.overlap_us(8);
    tape.lose(tape.time_of(SOURCE, "migration_stop_vm_begin"), 3);
    tape.without(SOURCE, "drain_end")
        .without(DESTINATION, "ram_load_begin")
}

/// `completed`, recorded on two hosts whose clocks are five seconds apart.
pub(crate) fn two_hosts() -> [Tape; 2] {
    let tape = completed();
    [
        tape.only(SOURCE),
        tape.on_host("other", DESTINATION, 5_000_000_000),
    ]
}

fn precopy(pair: &mut Pair, id: u64) {
    let (source, destination) = (&pair.source, &mut pair.destination);
    let (migration, incoming) = (source.migration, destination.migration);
    let tape = &mut pair.tape;
    let begun = tape.now_ns();

    tape.fire(source.qmp, "qmp_command_begin", &[S("migrate")]);
    tape.pass_us(15);
    tape.fire(migration, "migrate_begin", &[U(id), S(URI), S("normal")]);
    tape.pass_us(5);
    tape.fire(source.qmp, "qmp_command_end", &[I(OK)]);
    connect(tape, migration);
    tape.fire(incoming, "migrate_incoming_begin", &[S(URI)]);
    clock_sample(tape, migration, begun);
    tape.fire(migration, "migration_thread_begin", &[U(id)]);
    for (number, pages) in [(1, 32_768), (2, 900), (3, 300), (4, 260), (5, 257)] {
        round(tape, migration, number, pages);
        tape.span(
            incoming,
            "ram_load",
            &[U(number)],
            &[U(pages), U(pages * 4_096), I(OK)],
            |tape| {
                tape.pass_us(pages / 4);
            },
        );
    }
    // A client that polls is not a part of the migration.
    tape.span(
        source.qmp,
        "qmp_command",
        &[S("query-migrate")],
        &[I(OK)],
        |tape| {
            tape.pass_us(30);
        },
    );

    let last_exits = stop(tape, source, OK);
    tape.pass_us(4);
    tape.fire(incoming, "ram_load_begin", &[U(6)]);
    tape.span(
        migration,
        "ram_final",
        &[],
        &[U(270), U(270 * 4_096), I(OK)],
        |tape| {
            tape.vm_ioctl(migration, KVM_GET_DIRTY_LOG, 20).pass_us(380);
        },
    );
    tape.pass_us(90)
        .fire(incoming, "ram_load_end", &[U(270), U(270 * 4_096), I(OK)]);
    for (name, bytes, us) in DEVICES {
        tape.span(
            migration,
            "device_save",
            &[S(name)],
            &[U(bytes), I(OK)],
            |tape| {
                tape.pass_us(us);
            },
        );
        tape.pass_ns(700);
    }
    tape.fire(migration, "switchover_begin", &[U(id)]);
    tape.fire(migration, "channel_send", &[S("state"), U(3)]);
    tape.pass_us(24)
        .fire(incoming, "channel_recv", &[S("state"), U(3)]);
    load(tape, incoming);
    tape.span(incoming, "switchover", &[U(id)], &[I(OK)], |tape| {
        message(tape, "loaded", 1, (incoming, migration));
        tape.pass_us(6);
        message(tape, "commit", 4, (migration, incoming));
    });
    start(tape, destination);
    for (index, (vcpu, first)) in (0..).zip(destination.vcpus.into_iter().zip([true, false])) {
        tape.pass_us(2);
        tape.fire(vcpu, "vcpu_first_run", &[U(index)]);
        tape.pass_us(1);
        tape.edges(vcpu, index as u32, tape.now_ns(), tape.now_ns() + 10_000, 0);
        destination.first_runs[index as usize] = tape.now_ns();
        if first {
            tape.fire(incoming, "vm_start_end", &[I(OK)]);
            message(tape, "running", 2, (incoming, migration));
        }
    }
    let firsts = source.vcpus.into_iter().zip(source.first_runs);
    for (index, ((vcpu, first), exit)) in (0..).zip(firsts.zip(last_exits)) {
        tape.edges(vcpu, index, first, exit - 5_000, exit);
    }
    for side in [source.migration, incoming] {
        tape.fire(side, "its_mapped", &[U(0), U(256), U(4_096)]);
    }
    tape.fire(
        incoming,
        "migrate_incoming_end",
        &[U(id), S("completed"), I(OK)],
    );
    tape.fire(migration, "downtime_end", &[U(id), U(9_999_000)]);
    tape.fire(migration, "switchover_end", &[I(OK)]);
    tape.fire(migration, "migration_thread_end", &[I(OK)]);
    tape.fire(migration, "migrate_end", &[S("completed"), I(OK)]);
}
