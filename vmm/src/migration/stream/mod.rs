//! The migration stream: what goes over the connection, in both directions.
//!
//! Each direction is a [preface](frame::PREFACE) (magic and version), then frames. A frame is a
//! header of 20 bytes, little-endian, and a payload:
//!
//! | bytes | what |
//! |---|---|
//! | 0–1 | [kind](frame::Kind) |
//! | 2–3 | flags, 0 |
//! | 4–7 | length of the payload, bounded for each kind |
//! | 8–11 | sequence, from 0 in each direction |
//! | 12–15 | CRC-32C of the payload |
//! | 16–19 | CRC-32C of bytes 0–15 |
//!
//! The payload of a `ram` frame is [records of pages](ram); every other payload is a
//! [message], encoded by postcard. In order:
//!
//! ```text
//!   source                                   destination
//!     hello        ───────────────────────▶
//!                  ◀───────────────────────    welcome, or failure with the reason
//!     ping         ───────────────────────▶                                     × 8
//!                  ◀───────────────────────    pong
//!   each round while the guest runs:
//!     ram …        ───────────────────────▶
//!                  ◀───────────────────────    ack, one for each ram frame that is loaded
//!     round-end    ───────────────────────▶
//!                  ◀───────────────────────    round-loaded
//!     ping         ───────────────────────▶
//!                  ◀───────────────────────    pong
//!   with the guest stopped:
//!     ram …        ───────────────────────▶    (ack for each)
//!     round-end    ───────────────────────▶    the last one
//!     device …     ───────────────────────▶
//!     end          ───────────────────────▶
//!                  ◀───────────────────────    loaded: everything is in place and verified
//!     commit       ───────────────────────▶    the guest is the destination's
//!                  ◀───────────────────────    running
//!     learned      ───────────────────────▶    what it took, for the next time
//! ```
//!
//! A stream that goes one way, to a file for example, is the left column without the pings and
//! without `commit`: `end` is the last message, and hands the guest over.
//!
//! Such a file may have the pages at [places of their own](mapped), outside of the messages.
//!
//! A source may say in `hello` that it opens further connections for pages. It does so after `welcome`;
//! each starts with the prefaces and a `join` with the destination's token, and has nothing but `ram`
//! and `ack` then. `round-end` counts the pages of all of them, and `round-loaded` waits for all.
//!
//! In place of any message either side may send `failure`, its last, with the reason. Between any two
//! messages after `welcome` either side sends `alive` every few seconds, so that one that is silent
//! is one that is dead or cut off, and not one that reads all of its RAM for a checksum.
//!
//! What arrives is hostile. A frame's payload is read into memory only as far as it has arrived,
//! nothing is acted upon before its checksum fits, and an error says at which byte it stands.

pub(super) mod frame;
pub(super) mod header;
pub(super) mod mapped;
pub(super) mod message;
pub(super) mod ram;
pub(super) mod reader;
pub(super) mod writer;

use std::io;

use crate::probes::Errno;
use crate::spanlog::SpanRecord;
use frame::{Kind, Problem};

/// The stream can't be read or written, or is not what it should be.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// The connection failed while it was read.
    #[error("reading the migration stream at byte {offset}")]
    Read {
        /// How many bytes were read before.
        offset: u64,
        /// What the socket said.
        source: io::Error,
    },
    /// The connection failed while it was written.
    #[error("writing the migration stream at byte {offset}")]
    Write {
        /// How many bytes were written before.
        offset: u64,
        /// What the socket said.
        source: io::Error,
    },
    /// The peer closed the connection too early.
    #[error("the migration stream ends at byte {offset}, {place}")]
    Truncated {
        /// How long the stream is.
        offset: u64,
        /// What was being read.
        place: &'static str,
    },
    /// Whatever the peer is, it is no monitor of this kind.
    #[error(
        "the peer does not speak this monitor's migration protocol: it starts with {start:02x?}"
    )]
    Foreign {
        /// The first bytes.
        start: [u8; 8],
    },
    /// The peer encrypts.
    #[error("the peer speaks TLS: both sides need tls-creds")]
    Encrypted,
    /// The peer is of another version.
    #[error("the peer speaks version {theirs} of the migration stream, this monitor {ours}")]
    Version {
        /// The peer's.
        theirs: u16,
        /// This monitor's.
        ours: u16,
    },
    /// A frame is damaged, lost, repeated or not one.
    #[error("the migration stream is corrupt in the frame at byte {offset}: {problem}")]
    Corrupt {
        /// Where the frame starts.
        offset: u64,
        /// What is wrong with it.
        problem: Problem,
    },
    /// A frame is whole, but its content makes no sense.
    #[error("the {} message at byte {offset} of the migration stream: {problem}", kind.name())]
    Malformed {
        /// Where the frame starts.
        offset: u64,
        /// Its kind.
        kind: Kind,
        /// What is wrong with it.
        problem: String,
    },
    /// A frame is fine, but not now.
    #[error(
        "the migration stream has a {} message at byte {offset}, where {expected} belongs",
        found.name()
    )]
    Unexpected {
        /// Where the frame starts.
        offset: u64,
        /// Its kind.
        found: Kind,
        /// What would be right.
        expected: &'static str,
    },
    /// The other side gave up and says why.
    #[error("the other side gave up: {reason}")]
    Peer {
        /// Its reason.
        reason: String,
        /// What it did, on its clock.
        spans: Vec<SpanRecord>,
    },
}

impl Errno for Error {
    fn errno(&self) -> i32 {
        match self {
            Error::Read { source, .. } | Error::Write { source, .. } => source.errno(),
            Error::Truncated { .. } => libc::ECONNRESET,
            Error::Foreign { .. } | Error::Encrypted | Error::Version { .. } => {
                libc::EPROTONOSUPPORT
            }
            Error::Corrupt { .. } | Error::Malformed { .. } => libc::EBADMSG,
            Error::Unexpected { .. } => libc::EPROTO,
            Error::Peer { .. } => libc::EREMOTEIO,
        }
    }
}

/// A socket whose timeout is over says `EAGAIN`, which nobody would understand.
fn timed_out(error: io::Error) -> io::Error {
    match error.kind() {
        io::ErrorKind::WouldBlock => io::Error::from_raw_os_error(libc::ETIMEDOUT),
        _ => error,
    }
}
