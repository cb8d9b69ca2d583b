//! The other formats, as their own readers have them.

use std::collections::HashMap;

use blackout::analysis::{self, Loaded, Migration};
use blackout::export::{csv, folded, perfetto, speedscope};
use blackout::recording::Reader;
use blackout::report::schema::Report;
use serde_json::{Value, json};

use crate::chrome::{ERRORS, rows};
use crate::tape::Tape;
use crate::{TESTBED, check, scenarios};

fn load(bytes: &[u8]) -> Loaded {
    let name = || "blackout.rec".to_owned();
    Loaded::read(name(), Reader::new(name(), bytes).unwrap())
        .unwrap()
        .remove(0)
}

fn with<T>(tapes: &[Tape], use_it: impl FnOnce(&[Loaded], &[Migration<'_>]) -> T) -> T {
    let recordings: Vec<_> = tapes.iter().map(|tape| load(&tape.bytes())).collect();
    let migrations = analysis::find(&recordings);
    use_it(&recordings, &migrations)
}

fn native(recordings: &[Loaded]) -> Vec<u8> {
    let mut trace = Vec::new();
    perfetto::write(&mut trace, recordings, &analysis::find(recordings)).unwrap();
    trace
}

/// The same trace in both formats, so Perfetto has to see the same in both.
#[test]
fn perfetto_reads_its_own_format_as_it_reads_chromes() {
    const QUESTIONS: [&str; 5] = [
        ERRORS,
        "select count(*) as n from slice",
        // Depth differs only by the rows on which phases lie.
        "select name, dur, min(ts) - (select min(ts) from slice) as at, count(*) as n from slice \
         group by name, dur order by name, dur",
        "select o.name as tail, i.name as head, count(*) as n from flow \
         join slice o on o.id = flow.slice_out join slice i on i.id = flow.slice_in \
         group by tail, head order by tail, head",
        "select p.pid as pid, p.name as process, t.tid as tid, t.name as thread \
         from thread t join process p using (upid) where t.tid <> p.pid \
         order by pid, tid",
    ];
    let scenarios: [&[Tape]; 4] = [
        &[scenarios::completed()],
        &[scenarios::back_and_forth()],
        &[scenarios::lossy()],
        &scenarios::two_hosts(),
    ];
    let traces: Vec<_> = scenarios
        .into_iter()
        .map(|tapes| {
            with(tapes, |recordings, _| {
                (native(recordings), chrome(recordings))
            })
        })
        .collect();
    for (native, chrome) in traces {
        let (Some(native), Some(chrome)) = (rows(&native, &QUESTIONS), rows(&chrome, &QUESTIONS))
        else {
            return;
        };
        assert_eq!(native[0], [Value::Null; 0]);
        for (index, question) in QUESTIONS.iter().enumerate() {
            assert_eq!(native[index], chrome[index], "{question}");
        }
    }
}

fn chrome(recordings: &[Loaded]) -> Vec<u8> {
    let mut trace = Vec::new();
    let migrations = analysis::find(recordings);
    blackout::export::chrome::write(&mut trace, recordings, &migrations).unwrap();
    trace
}

/// Of a long trace in Chrome's format, whose times are decimal fractions, Perfetto loses arrows.
#[test]
fn perfetto_sees_every_arrow_of_a_real_migration() {
    let testbed = [load(TESTBED)];
    let written: Value = serde_json::from_slice(&chrome(&testbed)).unwrap();
    let events = written["traceEvents"].as_array().unwrap();
    let arrows = events.iter().filter(|event| event["ph"] == "s").count();
    let question = "select count(*) as n from flow";
    let Some(rows) = rows(&native(&testbed), &[ERRORS, question]) else {
        return;
    };
    assert_eq!(rows, [vec![], vec![json!({"n": arrows})]]);
}

#[test]
fn perfetto_knows_the_arguments() {
    let trace = with(&[scenarios::completed()], |recordings, _| {
        native(recordings)
    });
    let question = "select a.key as key, a.display_value as value from slice s \
                    join args a using (arg_set_id) \
                    where s.name = 'ram_final' and a.key glob 'debug.*' order by key";
    let Some(rows) = rows(&trace, &[question]) else {
        return;
    };
    let arg = |key: &str, value: &str| json!({"key": format!("debug.{key}"), "value": value});
    assert_eq!(
        rows[0],
        [arg("bytes", "1105920"), arg("pages", "270"), arg("rc", "0")]
    );
}

#[test]
fn folded_stacks_add_up() {
    let text = with(&[scenarios::completed()], |_, migrations| {
        let mut out = Vec::new();
        folded::write(&mut out, migrations).unwrap();
        String::from_utf8(out).unwrap()
    });
    check("completed.folded", text.as_bytes());
    // A span's stacks add up to the span's part of the downtime.
    let sum = |frame: &str| -> u64 {
        let inside = text.lines().filter(|line| line.contains(frame));
        inside
            .map(|line| line.rsplit_once(' ').unwrap().1.parse::<u64>().unwrap())
            .sum()
    };
    let report = with(&[scenarios::completed()], |_, migrations| {
        Report::new(migrations)
    });
    let spans: HashMap<_, _> = report.migrations[0]
        .spans
        .iter()
        .map(|span| (span.name.as_str(), span.duration_ns))
        .collect();
    assert_eq!(sum(";migration_stop_vm"), spans["migration_stop_vm"]);
    assert_eq!(sum(";its_save_tables its=0"), spans["its_save_tables"]);
}

#[test]
fn the_flame_graph_is_drawn() {
    let svg = with(&[scenarios::completed()], |_, migrations| {
        let mut out = Vec::new();
        folded::flamegraph(&mut out, migrations).unwrap();
        String::from_utf8(out).unwrap()
    });
    assert!(svg.contains("<svg") && svg.trim_end().ends_with("</svg>"));
    assert!(svg.contains("ITS_SAVE_TABLES"), "{svg}");
    let empty = with(&[Tape::new("testbed")], |_, migrations| {
        folded::flamegraph(&mut Vec::new(), migrations)
    });
    assert!(empty.unwrap_err().to_string().contains("no migration"));
}

#[test]
fn the_table_has_every_span_and_ioctl() {
    let (table, report) = with(&[scenarios::completed()], |_, migrations| {
        let report = Report::new(migrations);
        let mut out = Vec::new();
        csv::write(&mut out, &report).unwrap();
        (String::from_utf8(out).unwrap(), report)
    });
    check("completed.csv", table.as_bytes());
    let migration = &report.migrations[0];
    let rows = migration.spans.len() + migration.ioctls.len() + migration.gaps.len();
    assert_eq!(table.lines().count(), rows + 1);
}

#[test]
fn speedscope_events_nest() {
    let file: Value = with(&[scenarios::back_and_forth()], |_, migrations| {
        let mut out = Vec::new();
        speedscope::write(&mut out, migrations).unwrap();
        serde_json::from_slice(&out).unwrap()
    });
    let frames = file["shared"]["frames"].as_array().unwrap().len() as u64;
    let profiles = file["profiles"].as_array().unwrap();
    assert!(profiles.len() >= 4);
    for profile in profiles {
        let mut open = Vec::new();
        let mut last = profile["startValue"].as_i64().unwrap();
        for event in profile["events"].as_array().unwrap() {
            let (frame, at) = (
                event["frame"].as_u64().unwrap(),
                event["at"].as_i64().unwrap(),
            );
            assert!(frame < frames && at >= last, "{event}");
            last = at;
            match event["type"].as_str().unwrap() {
                "O" => open.push(frame),
                _ => assert_eq!(open.pop(), Some(frame)),
            }
        }
        assert!(open.is_empty() && last <= profile["endValue"].as_i64().unwrap());
    }
}
