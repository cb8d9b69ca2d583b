//! Pages over several connections: the same rules, whichever of them breaks.

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::sync::atomic::Ordering;
use std::time::Instant;

use super::super::settings::{Capability, Parameter};
use super::faults::{Direction, Fault, meddle};
use super::*;

const MANY: u64 = 1500;
const LANES: usize = 3;

fn bench(lanes: usize) -> Bench {
    let bench = Bench::new();
    let settings = bench.source.settings();
    settings.set_capabilities(&[(Capability::Multifd, true)]);
    let channels = [(Parameter::MultifdChannels, lanes as u64)];
    settings.set_parameters(&channels).unwrap();
    bench
}

/// A guest that has enough memory for several connections, and keeps some of it dirty.
fn source() -> Fake {
    let fake = Fake::of(RunState::Running, MANY).with(|f| f.busy = 300);
    for page in (0..MANY).filter(|page| page % 5 != 0) {
        let bytes = page.to_le_bytes().repeat(20);
        fake.ram.write(page * PAGE_SIZE, &bytes).unwrap();
    }
    fake.lock().devices = vec![vec![1, 2, 3], vec![4; 300]];
    fake
}

fn target() -> Fake {
    Fake::of(RunState::Inmigrate, MANY)
}

fn parameters() -> Parameters {
    Parameters {
        verify_ram: true,
        ..Parameters::default()
    }
}

#[test]
fn a_guest_goes_over_several_connections() {
    for lanes in [1, 2, 7] {
        let (source, target) = (source(), target());
        let outcome = bench(lanes).migrate(&source, &target, parameters(), |uri| uri);
        check(&source, &target, &outcome);
        assert_eq!(outcome.source.status, Some(MigrationStatus::Completed));
        let ram = outcome.source.ram.unwrap();
        assert_eq!(ram.transferred, ram.precopy_bytes + ram.downtime_bytes);
        assert!(ram.downtime_bytes > 300 * PAGE_SIZE, "the last round");
        assert!(ram.normal + ram.duplicate >= MANY + 300 * (ram.dirty_sync_count - 1));
    }
}

#[test]
fn one_connection_that_breaks_ends_the_migration_and_not_the_guest() {
    let run = |connection, fault| {
        let (bench, source, target) = (bench(LANES), source(), target());
        let counts = Arc::default();
        let through = |uri| meddle(&bench, uri, (connection, LANES + 1), fault, &counts);
        let outcome = bench.migrate(&source, &target, parameters(), through);
        check(&source, &target, &outcome);
        let counts = [&counts[0], &counts[1]].map(|count| count.load(Ordering::Relaxed));
        (outcome, counts)
    };
    for connection in 1..=LANES {
        for at in [0, 3, 8, 9, 30, 70, 5_000, 300_000] {
            for way in [Direction::ToDestination, Direction::ToSource] {
                for fault in [Fault::Cut(at), Fault::Flip(at * 8 + 1)] {
                    let (outcome, counts) = run(connection, Some((way, fault)));
                    // Which connection takes how much is a matter of luck, and the last
                    // acknowledgements are not read.
                    if counts[usize::from(way == Direction::ToSource)] <= at + 40 {
                        continue;
                    }
                    let status = outcome.source.status;
                    let what = format!("connection {connection} {way:?} {fault:?}");
                    if way == Direction::ToDestination {
                        assert_eq!(status, Some(MigrationStatus::Failed), "{what}");
                        let error = outcome.source.error_desc.unwrap();
                        assert!(error.contains("migration stream"), "{what}: {error}");
                    }
                }
            }
        }
    }
}

#[test]
fn strangers_are_sent_away() {
    let bench = bench(LANES);
    let (source, target) = (source(), target());
    let outcome = bench.migrate(&source, &target, parameters(), |uri| {
        let Uri::Unix(path) = uri.clone() else {
            panic!()
        };
        // It is the second one only if the source is not quicker; then it finds nobody.
        thread::spawn(move || {
            thread::sleep(Duration::from_millis(2));
            for greeting in [b"BLKOUT\x05\x00".as_slice(), b"GET / HTTP/1.1", b""] {
                if let Ok(mut stranger) = UnixStream::connect(&path) {
                    let _ = stranger.write_all(greeting);
                }
            }
        });
        meddle(&bench, uri, (0, LANES + 1), None, &Arc::default())
    });
    check(&source, &target, &outcome);
}

#[test]
fn the_bandwidth_is_that_of_all_together() {
    let bench = bench(LANES);
    let (source, target) = (source(), target());
    let limit = [(Parameter::MaxBandwidth, 20 << 20)];
    bench.source.settings().set_parameters(&limit).unwrap();
    let began = Instant::now();
    let outcome = bench.migrate(&source, &target, parameters(), |uri| uri);
    check(&source, &target, &outcome);
    assert_eq!(outcome.source.status, Some(MigrationStatus::Completed));
    // 1200 pages of the first round alone.
    assert!(
        began.elapsed() > Duration::from_millis(200),
        "{:?}",
        began.elapsed()
    );
}

#[test]
fn a_cancel_ends_all_of_them() {
    let bench = bench(LANES);
    let (source, target) = (source(), target());
    let limit = [(Parameter::MaxBandwidth, 1 << 20)];
    bench.source.settings().set_parameters(&limit).unwrap();
    let board = Arc::clone(&bench.source);
    let canceller = thread::spawn(move || {
        thread::sleep(Duration::from_millis(200));
        board.cancel();
    });
    let outcome = bench.migrate(&source, &target, parameters(), |uri| uri);
    canceller.join().unwrap();
    check(&source, &target, &outcome);
    assert_eq!(outcome.source.status, Some(MigrationStatus::Cancelled));
}

#[test]
fn more_connections_than_there_can_be_are_refused() {
    let (source, target) = (source(), target());
    let outcome = bench(33).migrate(&source, &target, parameters(), |uri| uri);
    check(&source, &target, &outcome);
    let error = outcome.source.error_desc.unwrap();
    assert_eq!(error, "multifd-channels is 33, but there are 32 at most");
}
