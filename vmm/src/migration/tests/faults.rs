//! A connection that is cut, damaged or foreign, at every place.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::atomic::{AtomicUsize, Ordering};

use super::super::stream::frame::{PREFACE, VERSION};
use super::*;

/// What the connection does to one direction.
#[derive(Clone, Copy, Debug)]
pub(super) enum Fault {
    /// It ends after this many bytes, both ways.
    Cut(usize),
    /// This bit is flipped.
    Flip(usize),
}

/// Which direction it does it to.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Direction {
    ToDestination,
    ToSource,
}

/// Stands between the two sides and does `fault` to one of so many
/// connections, which are numbered from 0; counts the bytes that it took in on that one, each way.
pub(super) fn meddle(
    bench: &Bench,
    destination: Uri,
    (connection, connections): (usize, usize),
    fault: Option<(Direction, Fault)>,
    counts: &Arc<[AtomicUsize; 2]>,
) -> Uri {
    let (Uri::Unix(from), Uri::Unix(to)) = (bench.uri("between"), destination) else {
        panic!()
    };
    let listener = UnixListener::bind(&from).unwrap();
    let counts = Arc::clone(counts);
    thread::spawn(move || {
        for (number, source) in listener.incoming().enumerate().take(connections) {
            // The listener goes with its migration.
            let (Ok(source), Ok(destination)) = (source, UnixStream::connect(&to)) else {
                return;
            };
            let fault = fault.filter(|_| number == connection);
            let counts = Arc::clone(&counts);
            thread::spawn(move || join(source, destination, fault, number == connection, &counts));
        }
    });
    Uri::Unix(from)
}

/// Passes on what one connection says, both ways.
fn join(
    source: UnixStream,
    destination: UnixStream,
    fault: Option<(Direction, Fault)>,
    counted: bool,
    counts: &Arc<[AtomicUsize; 2]>,
) {
    let back = (
        destination.try_clone().unwrap(),
        source.try_clone().unwrap(),
    );
    let of = |wanted| {
        fault
            .filter(|&(way, _)| way == wanted)
            .map(|(_, fault)| fault)
    };
    let (there, here) = (of(Direction::ToDestination), of(Direction::ToSource));
    let counts = match counted {
        true => Arc::clone(counts),
        false => Arc::default(),
    };
    let both = Arc::clone(&counts);
    thread::spawn(move || pass(back.0, back.1, here, &both[1]));
    pass(source, destination, there, &counts[0]);
}

fn pass(mut from: UnixStream, mut to: UnixStream, fault: Option<Fault>, count: &AtomicUsize) {
    let mut passed = 0;
    let mut buf = [0; 4096];
    loop {
        // A side that closed with something unread is an error here, and an end for the other.
        let read = from.read(&mut buf).unwrap_or(0);
        let part = &mut buf[..read];
        match fault {
            Some(Fault::Cut(at)) if (passed..passed + read).contains(&at) => {
                let _ = to.write_all(&part[..at - passed]);
                let _ = (from.shutdown(Shutdown::Both), to.shutdown(Shutdown::Both));
                return;
            }
            Some(Fault::Flip(bit)) if (passed..passed + read).contains(&(bit / 8)) => {
                part[bit / 8 - passed] ^= 1 << (bit % 8);
            }
            _ => {}
        }
        passed += read;
        count.store(passed, Ordering::Relaxed);
        if read == 0 || to.write_all(part).is_err() {
            let _ = to.shutdown(Shutdown::Write);
            return;
        }
    }
}

/// Migrates over a connection with `fault`. Returns how it ended, how many bytes went to the
/// destination and to the source, and whether the destination has heard what the stop has cost.
fn faulty(fault: Option<(Direction, Fault)>) -> (MigrationStatus, [usize; 2], bool) {
    let (bench, source, target) = (Bench::new(), Fake::source(), Fake::target());
    let counts = Arc::default();
    let through = |uri| meddle(&bench, uri, (0, 1), fault, &counts);
    let outcome = bench.migrate(&source, &target, Parameters::default(), through);
    check(&source, &target, &outcome);
    if outcome.source.status != Some(MigrationStatus::Completed) {
        assert!(outcome.source.error_desc.is_some(), "{fault:?}");
    }
    let counts = [&counts[0], &counts[1]].map(|count| count.load(Ordering::Relaxed));
    let learned = !target.lock().costs.is_empty();
    (outcome.source.status.unwrap(), counts, learned)
}

/// Every byte of the ends of a stream of `len` bytes, where the small messages are, and some of the
/// middle, where the pages are.
fn places(len: usize) -> impl Iterator<Item = usize> {
    let end = len.saturating_sub(500);
    (0..200.min(len))
        .chain((200..end).step_by(211))
        .chain(end.max(200)..len)
}

fn lengths() -> [usize; 2] {
    let (status, lengths, learned) = faulty(None);
    assert_eq!((status, learned), (MigrationStatus::Completed, true));
    lengths
}

#[test]
fn a_cut_connection_leaves_at_most_one_copy_wherever_it_is_cut() {
    let [there, back] = lengths();
    assert!(there > 20_000 && back > 500, "{there} {back}");
    let mut seen = Vec::new();
    for (way, len) in [
        (Direction::ToDestination, there),
        (Direction::ToSource, back),
    ] {
        for at in places(len) {
            let (status, ..) = faulty(Some((way, Fault::Cut(at))));
            if seen.last() != Some(&(way, status)) {
                seen.push((way, status));
            }
        }
    }
    // To the destination, nothing but a farewell follows the commit: what is cut inside it is unknown.
    let first = (Direction::ToDestination, MigrationStatus::Failed);
    let second = (Direction::ToDestination, MigrationStatus::Unknown);
    assert_eq!(seen[..2], [first, second], "{seen:?}");
    assert!(
        seen.contains(&(Direction::ToSource, MigrationStatus::Unknown)),
        "{seen:?}"
    );
}

#[test]
fn a_flipped_bit_is_found_wherever_it_is() {
    let [there, back] = lengths();
    for (way, len) in [
        (Direction::ToDestination, there),
        (Direction::ToSource, back),
    ] {
        for at in places(len) {
            let (status, counts, learned) = faulty(Some((way, Fault::Flip(at * 8 + at % 8))));
            // The last message holds times, so its length is not always the same.
            let hit = counts[usize::from(way == Direction::ToSource)] > at;
            // Nothing depends on the source's last message, and so it is not answered.
            let farewell = way == Direction::ToDestination && !learned;
            let found = status != MigrationStatus::Completed || farewell;
            assert!(!hit || found, "{way:?} byte {at}");
        }
    }
}

/// What a destination says of a peer that sends `bytes` and closes.
fn received(bytes: &[u8]) -> String {
    let bench = Bench::new();
    let uri = bench.uri("there");
    bench.target.begin(Side::Destination, uri.to_string(), None);
    let listener = Listener::bind(&uri, &mut Descriptors::default(), Plaintext::Refused).unwrap();
    let Uri::Unix(path) = &uri else { panic!() };
    let mut peer = UnixStream::connect(path).unwrap();
    peer.write_all(bytes).unwrap();
    peer.shutdown(Shutdown::Write).unwrap();
    incoming::run(
        &Fake::target(),
        listener,
        "there",
        Patience::default(),
        &bench.target,
    );
    bench.target.query().error_desc.unwrap()
}

#[test]
fn a_foreign_stream_is_refused_with_what_it_is() {
    let error = received(b"QEVM\x00\x00\x00\x03whatever follows");
    assert!(
        error.starts_with("the peer does not speak this monitor's migration protocol"),
        "{error}"
    );
    let error = received(b"BLKOUT\x02\x00");
    assert_eq!(
        error,
        format!("the peer speaks version 2 of the migration stream, this monitor {VERSION}")
    );
    assert_eq!(
        received(b""),
        "the migration stream ends at byte 0, inside its first 8 bytes"
    );
    let error = received(&PREFACE);
    assert_eq!(
        error,
        "the migration stream ends at byte 8, where a message should start"
    );
    let garbage = [PREFACE.as_slice(), &[0xa5; 100]].concat();
    let error = received(&garbage);
    assert!(
        error.contains("corrupt in the frame at byte 8: its checksum"),
        "{error}"
    );
}
