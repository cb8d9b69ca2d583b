//! The Chrome trace, byte by byte and as Perfetto reads it.

use std::fs;

use blackout::analysis::{self, Loaded};
use blackout::export::chrome;
use blackout::recording::Reader;
use serde_json::{Value, json};

use crate::tape::{Arg, Tape};
use crate::{TESTBED, check, perfetto, scenarios, silent};

pub(crate) const ERRORS: &str =
    "select name, value from stats where severity = 'error' and value > 0";

fn trace(tapes: &[Tape]) -> Vec<u8> {
    let files: Vec<_> = tapes.iter().map(Tape::bytes).collect();
    trace_of(&files.iter().map(Vec::as_slice).collect::<Vec<_>>())
}

fn trace_of(files: &[&[u8]]) -> Vec<u8> {
    let name = || "blackout.rec".to_owned();
    let load = |bytes: &&[u8]| {
        Loaded::read(name(), Reader::new(name(), *bytes).unwrap())
            .unwrap()
            .remove(0)
    };
    let recordings: Vec<_> = files.iter().map(load).collect();
    let mut trace = Vec::new();
    chrome::write(&mut trace, &recordings, &analysis::find(&recordings)).unwrap();
    serde_json::from_slice::<Value>(&trace).expect("a trace is JSON");
    trace
}

/// The trace of what is in a file, as the program reads it.
fn trace_of_file(tape: &Tape) -> Vec<u8> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("recording");
    fs::write(&path, tape.bytes()).unwrap();
    let mut recordings = Loaded::read_migrations(&path).unwrap();
    for recording in &mut recordings {
        recording.name = "blackout.rec".to_owned();
    }
    let mut trace = Vec::new();
    chrome::write(&mut trace, &recordings, &analysis::find(&recordings)).unwrap();
    trace
}

/// Perfetto's rows, or `None` with a line that `cargo xtask test` counts.
pub(crate) fn rows(trace: &[u8], statements: &[&str]) -> Option<Vec<Vec<Value>>> {
    match perfetto::query(trace, statements) {
        Ok(rows) => Some(rows),
        Err(why) => {
            let test = std::thread::current().name().unwrap_or("?").to_owned();
            println!("SKIP: {test}: {why}");
            None
        }
    }
}

#[test]
fn the_trace_of_a_completed_migration() {
    check("completed.trace.json", &trace(&[scenarios::completed()]));
}

#[test]
fn the_trace_of_two_hosts() {
    check("two_hosts.trace.json", &trace(&scenarios::two_hosts()));
}

#[test]
fn the_trace_of_a_lossy_recording() {
    check("lossy.trace.json", &trace(&[scenarios::lossy()]));
}

#[test]
fn a_file_makes_the_same_trace_as_a_recording_that_is_held() {
    let tapes = [
        scenarios::completed(),
        scenarios::back_and_forth(),
        scenarios::its_save_fails(),
        scenarios::lossy(),
        silent::migration(600),
        Tape::new("testbed"),
    ];
    for tape in tapes {
        let (file, held) = (trace_of_file(&tape), trace(&[tape]));
        assert_eq!(String::from_utf8(file), String::from_utf8(held));
    }
}

/// More than is held at once, in a span that is open all the time and a stay in KVM_RUN between.
fn long() -> Tape {
    let mut tape = Tape::new("testbed");
    let tasks = tape.process(700, &["blackout-vmm", "migration", "vcpu 0"]);
    let [main, thread, vcpu] = tasks[..] else {
        panic!("not three")
    };
    let first_ns = tape.now_ns();
    tape.fire(thread, "qmp_command_begin", &[Arg::S("migrate")]);
    for round in 0..50_000 {
        tape.pass_us(1)
            .fire(thread, "ram_round_begin", &[Arg::U(round)])
            .vm_ioctl(thread, 0x4010_ae42, 3)
            .pass_us(1);
        let said = [Arg::U(1), Arg::U(4096), Arg::I(0)];
        tape.fire(thread, "ram_round_end", &said)
            .fire(main, "vcpu_kicked", &[Arg::U(0)]);
        if round % 1_000 == 999 {
            let now_ns = tape.now_ns();
            tape.gap(vcpu, 0, now_ns - 20_000, now_ns - 500);
        }
    }
    tape.pass_us(1)
        .fire(thread, "qmp_command_end", &[Arg::I(0)]);
    tape.edges(vcpu, 0, first_ns, first_ns, tape.now_ns());
    tape
}

#[test]
fn a_long_file_makes_the_same_trace_in_another_order() {
    let tape = long();
    let (file, held) = (trace_of_file(&tape), trace(&[tape]));
    let lines = |trace: &[u8]| {
        let text = std::str::from_utf8(trace).unwrap();
        let lines = text.lines().map(|line| line.trim_end_matches(','));
        let mut lines: Vec<_> = lines.map(str::to_owned).collect();
        lines.sort_unstable();
        lines
    };
    assert_ne!(file, held, "it was held all at once");
    let (file_lines, held_lines) = (lines(&file), lines(&held));
    for (file, held) in file_lines.iter().zip(&held_lines) {
        assert_eq!(file, held);
    }
    assert_eq!(file_lines.len(), held_lines.len());
    let questions = [
        ERRORS,
        "select name, depth, count(*) as n, sum(dur) as dur from slice group by 1, 2 order by 1",
        "select count(*) as n from flow",
    ];
    let (Some(file), Some(held)) = (rows(&file, &questions), rows(&held, &questions)) else {
        return;
    };
    assert_eq!(file, held);
    assert_eq!(file[0], [Value::Null; 0]);
}

#[test]
fn perfetto_finds_no_error_in_any_trace() {
    let of_tapes = [
        &[scenarios::completed()][..],
        &[scenarios::back_and_forth()],
        &[scenarios::its_save_fails()],
        &[scenarios::lossy()],
        &scenarios::two_hosts(),
        &[Tape::new("testbed")],
    ]
    .map(trace);
    for trace in of_tapes.iter().chain(&[trace_of(&[TESTBED])]) {
        let Some(rows) = rows(trace, &[ERRORS]) else {
            return;
        };
        assert_eq!(rows, [[Value::Null; 0]]);
    }
}

#[test]
fn perfetto_would_find_one() {
    // Two slices of one row that overlap in part: what the exporter must never write.
    let slice = |ts, dur| json!({"ph": "X", "name": "x", "pid": 1, "tid": 1, "ts": ts, "dur": dur});
    let trace = json!({"traceEvents": [slice(1, 10), slice(5, 10)]}).to_string();
    let Some(rows) = rows(trace.as_bytes(), &[ERRORS]) else {
        return;
    };
    assert_ne!(rows, [[Value::Null; 0]]);
}

#[test]
fn perfetto_sees_every_slice_and_arrow() {
    let trace = trace(&[scenarios::completed()]);
    let written: Value = serde_json::from_slice(&trace).unwrap();
    let count = |phase: &str| {
        let events = written["traceEvents"].as_array().unwrap();
        events.iter().filter(|event| event["ph"] == phase).count()
    };
    let Some(rows) = rows(
        &trace,
        &[
            "select count(*) as n from slice",
            "select count(*) as n from flow",
            "select dur from slice where name = 'downtime'",
            // The kernel's view of the save is the head of an arrow from the monitor's.
            "select k.name as kernel, v.name as vmm, k.ts - v.ts as late \
             from flow join slice k on k.id = flow.slice_in join slice v on v.id = flow.slice_out \
             where k.name glob '*ITS_SAVE_TABLES'",
            // The commit leads from the source's process to the destination's.
            "select po.pid as pid_out, pi.pid as pid_in from flow \
             join slice o on o.id = flow.slice_out join thread_track ot on ot.id = o.track_id \
             join thread th on th.utid = ot.utid join process po on po.upid = th.upid \
             join slice i on i.id = flow.slice_in join thread_track it on it.id = i.track_id \
             join thread ti on ti.utid = it.utid join process pi on pi.upid = ti.upid \
             where po.pid <> pi.pid order by flow.id",
            "select t.name as name from thread t where t.name glob 'migration*' order by t.tid",
        ],
    ) else {
        return;
    };
    assert_eq!(
        rows[0],
        [json!({"n": count("X") + count("i") + count("b")})]
    );
    assert_eq!(rows[1], [json!({"n": count("s")})]);
    assert_eq!(rows[2], [json!({"dur": 9_277_150})]);
    let save = json!({"kernel": "KVM_SET_DEVICE_ATTR ITS_SAVE_TABLES", "vmm": "kvm_device_access", "late": 450});
    assert_eq!(rows[3], [save]);
    let (there, back) = (
        json!({"pid_out": 700, "pid_in": 800}),
        json!({"pid_out": 800, "pid_in": 700}),
    );
    assert_eq!(rows[4], [there.clone(), back.clone(), there, back]);
    let named: Vec<_> = rows[5]
        .iter()
        .map(|row| row["name"].as_str().unwrap())
        .collect();
    assert_eq!(
        named,
        [
            "migration",
            "migration",
            "migration: kernel",
            "migration: kernel"
        ]
    );
}
