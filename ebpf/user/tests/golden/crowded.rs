//! Recordings that nobody makes but to have them looked at for ever: their size is what it takes.

use std::io;
use std::time::{Duration, Instant};

use blackout::analysis;
use blackout::export::{chrome, folded};
use blackout::recording::FdKind;
use blackout::report::schema::Report;
use blackout::report::text;

use crate::report::load;
use crate::tape::{Arg, Tape, Task};

/// So many of what there is one of.
const MANY: u64 = 100_000;

/// More than enough for one look at each in a debug build on a busy machine, and far too little for a
/// look from each at each.
const LIMIT: Duration = Duration::from_secs(60);

/// How many migrations are found in it; everything is made of it in time.
fn migrations(tape: &Tape) -> usize {
    let bytes = tape.bytes();
    let start = Instant::now();
    let recordings = [load("crowded", &bytes)];
    let migrations = analysis::find(&recordings);
    let report = Report::new(&migrations);
    text::write(&mut io::sink(), &recordings, &migrations).unwrap();
    chrome::write(&mut io::sink(), &recordings, &migrations).unwrap();
    folded::write(&mut io::sink(), &migrations).unwrap();
    let took = start.elapsed();
    println!("{} migrations, {took:?}", migrations.len());
    assert!(took < LIMIT, "it took {took:?}");
    report.migrations.len()
}

fn begun() -> Tape {
    let mut tape = Tape::new("testbed");
    tape.knows(&["migrate_begin", "migrate_end", "migration_stop_vm_begin"]);
    tape.knows(&["its_save_tables_begin", "its_mapped", "vcpu_kicked"]);
    tape
}

fn begin(tape: &mut Tape, task: Task, id: u64) {
    let args = [Arg::U(id), Arg::S("unix:/m"), Arg::S("normal")];
    tape.pass_us(1).fire(task, "migrate_begin", &args);
}

fn end(tape: &mut Tape, task: Task) {
    let args = [Arg::S("completed"), Arg::I(0)];
    tape.pass_us(1).fire(task, "migrate_end", &args);
}

fn task(thread: u32) -> Task {
    let tid = 10 + thread;
    Task { pid: 9, tid }
}

#[test]
fn migrations_in_migrations() {
    let mut tape = begun();
    for id in 0..MANY {
        begin(&mut tape, task(0), 1 + id);
    }
    for _ in 0..MANY {
        end(&mut tape, task(0));
    }
    assert!(migrations(&tape) > 0);
}

#[test]
fn migrations_on_many_threads_at_once() {
    let mut tape = begun();
    for thread in 0..500 {
        begin(&mut tape, task(thread), 7);
    }
    for _ in 0..MANY {
        tape.vm_ioctl(task(0), 0x4010_ae42, 1);
        tape.fire(task(1), "vcpu_kicked", &[Arg::U(0)]);
    }
    for thread in 0..500 {
        end(&mut tape, task(thread));
    }
    assert_eq!(migrations(&tape), 500);
}

#[test]
fn migrations_one_after_the_other_in_one_command() {
    let mut tape = begun();
    tape.fire(task(1), "qmp_command_begin", &[Arg::S("migrate")]);
    for id in 0..10_000 {
        begin(&mut tape, task(0), id % 3);
        tape.pass_us(1)
            .fire(task(0), "migration_stop_vm_begin", &[Arg::S("x")])
            .vm_ioctl(task(2), 0x4010_ae42, 1);
        end(&mut tape, task(0));
    }
    assert_eq!(migrations(&tape), 10_000);
}

#[test]
fn saves_without_end_and_what_the_kernel_did_for_them() {
    let mut tape = begun();
    begin(&mut tape, task(0), 7);
    tape.fire(task(0), "migration_stop_vm_begin", &[Arg::S("x")]);
    for its in 0..MANY / 4 {
        tape.pass_us(1)
            .fire(task(0), "its_save_tables_begin", &[Arg::U(its)])
            .fire(task(0), "its_mapped", &[Arg::U(its), Arg::U(1), Arg::U(1)]);
        let pass = |tape: &mut Tape| {
            tape.pass_us(2);
        };
        tape.set_attr(task(0), (5, FdKind::Its), (4, 1), 0, pass);
    }
    end(&mut tape, task(0));
    assert_eq!(migrations(&tape), 1);
}

#[test]
fn spans_that_say_they_took_all_the_time_there_is() {
    let mut tape = begun();
    for index in 0..MANY / 2 {
        let name = if index % 2 == 0 {
            "vmstate_downtime_save"
        } else {
            "vmstate_downtime_load"
        };
        let args = [Arg::S("x"), Arg::S("y"), Arg::U(0), Arg::I(i64::MAX)];
        tape.pass_us(1).foreign(task(0), name, &args);
    }
    assert_eq!(migrations(&tape), 0);
}
