//! Verdicts on sets whose truth is known.

use blackout::gate::objective::Objective;
use blackout::gate::settings::{Bound, Special};
use blackout::gate::{Check, Settings, Verdict, text};
use blackout::report::schema::Migration;
use blackout::sets::Samples;
use blackout::sets::collect::Collector;

use crate::{host, migrations};

fn set(migrations: &[Migration]) -> Samples {
    let mut set = Collector::new(false);
    for migration in migrations {
        set.add(migration).unwrap();
    }
    set.finish(None)
}

fn check(before: &[Migration], now: &[Migration], settings: Settings) -> Check {
    Check::new(set(before), set(now), settings)
}

fn plain(check: &Check) -> String {
    let mut out = anstream::StripStream::new(Vec::new());
    text::write(&mut out, check, true).unwrap();
    let text = String::from_utf8(out.into_inner()).unwrap();
    for line in text.lines() {
        assert!(line.chars().count() <= 80, "{line}");
    }
    text
}

const HANDLER: &str = "source: vm_state_handler its main";

#[test]
fn equal_sets_pass() {
    let check = check(
        &migrations(20, 50_000, 1),
        &migrations(20, 50_000, 2),
        Settings::default(),
    );
    assert_eq!(check.verdict, Verdict::Pass, "{}", plain(&check));
    assert!(check.culprits().is_empty());
    assert_eq!(check.more_runs, None);
    let downtime = &check.rows[0];
    assert!(downtime.detectable_ns.unwrap() >= downtime.threshold_ns);
}

#[test]
fn few_runs_name_the_likeliest_handler_of_a_longer_downtime() {
    // As clear as five runs can be: enough for the downtime, too little for one span of many.
    let check = check(
        &migrations(5, 50_000, 1),
        &migrations(5, 500_000, 2),
        Settings::default(),
    );
    assert_eq!(check.verdict, Verdict::Regression, "{}", plain(&check));
    let row = |name: &str| check.rows.iter().find(|row| row.key.to_string() == name);
    assert_eq!(row("downtime").unwrap().through.as_deref(), Some(HANDLER));
    assert_ne!(row(HANDLER).unwrap().verdict, Verdict::Regression);
    assert_eq!(check.culprits()[0].key.to_string(), HANDLER);
}

#[test]
fn a_slower_handler_is_found_and_named() {
    let check = check(
        &migrations(20, 50_000, 1),
        &migrations(20, 60_000, 2),
        Settings::default(),
    );
    assert_eq!(check.verdict, Verdict::Regression);
    let culprits: Vec<_> = check
        .culprits()
        .iter()
        .map(|row| row.key.to_string())
        .collect();
    assert_eq!(culprits, [HANDLER], "{}", plain(&check));
    let through = |name: &str| {
        let row = check.rows.iter().find(|row| row.key.to_string() == name);
        row.unwrap().through.clone()
    };
    assert_eq!(
        through("source: migration_stop_vm").as_deref(),
        Some(HANDLER)
    );
    assert_eq!(
        through("downtime").as_deref(),
        Some("source: migration_stop_vm")
    );
    let said = plain(&check);
    assert!(said.contains(&format!("regression: {HANDLER} +")), "{said}");
}

#[test]
fn a_faster_handler_passes() {
    let check = check(
        &migrations(20, 60_000, 1),
        &migrations(20, 50_000, 2),
        Settings::default(),
    );
    assert_eq!(check.verdict, Verdict::Pass);
    assert!(check.rows[0].faster);
    assert!(plain(&check).contains("faster"));
}

#[test]
fn a_slowdown_below_the_threshold_is_none() {
    let (before, now) = (migrations(30, 50_000, 1), migrations(30, 60_000, 2));
    let settings = Settings {
        absolute: Bound::Ns(20_000),
        ..Settings::default()
    };
    assert_eq!(
        check(&before, &now, settings.clone()).verdict,
        Verdict::Pass
    );
    // One span may have a threshold of its own, and others be ignored.
    let special = Special {
        name: "*its main".to_owned(),
        relative: None,
        absolute: Some(Bound::Ns(1_000)),
    };
    let strict = Settings {
        span: vec![special],
        ..settings
    };
    let found = check(&before, &now, strict.clone());
    assert_eq!(found.verdict, Verdict::Regression);
    let ignoring = Settings {
        ignore: vec![HANDLER.to_owned()],
        ..strict
    };
    assert_eq!(check(&before, &now, ignoring).verdict, Verdict::Pass);
}

#[test]
fn too_few_runs_are_inconclusive_and_say_how_many_it_takes() {
    let few = check(
        &migrations(3, 50_000, 1),
        &migrations(3, 90_000, 2),
        Settings::default(),
    );
    assert_eq!(few.verdict, Verdict::Inconclusive);
    let more = few.more_runs.unwrap();
    assert!((2..20).contains(&more), "{more}");
    let enough = 3 + more as u64;
    let (before, now) = (migrations(enough, 50_000, 1), migrations(enough, 90_000, 2));
    assert_eq!(
        check(&before, &now, Settings::default()).verdict,
        Verdict::Regression
    );
    assert!(plain(&few).contains("more migrations of each would tell"));
}

#[test]
fn noise_is_inconclusive_not_a_pass() {
    let noisy = |seed| {
        let mut rng = fastrand::Rng::with_seed(seed);
        let all = (0..12).map(|_| crate::migration(rng.u64(10_000..200_000), 30_000));
        all.collect::<Vec<_>>()
    };
    let check = check(&noisy(1), &noisy(2), Settings::default());
    assert_eq!(check.verdict, Verdict::Inconclusive);
    assert!(check.rows[0].detectable_ns.unwrap() > check.rows[0].threshold_ns);
}

#[test]
fn objectives_are_apart_from_the_baseline() {
    let same = migrations(30, 50_000, 1);
    let with = |slo: &str| {
        let settings = Settings {
            slo: vec![slo.parse::<Objective>().unwrap()],
            ..Settings::default()
        };
        let check = check(&same, &same, settings);
        (check.objectives[0].verdict, check.verdict)
    };
    assert_eq!(with("downtime=1ms"), (Verdict::Pass, Verdict::Pass));
    assert_eq!(
        with("downtime=10us"),
        (Verdict::Regression, Verdict::Regression)
    );
    // Thirty runs say nothing about one in a hundred.
    assert_eq!(with("downtime:p99=1ms").0, Verdict::Inconclusive);
    assert_eq!(with("no such span=1ms").0, Verdict::Inconclusive);
    assert_eq!(with(&format!("{HANDLER}:p90=1ms")).0, Verdict::Pass);
}

#[test]
fn failing_migrations_are_a_regression_of_their_own() {
    let before = migrations(20, 50_000, 1);
    let mut now = migrations(20, 50_000, 2);
    for migration in now.iter_mut().take(8) {
        migration.status = "failed".to_owned();
    }
    let failing = check(&before, &now, Settings::default());
    assert_eq!(
        (failing.failures.current, failing.verdict),
        (8, Verdict::Regression)
    );
    assert!(plain(&failing).contains("regression: more migrations fail"));
    let mut one = migrations(20, 50_000, 2);
    one[0].status = "failed".to_owned();
    assert_eq!(
        check(&before, &one, Settings::default()).verdict,
        Verdict::Inconclusive
    );
}

#[test]
fn a_new_span_is_held_against_nothing() {
    let before = migrations(20, 50_000, 1);
    let mut now = migrations(20, 60_000, 2);
    for migration in &mut now {
        let mut new = migration.spans[3].clone();
        new.label = "vm_state_handler new main".to_owned();
        new.duration_ns = 9_500;
        migration.spans[3].duration_ns -= 10_000;
        migration.spans.insert(3, new);
    }
    let check = check(&before, &now, Settings::default());
    let culprits: Vec<_> = check
        .culprits()
        .iter()
        .map(|row| row.key.name.clone())
        .collect();
    assert_eq!(culprits, ["vm_state_handler new main"]);
}

#[test]
fn another_kernel_is_said() {
    let mut now = migrations(20, 50_000, 2);
    for migration in &mut now {
        migration.hosts = vec![host("6.13.0")];
    }
    let check = check(&migrations(20, 50_000, 1), &now, Settings::default());
    assert!(
        check.warnings[0].contains("Linux 6.13.0"),
        "{:?}",
        check.warnings
    );
}

#[test]
fn nothing_in_common_never_passes() {
    let settings = Settings {
        only: vec!["no such span".to_owned()],
        ..Settings::default()
    };
    let same = migrations(20, 50_000, 1);
    assert_eq!(check(&same, &same, settings).verdict, Verdict::Inconclusive);
    assert_eq!(
        check(&[], &same, Settings::default()).verdict,
        Verdict::Inconclusive
    );
}

#[test]
fn extreme_values_do_not_overflow() {
    let mut wild = migrations(8, 50_000, 1);
    for (index, migration) in wild.iter_mut().enumerate() {
        migration.downtime_ns = Some(if index % 2 == 0 { u64::MAX } else { 0 });
        migration.downtime_start_ns = Some(i64::MIN);
    }
    plain(&check(&wild, &wild, Settings::default()));
    plain(&check(
        &migrations(8, 50_000, 1),
        &wild,
        Settings::default(),
    ));
}
