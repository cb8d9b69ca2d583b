//! A man in the middle of a migration: cuts, damages or holds the stream at a chosen place.
//!
//! It knows as much of the stream as it takes to find its messages: `vmm/src/migration/stream` has
//! the format.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};

/// Bytes before the first message.
const PREFACE: usize = 8;
/// Bytes of a message's header; its kind is in the first two, its length in the fifth to eighth.
const HEADER: usize = 20;

/// Kinds of messages.
pub mod kind {
    /// Pages.
    pub const RAM: u16 = 5;
    /// A device's state.
    pub const DEVICE: u16 = 9;
    /// Everything was sent.
    pub const END: u16 = 10;
    /// Everything is loaded.
    pub const LOADED: u16 = 11;
    /// The guest is the destination's.
    pub const COMMIT: u16 = 12;
    /// The guest runs.
    pub const RUNNING: u16 = 13;
}

/// One direction of the stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// From the source.
    ToDestination,
    /// From the destination.
    ToSource,
}

/// A place in one direction.
#[derive(Clone, Copy, Debug)]
pub enum At {
    /// This byte.
    Byte(u64),
    /// The first byte of a message: its kind, and how many of that kind come before it.
    Message(u16, u32),
}

/// What happens there.
#[derive(Clone, Copy, Debug)]
pub enum Act {
    /// The connection ends, both ways.
    Cut,
    /// One bit of the byte is flipped; the connection goes on.
    Flip,
    /// Nothing goes on in this direction until [`Proxy::release`].
    Hold,
}

/// A fault, or a chance for the test to do something at an exact place.
#[derive(Clone, Copy, Debug)]
pub struct Meddle {
    /// In which direction.
    pub way: Way,
    /// Where.
    pub at: At,
    /// What.
    pub act: Act,
}

/// A proxy for one migration.
#[derive(Debug)]
pub struct Proxy {
    path: PathBuf,
    reached: Receiver<()>,
    release: Sender<()>,
}

impl Proxy {
    /// Listens in `dir` for a source, and connects it to the destination that listens on the unix
    /// socket `destination`.
    pub fn start(dir: &Path, destination: &Path, meddle: Meddle) -> Result<Self> {
        let path = dir.join("proxy");
        let listener = UnixListener::bind(&path).with_context(|| path.display().to_string())?;
        let destination = destination.to_owned();
        let (reached, on_reached) = mpsc::channel();
        let (release, on_release) = mpsc::channel();
        let hook = Hook {
            meddle,
            reached,
            release: on_release,
        };
        thread::spawn(move || serve(&listener, &destination, hook));
        Ok(Proxy {
            path,
            reached: on_reached,
            release,
        })
    }

    /// The source migrates to this.
    pub fn uri(&self) -> String {
        format!("unix:{}", self.path.display())
    }

    /// Waits until the stream has come to the place.
    pub fn wait_reached(&self, limit: Duration) -> Result<()> {
        self.reached
            .recv_timeout(limit)
            .context("the stream never came to that place")
    }

    /// Lets a stream that is held go on.
    pub fn release(&self) {
        // Nobody waits any more when the connection is gone.
        let _ = self.release.send(());
    }
}

struct Hook {
    meddle: Meddle,
    reached: Sender<()>,
    release: Receiver<()>,
}

/// Both directions, until both have ended. An error ends them.
fn serve(listener: &UnixListener, destination: &Path, hook: Hook) -> Option<()> {
    let (source, _) = listener.accept().ok()?;
    let destination = UnixStream::connect(destination).ok()?;
    let back = (destination.try_clone().ok()?, source.try_clone().ok()?);
    let (there, here) = match hook.meddle.way {
        Way::ToDestination => (Some(hook), None),
        Way::ToSource => (None, Some(hook)),
    };
    thread::spawn(move || pass(back.0, back.1, here));
    pass(source, destination, there);
    Some(())
}

/// One direction.
fn pass(mut from: UnixStream, mut to: UnixStream, hook: Option<Hook>) {
    let mut place = Place::default();
    let mut unit = Vec::new();
    while place.next(&mut from, &mut unit).is_some() {
        if let Some(hook) = &hook
            && let Some(index) = place.hit(hook.meddle.at, unit.len())
        {
            let _ = hook.reached.send(());
            match hook.meddle.act {
                Act::Flip => unit[index] ^= 0x10,
                Act::Hold => drop(hook.release.recv()),
                Act::Cut => {
                    let _ = to.write_all(&unit[..index]);
                    let _ = (from.shutdown(Shutdown::Both), to.shutdown(Shutdown::Both));
                    return;
                }
            }
        }
        if to.write_all(&unit).is_err() {
            break;
        }
        place.passed += unit.len() as u64;
    }
    // The other direction may still have something to say.
    let _ = to.shutdown(Shutdown::Write);
}

/// Where one direction is: at the unit, preface or message, that comes next.
#[derive(Default)]
struct Place {
    passed: u64,
    kind: u16,
    seen: Vec<u16>,
}

impl Place {
    /// Reads the next unit.
    fn next(&mut self, from: &mut UnixStream, unit: &mut Vec<u8>) -> Option<()> {
        let first = self.passed == 0;
        unit.clear();
        unit.resize(if first { PREFACE } else { HEADER }, 0);
        from.read_exact(unit).ok()?;
        if !first {
            let length = u32::from_le_bytes(unit[4..8].try_into().ok()?);
            unit.resize(HEADER + usize::try_from(length).ok()?, 0);
            from.read_exact(&mut unit[HEADER..]).ok()?;
            self.kind = u16::from_le_bytes(unit[..2].try_into().ok()?);
            self.seen.push(self.kind);
        }
        Some(())
    }

    /// Whether `at` is in the unit of `len` bytes, and where.
    fn hit(&self, at: At, len: usize) -> Option<usize> {
        match at {
            At::Byte(byte) => {
                let index = usize::try_from(byte.checked_sub(self.passed)?).ok()?;
                (index < len).then_some(index)
            }
            At::Message(kind, before) => {
                let count = self.seen.iter().filter(|&&seen| seen == kind).count();
                (kind == self.kind && count == before as usize + 1).then_some(0)
            }
        }
    }
}
