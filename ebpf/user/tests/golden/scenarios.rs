//! Migrations as the monitor's probes and the kernel tell them, one function each.
//!
//! They follow the stop path of `vmm/ARCHITECTURE.md`; durations are made up, but of the size that
//! the arm64 testbed shows.

use blackout::recording::FdKind;

use crate::tape::Arg::{I, S, U};
use crate::tape::{START_NS, Tape, Task};

const OK: i64 = 0;
const EFAULT: i64 = -14;
const URI: &str = "tcp:127.0.0.1:4444";
const ITS: (i32, FdKind) = (12, FdKind::Its);
const GIC: (i32, FdKind) = (11, FdKind::Gic);
const KVM_GET_DIRTY_LOG: u32 = 0x4010_ae42;

/// The pids of [`Pair::new`].
pub const SOURCE: u32 = 700;
pub const DESTINATION: u32 = 800;

/// A source and a destination of two vCPUs each, on one tape.
pub struct Pair {
    pub tape: Tape,
    source: Side,
    destination: Side,
}

/// The threads of one monitor.
struct Side {
    qmp: Task,
    migration: Task,
    vcpus: [Task; 2],
    first_runs: [u64; 2],
}

impl Side {
    fn new(tape: &mut Tape, pid: u32) -> Self {
        let names = ["blackout-vmm", "migration", "vcpu0", "vcpu1"];
        match tape.process(pid, &names)[..] {
            [qmp, migration, vcpu0, vcpu1] => Self {
                qmp,
                migration,
                vcpus: [vcpu0, vcpu1],
                first_runs: [START_NS - 1_000_000; 2],
            },
            _ => unreachable!("four threads were named"),
        }
    }
}

impl Pair {
    pub fn new(hostname: &str, pids: (u32, u32)) -> Self {
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
pub fn completed() -> Tape {
    let mut pair = Pair::new("testbed", (SOURCE, DESTINATION));
    precopy(&mut pair, 7);
    pair.tape.cost();
    pair.tape
}

/// There and back again: the destination of the first migration is the source of the second.
pub fn back_and_forth() -> Tape {
    let mut pair = Pair::new("testbed", (SOURCE, DESTINATION));
    precopy(&mut pair, 7);
    pair.tape.pass_us(50_000);
    pair.source = pair.destination;
    pair.destination = Side::new(&mut pair.tape, 900);
    precopy(&mut pair, 8);
    pair.tape
}

/// The connection is refused: the guest never stops.
pub fn refused() -> Tape {
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
pub fn its_save_fails() -> Tape {
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

/// `completed`, but one end probe was lost, one begin as well, and the recorder said so.
pub fn lossy() -> Tape {
    let mut tape = completed();
    tape.lose(3);
    tape.without(SOURCE, "drain_end")
        .without(DESTINATION, "ram_load_begin")
}

/// `completed`, recorded on two hosts whose clocks are five seconds apart.
pub fn two_hosts() -> [Tape; 2] {
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
    for index in 0..2 {
        let (vcpu, first, exit) = (
            source.vcpus[index],
            source.first_runs[index],
            last_exits[index],
        );
        tape.edges(vcpu, index as u32, first, exit - 5_000, exit);
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

const DEVICES: [(&str, u64, u64); 5] = [
    ("vcpu0", 2_210, 210),
    ("vcpu1", 2_210, 190),
    ("gic", 5_136, 640),
    ("its", 112, 31),
    ("serial", 40, 2),
];

fn connect(tape: &mut Tape, migration: Task) {
    tape.span(
        migration,
        "migration_connect",
        &[S(URI)],
        &[I(OK)],
        |tape| {
            tape.pass_us(180);
        },
    );
}

/// One exchange of clocks with a destination whose clock shows five seconds more.
fn clock_sample(tape: &mut Tape, migration: Task, begun_ns: u64) {
    let ahead = 5_000_000_000;
    let (t1, t2, t3, t4) = (
        begun_ns,
        begun_ns + 11_000 + ahead,
        begun_ns + 12_000 + ahead,
        begun_ns + 21_000,
    );
    tape.fire(migration, "clock_sample", &[U(t1), U(t2), U(t3), U(t4)]);
}

fn round(tape: &mut Tape, migration: Task, number: u64, pages: u64) {
    tape.span(
        migration,
        "ram_round",
        &[U(number)],
        &[U(pages), U(pages * 4_096), I(OK)],
        |tape| {
            tape.vm_ioctl(migration, KVM_GET_DIRTY_LOG, 25)
                .pass_us(pages);
        },
    );
    tape.pass_us(10);
}

/// Hops 3 to 7b. Returns when each vCPU left guest code.
fn stop(tape: &mut Tape, side: &Side, its_rc: i64) -> [u64; 2] {
    let task = side.migration;
    let mut exits = [0; 2];
    let state = || [S("finish-migrate")];
    tape.span(task, "migration_stop_vm", &state(), &[I(its_rc)], |tape| {
        tape.fire(task, "downtime_start", &[U(7)]).pass_us(1);
        tape.span(
            task,
            "vm_stop",
            &[S("finish-migrate"), U(0)],
            &[I(its_rc)],
            |tape| {
                tape.span(task, "do_vm_stop", &state(), &[I(its_rc)], |tape| {
                    tape.pass_us(1);
                    exits = pause(tape, side);
                    tape.pass_us(1);
                    let handlers = [("its", its_rc), ("gic", OK), ("timer", OK)];
                    notify(tape, task, false, &handlers, |tape, name| match name {
                        "its" => its_save(tape, task, its_rc),
                        "gic" => pending_save(tape, task),
                        _ => {}
                    });
                    tape.span(task, "drain", &[], &[I(OK)], |tape| {
                        tape.pass_us(3);
                    });
                });
            },
        );
    });
    exits
}

fn pause(tape: &mut Tape, side: &Side) -> [u64; 2] {
    let mut exits = [0; 2];
    tape.span(
        side.migration,
        "pause_all_vcpus",
        &[U(2)],
        &[I(OK)],
        |tape| {
            for index in 0..2 {
                tape.pass_us(4)
                    .fire(side.migration, "vcpu_kicked", &[U(index)]);
            }
            for (index, (vcpu, exit)) in (0..).zip(side.vcpus.into_iter().zip(&mut exits)) {
                *exit = tape.pass_us(9).now_ns();
                tape.pass_us(2).fire(vcpu, "vcpu_paused", &[U(index)]);
            }
            tape.pass_us(3);
        },
    );
    exits
}

fn notify(
    tape: &mut Tape,
    task: Task,
    running: bool,
    handlers: &[(&'static str, i64)],
    mut body: impl FnMut(&mut Tape, &str),
) {
    let rc = handlers
        .iter()
        .map(|(_, rc)| *rc)
        .find(|rc| *rc < 0)
        .unwrap_or(OK);
    let begin = [
        U(running.into()),
        S("finish-migrate"),
        U(handlers.len() as u64),
    ];
    tape.span(task, "vm_state_notify", &begin, &[I(rc)], |tape| {
        for (index, (name, rc)) in (0..).zip(handlers) {
            let begin = [S(name), U(index), I(100 - index as i64), S("main")];
            tape.span(task, "vm_state_handler", &begin, &[I(*rc)], |tape| {
                tape.pass_us(1);
                body(tape, name);
            });
        }
    });
}

fn its_save(tape: &mut Tape, task: Task, rc: i64) {
    tape.span(task, "its_save_tables", &[U(0)], &[I(rc)], |tape| {
        device_access(tape, task, ITS, (4, 1), rc, |tape| {
            tape.pass_us(12);
            tape.function(
                task,
                "vgic_its_save_tables_v0",
                1_820,
                &[("vgic_its_check_id", 256)],
            );
            tape.pass_us(2);
        });
    });
}

fn pending_save(tape: &mut Tape, task: Task) {
    tape.span(task, "gic_save_pending_tables", &[], &[I(OK)], |tape| {
        device_access(tape, task, GIC, (4, 3), OK, |tape| {
            tape.pass_us(640);
        });
    });
}

fn device_access(
    tape: &mut Tape,
    task: Task,
    device: (i32, FdKind),
    (group, attr): (u32, u64),
    rc: i64,
    inside: impl FnOnce(&mut Tape),
) {
    let begin = [U(device.0 as u64), U(group.into()), U(attr), U(1)];
    tape.span(task, "kvm_device_access", &begin, &[I(rc)], |tape| {
        tape.pass_ns(450);
        tape.set_attr(task, device, (group, attr), rc, inside);
        tape.pass_ns(300);
    });
}

/// The destination puts the state into its devices.
fn load(tape: &mut Tape, task: Task) {
    for (name, bytes, us) in DEVICES {
        tape.span(
            task,
            "device_load",
            &[S(name)],
            &[U(bytes), I(OK)],
            |tape| {
                tape.pass_us(us);
                match name {
                    "gic" => {
                        tape.span(task, "gic_restore_pending_tables", &[], &[I(OK)], |tape| {
                            for vcpu in 0..2 {
                                tape.set_attr(task, GIC, (5, vcpu << 32), OK, |tape| {
                                    tape.pass_us(45);
                                });
                                tape.pass_ns(200);
                            }
                        });
                    }
                    "its" => {
                        tape.span(task, "its_restore_tables", &[U(0)], &[I(OK)], |tape| {
                            device_access(tape, task, ITS, (4, 2), OK, |tape| {
                                tape.pass_us(3_950);
                            });
                        });
                    }
                    _ => {}
                }
            },
        );
        tape.pass_ns(600);
    }
}

fn start(tape: &mut Tape, side: &Side) {
    let task = side.migration;
    tape.pass_us(2)
        .fire(task, "vm_start_begin", &[S("running")]);
    notify(
        tape,
        task,
        true,
        &[("timer", OK), ("gic", OK), ("its", OK)],
        |_, _| {},
    );
}

fn message(tape: &mut Tape, kind: &'static str, seq: u64, (from, to): (Task, Task)) {
    tape.fire(from, "channel_send", &[S(kind), U(seq)]);
    tape.pass_us(17)
        .fire(to, "channel_recv", &[S(kind), U(seq)]);
}
