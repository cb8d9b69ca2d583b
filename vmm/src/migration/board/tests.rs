//! What the board says, when, and whom it wakes.

use std::borrow::Cow;
use std::io::Read;
use std::sync::Arc;

use socket2::{Domain, Socket, Type};

use super::super::clock::Sample;
use super::*;

fn board() -> (Board, Arc<Mutex<Vec<Event>>>) {
    let seen = Arc::new(Mutex::new(Vec::new()));
    let sink = Arc::clone(&seen);
    let events = EventSender::new(move |event| sink.lock().unwrap().push(event));
    (Board::new(events, Arc::default()), seen)
}

fn begun() -> Board {
    let board = board().0;
    assert!(board.begin(Side::Source, "tcp:a:1".into(), Some(8192)));
    board
}

#[test]
fn one_migration_at_a_time() {
    let board = begun();
    assert!(!board.begin(Side::Source, "tcp:b:1".into(), None));
    board.finish(
        MigrationStatus::Failed,
        Some("why".into()),
        Report::default(),
    );
    let answer = board.query();
    assert_eq!(answer.error_desc.as_deref(), Some("why"));
    assert!(
        answer.blackout.is_some(),
        "the breakdown is kept after a failure"
    );
    assert!(board.begin(Side::Source, "tcp:b:1".into(), None));
    assert_eq!(board.query().error_desc, None);
}

#[test]
fn a_cancel_wakes_the_thread_and_stays_visible() {
    let board = begun();
    let (mut here, there) = Socket::pair(Domain::UNIX, Type::STREAM, None).unwrap();
    board.attach(here.try_clone().unwrap().into()).unwrap();
    board.cancel();
    assert_eq!(here.read(&mut [0]).unwrap(), 0);
    drop(there);
    board.set_status(MigrationStatus::Device);
    assert_eq!(board.query().status, Some(MigrationStatus::Cancelling));
    assert_eq!(board.seal(), Err(Cancelled));
    assert_eq!(board.attach(here.into()), Err(Cancelled));
}

#[test]
fn past_the_point_of_no_return_nobody_cancels() {
    let board = begun();
    board.seal().unwrap();
    board.cancel();
    assert!(!board.is_cancelled());
    assert_eq!(board.query().status, Some(MigrationStatus::Setup));
}

#[test]
fn past_the_point_of_no_return_an_end_of_the_process_still_wakes_the_thread() {
    let board = begun();
    let (mut here, _there) = Socket::pair(Domain::UNIX, Type::STREAM, None).unwrap();
    board.attach(here.try_clone().unwrap().into()).unwrap();
    board.seal().unwrap();
    board.abandon();
    assert!(!board.is_cancelled());
    assert_eq!(here.read(&mut [0]).unwrap(), 0);
}

#[test]
fn each_status_is_an_event() {
    let (board, events) = board();
    board.begin(Side::Source, "tcp:a:1".into(), None);
    board.finish(MigrationStatus::Failed, None, Report::default());
    assert!(events.lock().unwrap().is_empty(), "nobody wants events");
    let switched = board.if_idle(|s| s.set_capabilities(&[(Capability::Events, true)]));
    assert!(switched.is_some());
    board.begin(Side::Source, "tcp:a:1".into(), None);
    board.set_status(MigrationStatus::Active);
    board.finish(MigrationStatus::Completed, None, Report::default());
    let names: Vec<_> = ["setup", "active", "completed"]
        .map(Event::Migration)
        .into();
    assert_eq!(*events.lock().unwrap(), names);
}

#[test]
fn nothing_is_switched_during_a_migration() {
    let board = begun();
    assert!(board.if_idle(|_| ()).is_none());
    board.finish(MigrationStatus::Completed, None, Report::default());
    assert!(board.if_idle(|_| ()).is_some());
}

#[test]
fn a_migration_waits_until_it_is_told_to_go_on() {
    let board = begun();
    let moment = Duration::from_millis(1);
    assert_eq!(
        board.go_on(MigrationStatus::PreSwitchover),
        Err(Some(MigrationStatus::Setup))
    );
    board.set_status(MigrationStatus::PreSwitchover);
    assert_eq!(board.wait_go_on(moment), Ok(false));
    board.go_on(MigrationStatus::PreSwitchover).unwrap();
    assert_eq!(board.wait_go_on(moment), Ok(true));
    board.cancel();
    assert_eq!(board.wait_go_on(moment), Err(Cancelled));
}

#[test]
fn both_sides_stand_on_the_clock_of_the_source() {
    let board = begun();
    let start = board.query().blackout.is_none().then(monotonic_ns).unwrap();
    let span = |name, start_ns| SpanRecord {
        name: Cow::Borrowed(name),
        hop: 8,
        detail: None,
        depth: 0,
        start_ns,
        duration_ns: 5,
        rc: 0,
    };
    let mut clock = Clock::default();
    let ahead = 1_000_000;
    clock.add(Sample {
        t1: start,
        t2: start + ahead + 10,
        t3: start + ahead + 10,
        t4: start + 20,
    });
    let report = Report {
        id: 3,
        spans: vec![span("migrate", start)],
        peer_spans: vec![span("vm_start", start + ahead + 700)],
        clock,
        downtime_start_ns: Some(start + 100),
        first_run_ns: Some(start + ahead + 800),
        forecast: None,
    };
    board.finish(MigrationStatus::Completed, None, report);
    let answer = board.query();
    assert_eq!(answer.downtime, Some(1), "half a millisecond is not none");
    let blackout = answer.blackout.unwrap();
    assert_eq!(blackout.downtime_ns, Some(700));
    assert_eq!(blackout.clock.unwrap().error_ns, 10);
    let [here, there] = &blackout.spans[..] else {
        panic!("{:?}", blackout.spans)
    };
    assert_eq!((here.side, there.side), (Side::Source, Side::Destination));
    assert_eq!(there.start_ns - here.start_ns, 700);
}
