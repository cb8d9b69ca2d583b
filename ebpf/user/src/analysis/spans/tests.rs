//! Pairing, with everything that can be missing.

use super::*;
use crate::recording::{ArgDef, ValueKind};

fn event(ts_ns: u64, name: &str, rc: Option<i64>) -> Event {
    let args = rc.map(|_| ArgDef {
        name: "rc".into(),
        kind: ValueKind::I64,
    });
    let def = ProbeDef {
        id: 0,
        provider: "vmm".into(),
        name: name.into(),
        args: args.into_iter().collect(),
    };
    let values = rc.map(Value::I64).into_iter().collect();
    Event {
        ts_ns,
        meaning: Arc::new(Meaning::of(&def)),
        values,
    }
}

/// The spans as `name start..end depth rc`.
fn told(paired: &Paired) -> Vec<String> {
    let told = |span: &Span| {
        let rc = span
            .rc()
            .map_or_else(|| "-".to_owned(), |rc| rc.to_string());
        format!(
            "{} {}..{} {} {rc}",
            span.name(),
            span.start_ns,
            span.end_ns,
            span.depth
        )
    };
    paired.spans.iter().map(told).collect()
}

#[test]
fn spans_nest_in_any_order_of_arrival() {
    let paired = pair(vec![
        event(40, "vm_stop_end", Some(-5)),
        event(20, "do_vm_stop_begin", None),
        event(25, "vcpu_kicked", None),
        event(10, "vm_stop_begin", None),
        event(30, "do_vm_stop_end", Some(0)),
    ]);
    assert_eq!(
        told(&paired),
        ["vm_stop 10..40 0 -5", "do_vm_stop 20..30 1 0"]
    );
    assert_eq!(paired.points.len(), 1);
    assert!(paired.problems.is_empty());
    let leaves: Vec<_> = paired.spans.iter().map(|span| span.leaf).collect();
    assert_eq!(leaves, [false, true]);
}

#[test]
fn a_span_may_hold_one_of_its_own_name() {
    let paired = pair(vec![
        event(1, "vm_stop_begin", None),
        event(2, "vm_stop_begin", None),
        event(3, "vm_stop_end", Some(1)),
        event(4, "vm_stop_end", Some(2)),
    ]);
    assert_eq!(told(&paired), ["vm_stop 1..4 0 2", "vm_stop 2..3 1 1"]);
}

#[test]
fn a_lost_end_ends_with_its_parent() {
    let paired = pair(vec![
        event(10, "vm_stop_begin", None),
        event(20, "do_vm_stop_begin", None),
        event(21, "drain_begin", None),
        event(40, "vm_stop_end", Some(0)),
        event(50, "vm_start_begin", None),
        event(60, "vcpu_kicked", None),
    ]);
    let expected = [
        "vm_stop 10..40 0 0",
        "do_vm_stop 20..40 1 -",
        "drain 21..40 2 -",
        "vm_start 50..60 0 -",
    ];
    assert_eq!(told(&paired), expected);
    let unfinished = |name: &str, ts_ns| Problem::Unfinished {
        name: name.into(),
        ts_ns,
    };
    let expected = [
        unfinished("do_vm_stop", 20),
        unfinished("drain", 21),
        unfinished("vm_start", 50),
    ];
    assert_eq!(paired.problems, expected);
}

#[test]
fn a_lost_begin_leaves_the_others_alone() {
    let paired = pair(vec![
        event(10, "vm_stop_begin", None),
        event(15, "do_vm_stop_end", Some(0)),
        event(20, "vm_stop_end", Some(0)),
    ]);
    assert_eq!(told(&paired), ["vm_stop 10..20 0 0"]);
    let expected = [Problem::EndWithoutBegin {
        name: "do_vm_stop".into(),
        ts_ns: 15,
    }];
    assert_eq!(paired.problems, expected);
}

#[test]
fn foreign_probes_pair_by_their_names() {
    let meaning = |name: &str| {
        let provider = "qemu".to_owned();
        Meaning::of(&ProbeDef {
            id: 0,
            provider,
            name: name.into(),
            args: Vec::new(),
        })
    };
    assert_eq!(meaning("savevm_section_start").edge, Edge::Begin);
    assert_eq!(meaning("savevm_section_end").row, "savevm_section");
    assert_eq!(meaning("migrate_set_state").edge, Edge::Point);
    // A foreign probe with a name of ours is not ours.
    assert_eq!(
        (
            meaning("vm_stop_begin").hop,
            meaning("switchover_begin").nature
        ),
        (0, Nature::Work)
    );
}

/// A probe of QEMU's that the tool knows.
fn qemu(ts_ns: u64, name: &str, values: Vec<Value>) -> Event {
    let known = foreign::PROBES.iter().find(|probe| probe.name == name);
    let arg = |(name, _): &(&str, _)| ArgDef {
        name: (*name).to_owned(),
        kind: ValueKind::U64,
    };
    let def = ProbeDef {
        id: 0,
        provider: "qemu".into(),
        name: name.into(),
        args: known.unwrap().args.iter().map(arg).collect(),
    };
    Event {
        ts_ns,
        meaning: Arc::new(Meaning::of(&def)),
        values,
    }
}

fn saved(ts_ns: u64, us: i64) -> Event {
    let text = || Value::Str("x".into());
    let values = vec![text(), text(), Value::U64(0), Value::I64(us)];
    qemu(ts_ns, "vmstate_downtime_save", values)
}

fn checkpoint(ts_ns: u64, name: &str) -> Event {
    qemu(
        ts_ns,
        "vmstate_downtime_checkpoint",
        vec![Value::Str(name.into())],
    )
}

#[test]
fn what_is_told_at_its_end_goes_around_what_was_inside() {
    let paired = pair(vec![
        checkpoint(100_000, "src-downtime-start"),
        saved(120_000, 5),
        // Its clock was read 2 us after the begin of what is inside, or so it looks.
        event(130_000, "vm_stop_begin", None),
        event(135_000, "do_vm_stop_begin", None),
        event(140_000, "do_vm_stop_end", Some(0)),
        event(170_000, "vm_stop_end", Some(0)),
        saved(172_000, 40),
        // Longer than since the last one: it cannot have begun before that ended.
        saved(180_000, 9),
        checkpoint(200_000, "src-iterable-saved"),
        checkpoint(210_000, "src-non-iterable-saved"),
    ]);
    let expected = [
        "src-iterable-saved 100000..200000 0 -",
        "vmstate_save 115000..120000 1 -",
        "vmstate_save 130000..172000 1 -",
        "vm_stop 130000..170000 2 0",
        "do_vm_stop 135000..140000 3 0",
        "vmstate_save 172000..180000 1 -",
        "src-non-iterable-saved 200000..210000 0 -",
    ];
    assert_eq!(told(&paired), expected);
    let parents: Vec<_> = paired.spans.iter().map(|span| span.parent).collect();
    assert_eq!(
        parents,
        [None, Some(0), Some(0), Some(2), Some(3), Some(0), None]
    );
    let leaves: Vec<_> = paired.spans.iter().map(|span| span.leaf).collect();
    assert_eq!(leaves, [false, true, false, false, true, true, true]);
    assert!(paired.problems.is_empty());
}

#[test]
fn what_is_told_at_its_end_stays_inside_what_is_open() {
    let paired = pair(vec![
        event(100_000, "vm_stop_begin", None),
        saved(110_000, 1_000_000),
        saved(111_000, -7),
        event(112_000, "vm_stop_end", Some(0)),
    ]);
    let expected = [
        "vm_stop 100000..112000 0 0",
        "vmstate_save 100000..110000 1 -",
    ];
    assert_eq!(told(&paired), expected);
    assert!(!paired.spans[0].leaf);
}
