//! The destination's side of a migration, for the fuzz target `incoming`: a made-up VM that takes in
//! whatever comes. Compiled for fuzzing only.

use std::fs::File;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use nix::sys::memfd::{MFdFlags, memfd_create};
use socket2::Socket;

use super::board::Board;
use super::channel::{Channel, Patience};
use super::connect::{Listener, Plaintext};
use super::descriptors::Descriptors;
use super::incoming;
use super::intake::Intake;
use super::status::Side;
use super::stream::frame::{HEADER_LEN, Kind};
use super::stream::header::Shape;
use super::stream::message::{Device, End, Rehearsal, RoundEnd, Terms};
use super::stream::writer::FrameWriter;
use super::uri::Uri;
use super::vm::{MigrationVm, TargetVm};
use super::wire::Wire;
use crate::control;
use crate::costs::Costs;
use crate::devices::StateError;
use crate::memory::{GuestRam, PAGE_SIZE};
use crate::runstate::{EventSender, RunState};

const PAGES: u64 = 16;
const DEVICES: [&str; 2] = ["cpu/0", "gic"];

/// One step of a stream that gets further than random bytes do.
#[derive(Clone, Debug)]
pub enum Step {
    /// A frame whose header fits, with this number for its kind.
    Frame(u8, Vec<u8>),
    /// The end of a round: its number, its pages, whether it is the last, a checksum.
    RoundEnd(u32, u64, bool, Option<u32>),
    /// The device with this number.
    Device(u8, Vec<u8>),
    /// The end, with a guest that runs.
    End,
    /// Bytes that are no frame.
    Raw(Vec<u8>),
}

/// A VM that keeps nothing but its RAM.
struct Sink {
    ram: GuestRam,
    ran: AtomicBool,
}

impl MigrationVm for Sink {
    fn shape(&self) -> Shape {
        Shape {
            arch: "fuzz".to_owned(),
            ram: self.ram.regions().collect(),
            vcpus: 1,
            devices: DEVICES.map(|name| (name.to_owned(), 1)).into(),
        }
    }

    fn ram(&self) -> GuestRam {
        self.ram.clone()
    }

    fn costs(&self) -> Costs {
        Costs::default()
    }

    fn learn(&self, _: &Costs) {}
}

impl TargetVm for Sink {
    fn rehearse(&self) -> Vec<Rehearsal> {
        Vec::new()
    }

    fn load_device(&self, _: usize, _: u32, _: &[u8]) -> Result<(), StateError> {
        Ok(())
    }

    fn go_on(&self, _: RunState) -> Result<Option<u64>, control::Error> {
        self.ran.store(true, Ordering::Relaxed);
        Ok(Some(1))
    }

    fn settle(&self) {}

    fn spoil(&self) {}
}

/// Takes in the stream that `steps` are, after an introduction that fits unless `greet` is false.
/// Panics if the guest then runs although there was no end.
pub fn take_in(answered: bool, greet: bool, lanes: u8, steps: &[Step]) {
    let ram = GuestRam::new(&[(0, PAGES * PAGE_SIZE)]).expect("RAM");
    let ran = AtomicBool::new(false);
    let sink = Sink { ram, ran };
    let (mut here, there) = UnixStream::pair().expect("a connection");
    // Nobody reads yet: what does not fit the buffer is cut off.
    here.set_nonblocking(true).expect("a socket");
    let terms = Terms {
        answered,
        shared: false,
        lanes,
        mapped: None,
    };
    let _ = here.write_all(&frames(greeting(&sink.shape(), terms, greet), steps));
    let _ = here.shutdown(std::net::Shutdown::Write);
    take_in_from(&sink, OwnedFd::from(there), steps);
}

/// Takes in a file whose pages have places of their own, `at` bytes behind its start.
pub fn take_in_file(at: u64, steps: &[Step]) {
    let ram = GuestRam::new(&[(0, PAGES * PAGE_SIZE)]).expect("RAM");
    let ran = AtomicBool::new(false);
    let sink = Sink { ram, ran };
    let terms = Terms {
        answered: false,
        shared: false,
        lanes: 0,
        mapped: Some(at),
    };
    let name = c"blackout-fuzz";
    let file = memfd_create(name, MFdFlags::MFD_CLOEXEC).expect("a file");
    let file = File::from(file);
    let mut frames = frames(greeting(&sink.shape(), terms, true), steps);
    let rest = frames.split_off(greeting(&sink.shape(), terms, true).into_inner().len());
    // Where there can be no file, there is none.
    let _ = file.write_all_at(&frames, 0);
    let behind = at.saturating_add(PAGES * PAGE_SIZE);
    if behind < 1 << 20 {
        let _ = file.write_all_at(&rest, behind);
    }
    take_in_from(&sink, OwnedFd::from(file), steps);
}

fn take_in_from(sink: &Sink, there: OwnedFd, steps: &[Step]) {
    let mut descriptors = Descriptors::default();
    descriptors.pass(there);
    descriptors.name("fuzz".to_owned()).expect("a name");
    let uri = Uri::Fd("fuzz".to_owned());
    let listener = Listener::bind(&uri, &mut descriptors, Plaintext::Refused).expect("a listener");
    let board = Board::new(EventSender::new(drop), Arc::default());
    assert!(board.begin(Side::Destination, uri.to_string(), None));
    incoming::run(sink, listener, "fd:fuzz", Patience::default(), &board);

    let ended = steps.iter().any(|step| match step {
        Step::End | Step::Raw(_) => true,
        Step::Frame(kind, _) => u16::from(*kind) == Kind::End as u16,
        _ => false,
    });
    let ran = sink.ran.load(Ordering::Relaxed);
    assert!(ended || !ran, "a guest runs that never arrived");
}

/// Takes in pages on further connections, one for each stream of `lanes`, and waits for rounds of so
/// many pages. Nothing may touch RAM after that.
pub fn take_in_lanes(lanes: &[Vec<Step>], rounds: &[u8]) {
    const SILENCE: Duration = Duration::from_millis(5);
    let ram = GuestRam::new(&[(0, PAGES * PAGE_SIZE)]).expect("RAM");
    let mut intake = Intake::new(ram.clone());
    for steps in lanes {
        let (mut here, there) = UnixStream::pair().expect("a connection");
        here.set_nonblocking(true).expect("a socket");
        let _ = here.write_all(&frames(FrameWriter::new(Vec::new()), steps));
        let _ = here.shutdown(std::net::Shutdown::Write);
        let wire = Wire::from(Socket::from(OwnedFd::from(there)));
        let channel = Channel::new(wire.clone(), Patience::default()).expect("a channel");
        intake.add(wire, channel).expect("a thread");
    }
    for (round, &pages) in (1..).zip(rounds) {
        let last = round == rounds.len();
        match intake.end_round(pages.into(), last, SILENCE) {
            Ok(loaded) => assert!(loaded.pages >= pages.into(), "a round that is not whole"),
            Err(_) => break,
        }
    }
    drop(intake);
    let (before, after) = (ram.checksum().expect("RAM"), ram.checksum().expect("RAM"));
    assert_eq!(before, after);
}

fn greeting(shape: &Shape, terms: Terms, greet: bool) -> FrameWriter<Vec<u8>> {
    let mut writer = FrameWriter::new(Vec::new());
    let _ = writer.preface();
    if greet {
        let _ = writer.send(&shape.hello(1, [7; 16], terms));
    }
    writer
}

fn frames(mut writer: FrameWriter<Vec<u8>>, steps: &[Step]) -> Vec<u8> {
    for step in steps {
        // What is too long for its kind is not sent.
        let _ = match step {
            Step::Frame(kind, payload) => match Kind::from_number(u16::from(*kind)) {
                Some(kind) => {
                    let mut frame = vec![0; HEADER_LEN];
                    frame.extend_from_slice(payload);
                    writer.send_frame(kind, &mut frame)
                }
                None => Ok(()),
            },
            &Step::RoundEnd(round, pages, last, checksum) => writer.send(&RoundEnd {
                round,
                pages,
                last,
                checksum,
            }),
            Step::Device(number, state) => writer.send(&Device {
                name: DEVICES[usize::from(*number) % DEVICES.len()],
                version: 1,
                state,
            }),
            Step::End => writer.send(&End {
                state: RunState::Running.name().to_owned(),
            }),
            Step::Raw(bytes) => writer.raw(bytes),
        };
    }
    writer.into_inner()
}
