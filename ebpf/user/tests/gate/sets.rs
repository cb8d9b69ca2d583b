//! From reports to samples, and back from their file.

use blackout::analysis::Side;
use blackout::report::schema::{Its, Report, SCHEMA};
use blackout::sets::collect::{Collector, Error, SERIES_MAX};
use blackout::sets::{Key, Samples, read};

use crate::{host, migration};

fn key(side: Side, name: &str) -> Key {
    Key {
        side: Some(side),
        name: name.to_owned(),
    }
}

fn values(samples: &Samples, key: &Key) -> Vec<Option<u64>> {
    samples.series(key).unwrap().ns.clone()
}

#[test]
fn only_what_is_in_the_downtime_counts() {
    let mut set = Collector::new(false);
    set.add(&migration(20_000, 30_000)).unwrap();
    let samples = set.finish(None);
    assert_eq!(
        values(&samples, &key(Side::Destination, "ram_load")),
        [Some(100)]
    );
    assert!(samples.series(&key(Side::Source, "ram_round")).is_none());
    assert_eq!(values(&samples, &Key::whole("downtime")), [Some(60_000)]);
    assert_eq!(values(&samples, &Key::whole("unexplained")), [Some(6_000)]);
    let handler = samples
        .series(&key(Side::Source, "vm_state_handler its main"))
        .unwrap();
    assert_eq!(handler.parent.as_deref(), Some("migration_stop_vm"));
    let stop = samples
        .series(&key(Side::Source, "migration_stop_vm"))
        .unwrap();
    assert_eq!(
        stop.parent, None,
        "the migration itself is no layer of the downtime"
    );
}

#[test]
fn what_did_not_run_took_no_time() {
    let mut set = Collector::new(false);
    let mut without = migration(20_000, 30_000);
    without.spans.retain(|span| span.name != "vm_state_handler");
    without.blackout_ns = None;
    set.add(&without).unwrap();
    set.add(&migration(20_000, 30_000)).unwrap();
    set.add(&without).unwrap();
    let samples = set.finish(None);
    let handler = key(Side::Source, "vm_state_handler its main");
    assert_eq!(values(&samples, &handler), [Some(0), Some(20_000), Some(0)]);
    // A figure that was not seen is not 0.
    assert_eq!(
        values(&samples, &Key::whole("blackout")),
        [None, Some(59_000), None]
    );
    // What runs twice took the sum.
    let mut twice = migration(20_000, 30_000);
    let again = twice.spans[3].clone();
    twice.spans.insert(4, again);
    let mut set = Collector::new(false);
    set.add(&twice).unwrap();
    assert_eq!(values(&set.finish(None), &handler), [Some(40_000)]);
}

#[test]
fn migrations_without_figures_are_counted_with_the_reason() {
    let good = || migration(20_000, 30_000);
    let mut set = Collector::new(false);
    let mut failed = good();
    failed.status = "failed".to_owned();
    let mut cancelled = good();
    cancelled.status = "cancelled".to_owned();
    let mut unmeasured = good();
    unmeasured.downtime_ns = None;
    let mut doubtful = good();
    doubtful.doubts = vec!["3 events were lost".to_owned()];
    for migration in [&good(), &failed, &cancelled, &unmeasured, &doubtful] {
        set.add(migration).unwrap();
    }
    let samples = set.finish(None);
    let left = &samples.left_out;
    assert_eq!((samples.migrations, samples.seen()), (1, 5));
    assert_eq!(
        (left.failed, left.unfinished, left.unmeasured, left.doubtful),
        (1, 1, 1, 1)
    );
    assert_eq!(left.doubts["3 events were lost"], 1);
    let mut set = Collector::new(true);
    set.add(&doubtful).unwrap();
    assert_eq!(set.finish(None).migrations, 1);
}

#[test]
fn a_file_of_samples_is_the_set_again() {
    let folder = tempfile::tempdir().unwrap();
    let mut set = Collector::new(false);
    let mut one = migration(20_000, 30_000);
    one.its = vec![Its {
        side: Side::Source,
        op: "its_save_tables".to_owned(),
        duration_ns: 12_000,
        kernel_ns: Some(11_000),
        devices: Some(16),
        events: Some(256),
    }];
    set.add(&one).unwrap();
    set.add(&migration(21_000, 30_000)).unwrap();
    let samples = set.finish(Some("abc".to_owned()));
    let path = folder.path().join("samples.json");
    samples
        .write(&mut std::fs::File::create(&path).unwrap())
        .unwrap();
    let text = std::fs::read_to_string(&path).unwrap();
    assert!(text.lines().count() > samples.series.len(), "{text}");

    let mut again = Collector::new(false);
    read::into(&mut again, std::slice::from_ref(&path)).unwrap();
    let again = again.finish(Some("abc".to_owned()));
    assert_eq!(again, samples);
    // The file once more, beside another kernel's report with a span that the file lacks.
    let mut other = migration(22_000, 30_000);
    other.hosts = vec![host("6.13.0")];
    other.spans[3].label = "vm_state_handler new main".to_owned();
    let report = Report {
        schema: SCHEMA.to_owned(),
        migrations: vec![other],
    };
    let second = folder.path().join("report.json");
    std::fs::write(&second, serde_json::to_vec(&report).unwrap()).unwrap();
    std::fs::write(folder.path().join("trace.json"), "{\"traceEvents\":[]}").unwrap();
    let mut all = Collector::new(false);
    read::into(&mut all, &[folder.path().to_owned(), path]).unwrap();
    let all = all.finish(None);
    assert_eq!((all.migrations, all.hosts.len()), (5, 2));
    let new = values(&all, &key(Side::Source, "vm_state_handler new main"));
    assert_eq!(new, [Some(22_000), Some(0), Some(0), Some(0), Some(0)]);
    let old = values(&all, &key(Side::Source, "vm_state_handler its main"));
    assert_eq!(old[..2], [Some(0), Some(20_000)]);
}

#[test]
fn hostile_sets_are_refused() {
    let mut set = Collector::new(false);
    let mut wide = migration(20_000, 30_000);
    let span = wide.spans[3].clone();
    wide.spans = (0..=SERIES_MAX)
        .map(|index| {
            let mut span = span.clone();
            span.label = index.to_string();
            span
        })
        .collect();
    assert_eq!(set.add(&wide), Err(Error::Spans));

    let mut endless = migration(20_000, 30_000);
    for span in &mut endless.spans {
        (span.start_ns, span.duration_ns, span.depth) = (i64::MIN, u64::MAX, u64::MAX);
    }
    (endless.downtime_start_ns, endless.downtime_ns) = (Some(i64::MAX), Some(u64::MAX));
    let mut set = Collector::new(false);
    set.add(&endless).unwrap();
    let mut samples = set.finish(None);

    samples.series[0].ns.clear();
    let mut set = Collector::new(false);
    assert!(matches!(set.extend(samples), Err(Error::Length(..))));
}
