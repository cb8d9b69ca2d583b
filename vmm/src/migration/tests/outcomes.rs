//! What a migration ends in when the connection holds.

use super::super::predict::Basis;
use super::super::settings::{Capability, Parameter, TimeoutAction};
use super::*;

#[test]
fn a_guest_arrives_whole_and_both_sides_are_in_one_breakdown() {
    let (source, target) = (Fake::source(), Fake::target());
    let outcome = migrate(&source, &target);
    check(&source, &target, &outcome);
    assert_eq!(outcome.source.status, Some(MigrationStatus::Completed));
    assert_eq!(outcome.target.status, Some(MigrationStatus::Completed));

    let names = |side| {
        spans(&outcome.source, side)
            .map(|s| s.name.as_str())
            .collect::<Vec<_>>()
    };
    assert_eq!(
        names(Side::Source),
        [
            "migrate",
            "migration_connect",
            "migration_thread",
            "ram_round",
            "ram_round",
            "ram_final",
            "device_save",
            "device_save",
            "switchover",
            "migration_commit"
        ]
    );
    assert_eq!(
        names(Side::Destination),
        [
            "migrate_incoming",
            "ram_load",
            "ram_load",
            "ram_load",
            "device_load",
            "device_load",
            "migration_verify",
            "switchover"
        ]
    );
    assert!(spans(&outcome.source, Side::Source).all(|span| span.rc == 0));
    assert!(spans(&outcome.source, Side::Destination).all(|span| span.rc == 0));

    let blackout = outcome.source.blackout.unwrap();
    let there = outcome.target.blackout.unwrap();
    assert_eq!(blackout.id, there.id);
    assert_eq!(
        blackout.downtime_start_ns.unwrap() + blackout.downtime_ns.unwrap() as i64,
        blackout.first_run_ns.unwrap()
    );
    let clock = blackout.clock.unwrap();
    assert_eq!(clock.samples, 8 + 2 + 1);
    assert!(
        clock.offset_ns.unsigned_abs() <= clock.error_ns,
        "{clock:?}: it is one clock"
    );

    let ram = outcome.source.ram.unwrap();
    assert_eq!((ram.total, ram.remaining), (PAGES * PAGE_SIZE, 0));
    assert_eq!(ram.dirty_sync_count, 3);
    assert_eq!(ram.duplicate + ram.normal, PAGES + 1 + 2);
}

#[test]
fn a_guest_goes_on_as_it_was() {
    let (source, target) = (Fake::source(), Fake::target());
    source.lock().run = RunState::Paused;
    let outcome = migrate(&source, &target);
    assert_eq!(outcome.source.status, Some(MigrationStatus::Completed));
    assert_eq!(
        outcome.source.downtime, None,
        "a guest that was paused has no downtime"
    );
    assert_eq!(target.run_state(), RunState::Paused);
}

#[test]
fn a_failed_stop_lets_the_guest_run_on_and_names_the_cause() {
    let source = Fake::source().with(|faults| faults.stop = true);
    let target = Fake::target();
    let outcome = migrate(&source, &target);
    check(&source, &target, &outcome);
    let error = outcome.source.error_desc.unwrap();
    assert_eq!(
        error,
        "stopping the guest: drain: Bad address (os error 14)"
    );
    let there = outcome.target.error_desc.unwrap();
    assert_eq!(there, format!("the other side gave up: {error}"));
    assert_eq!(
        target.run_state(),
        RunState::Inmigrate,
        "nothing was loaded but RAM"
    );
}

#[test]
fn a_device_that_cannot_be_saved_or_loaded_is_named_on_both_sides() {
    let (source, target) = (Fake::source().with(|f| f.save = true), Fake::target());
    let outcome = migrate(&source, &target);
    check(&source, &target, &outcome);
    let error = outcome.source.error_desc.unwrap();
    assert_eq!(error, "saving the state of cpu/0: the device is on fire");

    let (source, target) = (Fake::source(), Fake::target().with(|f| f.load = true));
    let outcome = migrate(&source, &target);
    check(&source, &target, &outcome);
    let error = outcome.target.error_desc.unwrap();
    assert_eq!(
        error,
        "loading the state of cpu/0: state version 1, this monitor reads 9"
    );
    let here = outcome.source.error_desc.as_deref().unwrap();
    assert_eq!(here, format!("the other side gave up: {error}"));
    assert_eq!(
        target.run_state(),
        RunState::InternalError,
        "its devices are spoilt"
    );
    let failed = spans(&outcome.source, Side::Destination).find(|s| s.name == "device_load");
    assert_eq!(
        failed.unwrap().rc,
        -i64::from(libc::ENOTSUP),
        "the failed side's spans are kept"
    );
}

#[test]
fn a_destination_that_cannot_start_the_guest_gives_it_back() {
    let (source, target) = (Fake::source(), Fake::target().with(|f| f.start = true));
    let outcome = migrate(&source, &target);
    check(&source, &target, &outcome);
    assert_eq!(outcome.source.status, Some(MigrationStatus::Failed));
    assert_eq!(target.run_state(), RunState::InternalError);
    let error = outcome.source.error_desc.unwrap();
    assert!(
        error.contains("starting the guest: drain: No such device"),
        "{error}"
    );
}

#[test]
fn another_machine_is_refused_before_anything_is_sent() {
    let (source, mut target) = (Fake::source(), Fake::target());
    target.shape.vcpus = 4;
    let outcome = migrate(&source, &target);
    check(&source, &target, &outcome);
    let error = outcome.source.error_desc.unwrap();
    assert!(
        error.ends_with("its number of vCPUs is 4, the source's 1"),
        "{error}"
    );
    assert_eq!(outcome.source.ram.unwrap().transferred, 0);
}

#[test]
fn a_page_that_the_dirty_log_missed_is_found_by_the_checksum() {
    let verify = Parameters {
        verify_ram: true,
        ..Parameters::default()
    };
    let (source, target) = (Fake::source(), Fake::target());
    let outcome = Bench::new().migrate(&source, &target, verify, |uri| uri);
    assert_eq!(outcome.source.status, Some(MigrationStatus::Completed));

    let (source, target) = (Fake::source().with(|f| f.lost_page = true), Fake::target());
    let outcome = Bench::new().migrate(&source, &target, verify, |uri| uri);
    check(&source, &target, &outcome);
    let error = outcome.source.error_desc.unwrap();
    assert!(error.contains("guest RAM has checksum"), "{error}");
}

#[test]
fn a_guest_that_does_not_converge_runs_on() {
    let (source, target) = (Fake::source().with(|f| f.busy = PAGES), Fake::target());
    let bench = Bench::new();
    let limit = [(Parameter::DowntimeLimit, 10)];
    bench.source.settings().set_parameters(&limit).unwrap();
    // At 1 MiB/s what is dirty takes 31 ms.
    let slow = [(Parameter::MaxBandwidth, 1 << 20)];
    bench.source.settings().set_parameters(&slow).unwrap();
    let outcome = bench.migrate(&source, &target, Parameters::default(), |uri| uri);
    check(&source, &target, &outcome);
    let error = outcome.source.error_desc.unwrap();
    let start = "the guest does not converge: after 30 rounds 32 KiB are dirty still";
    assert!(error.starts_with(start), "{error}");
}

#[test]
fn a_guest_that_is_slowed_down_converges() {
    let (source, target) = (Fake::source().with(|f| f.busy = PAGES), Fake::target());
    let bench = Bench::new();
    let settings = bench.source.settings();
    // A quarter of what is dirty fits: the guest has to rest for 75 % of the time.
    let parameters = [
        (Parameter::DowntimeLimit, 10),
        (Parameter::MaxBandwidth, 1 << 20),
    ];
    settings.set_parameters(&parameters).unwrap();
    settings.set_capabilities(&[(Capability::AutoConverge, true)]);
    let outcome = bench.migrate(&source, &target, Parameters::default(), |uri| uri);
    check(&source, &target, &outcome);
    assert_eq!(outcome.source.status, Some(MigrationStatus::Completed));
    let (now, most) = source.lock().throttle;
    assert_eq!(
        now, 0,
        "a guest is slowed down no longer than its migration"
    );
    assert!((70..=90).contains(&most), "{most}");
}

/// A guest that needs 125 ms a round and never converges, with a second to do it in.
fn with_a_timeout(action: TimeoutAction) -> (Fake, Outcome) {
    let (source, target) = (Fake::source().with(|f| f.busy = PAGES), Fake::target());
    let bench = Bench::new();
    let settings = bench.source.settings();
    let parameters = [
        (Parameter::DowntimeLimit, 10),
        (Parameter::MaxBandwidth, 1 << 18),
        (Parameter::MigrationTimeout, 1),
    ];
    settings.set_parameters(&parameters).unwrap();
    settings.set_timeout_action(action);
    let outcome = bench.migrate(&source, &target, Parameters::default(), |uri| uri);
    check(&source, &target, &outcome);
    (source, outcome)
}

#[test]
fn a_migration_that_takes_too_long_is_given_up() {
    let (source, outcome) = with_a_timeout(TimeoutAction::Cancel);
    assert_eq!(source.run_state(), RunState::Running);
    assert_eq!(outcome.source.status, Some(MigrationStatus::Failed));
    let error = outcome.source.error_desc.unwrap();
    let start = "the guest could not be stopped within migration-timeout, 1 s";
    assert!(error.starts_with(start), "{error}");
}

#[test]
fn a_migration_that_takes_too_long_is_forced() {
    let (_, outcome) = with_a_timeout(TimeoutAction::Force);
    assert_eq!(outcome.source.status, Some(MigrationStatus::Completed));
    let took = outcome.source.total_time.unwrap();
    assert!((1000..10_000).contains(&took), "{took}");
}

#[test]
fn a_limit_below_what_any_stop_takes_is_refused_with_the_figures() {
    let (source, target) = (Fake::source(), Fake::target());
    let bench = Bench::new();
    let none = [(Parameter::DowntimeLimit, 0)];
    bench.source.settings().set_parameters(&none).unwrap();
    let outcome = bench.migrate(&source, &target, Parameters::default(), |uri| uri);
    check(&source, &target, &outcome);
    let error = outcome.source.error_desc.unwrap();
    let start = "the downtime limit of 0 ms is too low for this guest";
    assert!(error.starts_with(start), "{error}");
}

#[test]
fn what_a_stop_has_cost_goes_with_the_guest() {
    let (source, target) = (Fake::source(), Fake::target());
    let outcome = migrate(&source, &target);
    let blackout = outcome.source.blackout.unwrap();
    let first = blackout.prediction.unwrap();
    assert_eq!(first.basis, Basis::Rehearsal);
    assert_eq!(first.achieved_ns, blackout.downtime_ns);
    let costs = source.lock().costs.clone();
    assert!(costs.rest.median() > 0, "{costs:?}");
    assert_eq!(target.lock().costs, costs);

    let next = Fake::target();
    let outcome = migrate(&target, &next);
    let second = outcome.source.blackout.unwrap().prediction.unwrap();
    assert_eq!(second.basis, Basis::History);
    let rest = second
        .parts
        .iter()
        .find(|part| part.name == "rest")
        .unwrap();
    assert_eq!(rest.predicted_ns, costs.rest.median());
}

#[test]
fn a_cancel_during_the_stop_brings_the_guest_back() {
    let bench = Bench::new();
    let board = Arc::clone(&bench.source);
    let cancel = move |_: &Fake| board.cancel();
    let source = Fake::source().with(|f| f.on_stop = Some(Arc::new(cancel)));
    let target = Fake::target();
    let outcome = bench.migrate(&source, &target, Parameters::default(), |uri| uri);
    check(&source, &target, &outcome);
    assert_eq!(outcome.source.status, Some(MigrationStatus::Cancelled));
    assert_eq!(outcome.source.error_desc, None);
    assert_eq!(outcome.target.status, Some(MigrationStatus::Failed));
}

#[test]
fn a_guest_that_shuts_down_during_the_switchover_is_not_handed_over() {
    let shutdown = |vm: &Fake| vm.set_state(RunState::Shutdown).unwrap();
    let source = Fake::source().with(|f| f.on_stop = Some(Arc::new(shutdown)));
    let target = Fake::target();
    let outcome = migrate(&source, &target);
    assert_eq!(source.run_state(), RunState::Shutdown);
    assert!(!target.run_state().is_running());
    let error = outcome.source.error_desc.unwrap();
    assert_eq!(error, "the VM became shutdown during the switchover");
}

#[test]
fn nobody_listens() {
    let bench = Bench::new();
    let source = Fake::source();
    let uri = bench.uri("nobody");
    bench.source.begin(Side::Source, uri.to_string(), None);
    let nowhere = Target::new(uri.clone(), &mut Descriptors::default()).unwrap();
    outgoing::run(&source, nowhere, &Parameters::default(), &bench.source);
    let answer = bench.source.query();
    assert_eq!(answer.status, Some(MigrationStatus::Failed));
    let error = format!("connecting to {uri}: No such file or directory (os error 2)");
    assert_eq!(answer.error_desc, Some(error));
    assert_eq!(source.run_state(), RunState::Running);
}

#[test]
fn a_destination_that_waits_can_be_cancelled() {
    for tcp in [true, false] {
        let bench = Bench::new();
        let unix = bench.uri("here");
        let uri = if tcp {
            Uri::Tcp {
                host: "127.0.0.1".into(),
                port: 0,
                tls: false,
            }
        } else {
            unix
        };
        bench.target.begin(Side::Destination, uri.to_string(), None);
        let listener =
            Listener::bind(&uri, &mut Descriptors::default(), Plaintext::Refused).unwrap();
        let (vm, board) = (Fake::target(), Arc::clone(&bench.target));
        let thread = thread::spawn(move || {
            incoming::run(&vm, listener, "here", Patience::default(), &board)
        });
        bench.target.cancel();
        thread.join().unwrap();
        assert_eq!(
            bench.target.query().status,
            Some(MigrationStatus::Cancelled)
        );
    }
}

/// Migrates between two that take long for each device, with little patience and this pulse.
fn migrate_slowly(slow: Duration, pulse: Duration) -> QueryMigrate {
    let parameters = Parameters {
        patience: Patience {
            silence: Duration::from_millis(300),
            pulse,
        },
        ..Parameters::default()
    };
    let source = Fake::source().with(|f| f.slow = slow);
    let target = Fake::target().with(|f| f.slow = slow);
    let outcome = Bench::new().migrate(&source, &target, parameters, |uri| uri);
    check(&source, &target, &outcome);
    outcome.source
}

#[test]
fn a_side_that_is_busy_is_not_dead_and_one_that_is_silent_is() {
    let busy = Duration::from_millis(900);
    let alive = migrate_slowly(busy, Duration::from_millis(30));
    assert_eq!(
        alive.status,
        Some(MigrationStatus::Completed),
        "{:?}",
        alive.error_desc
    );
    let silent = migrate_slowly(busy, Duration::from_secs(60));
    assert_eq!(silent.status, Some(MigrationStatus::Failed));
    // It is the destination that waited, and it said so before it hung up.
    let error = silent.error_desc.unwrap();
    assert!(
        error.contains("gave up") && error.contains("timed out"),
        "{error}"
    );
}

#[test]
fn a_migration_that_pauses_before_the_switchover_goes_on_or_is_cancelled() {
    for goes_on in [true, false] {
        let bench = Bench::new();
        let pause = [(Capability::PauseBeforeSwitchover, true)];
        bench.source.settings().set_capabilities(&pause);
        let board = Arc::clone(&bench.source);
        let person = thread::spawn(move || {
            while board.query().status != Some(MigrationStatus::PreSwitchover) {
                thread::sleep(Duration::from_millis(1));
            }
            match goes_on {
                true => board.go_on(MigrationStatus::PreSwitchover).unwrap(),
                false => board.cancel(),
            }
        });
        let (source, target) = (Fake::source(), Fake::target());
        let outcome = bench.migrate(&source, &target, Parameters::default(), |uri| uri);
        person.join().unwrap();
        check(&source, &target, &outcome);
        let expected = match goes_on {
            true => MigrationStatus::Completed,
            false => MigrationStatus::Cancelled,
        };
        assert_eq!(outcome.source.status, Some(expected));
        let paused = spans(&outcome.source, Side::Source).any(|s| s.name == "pre_switchover");
        assert!(paused);
    }
}

#[test]
fn a_bandwidth_is_kept_to() {
    let bench = Bench::new();
    // A round of 8 pages takes a quarter of a second.
    let slow = [(Parameter::MaxBandwidth, 4 * PAGES * PAGE_SIZE)];
    bench.source.settings().set_parameters(&slow).unwrap();
    let (source, target) = (Fake::source(), Fake::target());
    for page in 0..PAGES {
        source.ram.write(page * PAGE_SIZE, &[7; 9]).unwrap();
    }
    let outcome = bench.migrate(&source, &target, Parameters::default(), |uri| uri);
    check(&source, &target, &outcome);
    let took = outcome.source.total_time.unwrap();
    assert!((250..5_000).contains(&took), "{took} ms");
}
