//! The steps of a migration, as the monitor's probes and the kernel tell them. They follow
//! `vmm/ARCHITECTURE.md`.

use blackout::recording::FdKind;

use crate::tape::Arg::{I, S, U};
use crate::tape::{START_NS, Tape, Task};

pub(crate) const OK: i64 = 0;
pub(crate) const EFAULT: i64 = -14;
pub(crate) const URI: &str = "tcp:127.0.0.1:4444";
pub(crate) const ITS: (i32, FdKind) = (12, FdKind::Its);
pub(crate) const GIC: (i32, FdKind) = (11, FdKind::Gic);
pub(crate) const KVM_GET_DIRTY_LOG: u32 = 0x4010_ae42;

/// The threads of one monitor.
pub(crate) struct Side {
    pub(crate) qmp: Task,
    pub(crate) migration: Task,
    pub(crate) vcpus: [Task; 2],
    pub(crate) first_runs: [u64; 2],
}

impl Side {
    pub(crate) fn new(tape: &mut Tape, pid: u32) -> Self {
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

pub(crate) const DEVICES: [(&str, u64, u64); 5] = [
    ("vcpu0", 2_210, 210),
    ("vcpu1", 2_210, 190),
    ("gic", 5_136, 640),
    ("its", 112, 31),
    ("serial", 40, 2),
];

pub(crate) fn connect(tape: &mut Tape, migration: Task) {
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
pub(crate) fn clock_sample(tape: &mut Tape, migration: Task, begun_ns: u64) {
    let ahead = 5_000_000_000;
    let (t1, t2, t3, t4) = (
        begun_ns,
        begun_ns + 11_000 + ahead,
        begun_ns + 12_000 + ahead,
        begun_ns + 21_000,
    );
    tape.fire(migration, "clock_sample", &[U(t1), U(t2), U(t3), U(t4)]);
}

pub(crate) fn round(tape: &mut Tape, migration: Task, number: u64, pages: u64) {
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
pub(crate) fn stop(tape: &mut Tape, side: &Side, its_rc: i64) -> [u64; 2] {
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

pub(crate) fn pause(tape: &mut Tape, side: &Side) -> [u64; 2] {
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

pub(crate) fn notify(
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

pub(crate) fn its_save(tape: &mut Tape, task: Task, rc: i64) {
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

pub(crate) fn pending_save(tape: &mut Tape, task: Task) {
    tape.span(task, "gic_save_pending_tables", &[], &[I(OK)], |tape| {
        device_access(tape, task, GIC, (4, 3), OK, |tape| {
            tape.pass_us(640);
        });
    });
}

pub(crate) fn device_access(
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
pub(crate) fn load(tape: &mut Tape, task: Task) {
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

pub(crate) fn start(tape: &mut Tape, side: &Side) {
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

pub(crate) fn message(tape: &mut Tape, kind: &'static str, seq: u64, (from, to): (Task, Task)) {
    tape.fire(from, "channel_send", &[S(kind), U(seq)]);
    tape.pass_us(17)
        .fire(to, "channel_recv", &[S(kind), U(seq)]);
}
