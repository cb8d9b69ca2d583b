//! The report as text and as JSON.

use std::fs;

use blackout::analysis::{self, Loaded, Migration};
use blackout::recording::Reader;
use blackout::report::schema::Report;
use blackout::report::text;

use crate::tape::{Tape, Task};
use crate::{TESTBED, check, scenarios};

pub(crate) fn load(name: &str, bytes: &[u8]) -> Loaded {
    Loaded::read(name.into(), Reader::new(name.into(), bytes).unwrap())
        .unwrap()
        .remove(0)
}

pub(crate) fn golden(name: &str, tapes: &[Tape]) -> Report {
    let recordings: Vec<_> = tapes
        .iter()
        .map(|tape| load("blackout.rec", &tape.bytes()))
        .collect();
    let report = outputs(name, &recordings);
    same_from_the_file(tapes, &report);
    report
}

#[test]
fn what_is_far_from_a_migration_is_not_held() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("recording");
    const KVM_IRQFD: u32 = 0x4020_ae76;
    // Hours of ioctls before a migration, and after it.
    let mut tape = Tape::new("testbed");
    let task = Task { pid: 9, tid: 9 };
    let busy = |tape: &mut Tape| {
        for _ in 0..1_000 {
            tape.vm_ioctl(task, KVM_IRQFD, 20).pass_us(5_000_000);
        }
    };
    busy(&mut tape);
    let migration = scenarios::completed();
    let shift = tape.now_ns();
    tape.append(&migration.warp(|ns| ns + shift));
    busy(&mut tape);
    fs::write(&path, tape.bytes()).unwrap();
    let kept = Loaded::read_migrations(&path).unwrap().remove(0);
    let thread = &kept.processes[&9].threads[&9];
    assert!(
        thread.has_kernel && thread.ioctls.len() < 10,
        "{}",
        thread.ioctls.len()
    );
    let whole = load("recording", &tape.bytes());
    assert_eq!(whole.processes[&9].threads[&9].ioctls.len(), 2_000);
    assert_eq!(kept.first_ns, whole.first_ns);
    let report = |recording: Loaded| Report::new(&analysis::find(&[recording])).migrations;
    let (kept, whole) = (report(kept), report(whole));
    assert_eq!((kept.len(), &kept), (1, &whole));
}

/// What is read for the migrations alone makes the same report as all of it.
fn same_from_the_file(tapes: &[Tape], whole: &Report) {
    let folder = tempfile::tempdir().unwrap();
    let mut recordings = Vec::new();
    for (index, tape) in tapes.iter().enumerate() {
        let path = folder.path().join(index.to_string());
        fs::write(&path, tape.bytes()).unwrap();
        recordings.extend(Loaded::read_migrations(&path).unwrap());
    }
    assert_eq!(&Report::new(&analysis::find(&recordings)), whole);
}

fn outputs(name: &str, recordings: &[Loaded]) -> Report {
    let migrations = analysis::find(recordings);
    plain(name, recordings, &migrations);
    let report = Report::new(&migrations);
    let mut json = serde_json::to_string_pretty(&report).unwrap();
    json.push('\n');
    check(&format!("{name}.json"), json.as_bytes());
    assert_eq!(serde_json::from_str::<Report>(&json).unwrap(), report);
    report
}

fn plain(name: &str, recordings: &[Loaded], migrations: &[Migration<'_>]) {
    let mut plain = anstream::StripStream::new(Vec::new());
    text::write(&mut plain, recordings, migrations).unwrap();
    let plain = plain.into_inner();
    for line in std::str::from_utf8(&plain).unwrap().lines() {
        let columns = line.chars().count();
        assert!(columns <= text::WIDTH, "{columns} columns: {line}");
        assert_eq!(line.trim_end(), line);
    }
    check(&format!("{name}.txt"), &plain);
}

#[test]
fn a_completed_migration() {
    let report = golden("completed", &[scenarios::completed()]);
    let [migration] = &report.migrations[..] else {
        panic!("{} migrations", report.migrations.len())
    };
    assert_eq!(migration.status, "completed");
    assert!(migration.explained.unwrap() > 0.9);
    assert!(migration.blackout_ns.unwrap() < migration.downtime_ns.unwrap());
    assert_eq!(migration.doubts, [""; 0]);
}

#[test]
fn there_and_back_again() {
    let report = golden("back_and_forth", &[scenarios::back_and_forth()]);
    let ids: Vec<_> = report
        .migrations
        .iter()
        .map(|migration| migration.id)
        .collect();
    assert_eq!(ids, [Some(7), Some(8)]);
    let [there, back] = &report.migrations[..] else {
        panic!("not two")
    };
    assert_eq!(there.downtime_ns, back.downtime_ns);
    assert_eq!(there.gaps, back.gaps);
}

#[test]
fn a_refused_connection() {
    let report = golden("refused", &[scenarios::refused()]);
    let migration = &report.migrations[0];
    assert_eq!(migration.downtime_ns, None);
    assert_eq!(
        migration.error.as_deref(),
        Some("migration_connect (source): ECONNREFUSED")
    );
}

#[test]
fn an_its_save_that_fails() {
    let report = golden("its_save_fails", &[scenarios::its_save_fails()]);
    let migration = &report.migrations[0];
    assert_eq!(migration.status, "failed");
    let error = migration.error.as_deref();
    assert_eq!(
        error,
        Some("vm_state_handler its main, kvm_device_access (source): EFAULT")
    );
    assert!(
        migration.downtime_ns.is_some(),
        "the guest stood still until the source went on"
    );
}

#[test]
fn a_lossy_recording_says_so() {
    let report = golden("lossy", &[scenarios::lossy()]);
    let migration = &report.migrations[0];
    assert_eq!(migration.lost_events, 3);
    // What was over before the stop is whole; what was open or came then may not be.
    let stop_ns = migration.downtime_start_ns.unwrap();
    let mut spans = migration.spans.iter().filter(|span| span.name != "channel");
    assert!(spans.all(|span| {
        let over_ns = span.start_ns.saturating_add_unsigned(span.duration_ns);
        span.lossy == (over_ns >= stop_ns)
    }));
    assert!(migration.spans.iter().any(|span| !span.lossy));
    assert!(
        migration
            .doubts
            .iter()
            .any(|doubt| doubt == "source: no end was seen of drain")
    );
    assert!(
        migration
            .doubts
            .iter()
            .any(|doubt| doubt == "destination: no begin was seen of ram_load × 6")
    );
}

#[test]
fn either_side_alone() {
    let source = golden(
        "source_only",
        &[scenarios::completed().only(scenarios::SOURCE)],
    );
    assert_eq!(source.migrations[0].id, Some(7));
    assert_eq!(source.migrations[0].downtime_ns, None);
    let alone = scenarios::completed().only(scenarios::DESTINATION);
    let destination = golden("destination_only", &[alone]);
    assert_eq!(destination.migrations[0].id, Some(7));
    assert_eq!(destination.migrations[0].downtime_ns, None);
}

#[test]
fn two_hosts_read_as_one() {
    let two = golden("two_hosts", &scenarios::two_hosts());
    let recordings = [load("blackout.rec", &scenarios::completed().bytes())];
    let one = Report::new(&analysis::find(&recordings));
    let (two, one) = (&two.migrations[0], &one.migrations[0]);
    let error = two.downtime_ns.unwrap().abs_diff(one.downtime_ns.unwrap());
    assert!(error > 0 && error <= two.clock_error_ns.unwrap());
    assert_eq!(
        (two.clock_error_ns, one.clock_error_ns),
        (Some(10_000), Some(0))
    );
}

#[test]
fn a_cut_recording_is_read_to_the_cut() {
    let bytes = scenarios::completed().bytes();
    let cut = bytes.get(..bytes.len() * 3 / 4).unwrap();
    let report = outputs("cut", &[load("blackout.rec", cut)]);
    assert_eq!(report.migrations[0].status, "unfinished");
    assert!(
        report.migrations[0]
            .doubts
            .iter()
            .any(|doubt| doubt.contains("is cut at byte"))
    );
}

#[test]
fn an_empty_recording() {
    golden("empty", &[Tape::new("testbed")]);
}

#[test]
fn the_readme_shows_the_report_as_it_is() {
    let readme = include_str!("../../../../README.md");
    let report = include_str!("expected/testbed.txt");
    let (_, tree) = report.split_once("\nSource:").unwrap();
    assert!(
        readme.contains(tree.trim_end()),
        "the README's example is not tests/golden/expected/testbed.txt"
    );
}

#[test]
fn a_real_migration_in_the_testbed() {
    let recordings = [load("testbed.rec", TESTBED)];
    let migrations = analysis::find(&recordings);
    plain("testbed", &recordings, &migrations);
    let report = Report::new(&migrations);
    let [migration] = &report.migrations[..] else {
        panic!("{} migrations", report.migrations.len())
    };
    assert_eq!((migration.lost_events, &migration.doubts[..]), (0, &[][..]));
    let ops: Vec<_> = migration.its.iter().map(|its| its.op.as_str()).collect();
    assert_eq!(
        ops,
        [
            "its_save_tables",
            "gic_save_pending_tables",
            "gic_restore_pending_tables",
            "its_restore_tables"
        ]
    );
    for its in &migration.its {
        let kernel_ns = its.kernel_ns.expect("the kernel's view of each was seen");
        assert!(kernel_ns <= its.duration_ns, "{its:?}");
    }
    let mapped = (migration.its[0].devices, migration.its[0].events);
    assert_eq!(mapped, (Some(256), Some(4_096)));
}
