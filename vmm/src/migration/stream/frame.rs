//! Frames: how a stream starts, and how each message in it is bounded, counted and checked.

use std::ffi::CStr;

use super::Error;
use super::message::{Failure, Message};

/// The version of the stream. A change of anything in it is a new version.
pub(crate) const VERSION: u16 = 6;
/// What each direction starts with: magic, then the version, little-endian.
pub(crate) const PREFACE: [u8; 8] = {
    let [low, high] = VERSION.to_le_bytes();
    [b'B', b'L', b'K', b'O', b'U', b'T', low, high]
};
/// Bytes of a frame before its payload.
pub(crate) const HEADER_LEN: usize = 20;

/// What stands before a payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    /// What the frame is.
    pub(crate) kind: Kind,
    /// Bytes of the payload.
    pub(crate) length: u32,
    /// Counts from 0 in each direction.
    pub(crate) sequence: u32,
    /// CRC-32C of the payload.
    pub(crate) payload_sum: u32,
}

impl Header {
    /// The header as it is sent.
    pub(crate) fn encode(self) -> [u8; HEADER_LEN] {
        let mut bytes = [0; HEADER_LEN];
        bytes[0..2].copy_from_slice(&(self.kind as u16).to_le_bytes());
        bytes[4..8].copy_from_slice(&self.length.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.sequence.to_le_bytes());
        bytes[12..16].copy_from_slice(&self.payload_sum.to_le_bytes());
        let sum = crc32c::crc32c(&bytes[..16]);
        bytes[16..20].copy_from_slice(&sum.to_le_bytes());
        bytes
    }

    /// Reads a header. Its own checksum comes first: a length that was damaged on the way must not
    /// make this side wait for bytes that never come.
    ///
    /// # Errors
    /// What is wrong with it.
    pub(crate) fn decode(bytes: &[u8; HEADER_LEN]) -> Result<Header, Problem> {
        let (words, _) = bytes.as_chunks();
        let [kind, length, sequence, payload_sum, found] = words else {
            return Err(Problem::Kind(0));
        };
        let expected = crc32c::crc32c(&bytes[..16]);
        let found = u32::from_le_bytes(*found);
        if expected != found {
            return Err(Problem::Checksum { expected, found });
        }
        let [k0, k1, f0, f1] = *kind;
        let (number, flags) = (u16::from_le_bytes([k0, k1]), u16::from_le_bytes([f0, f1]));
        let kind = Kind::from_number(number).ok_or(Problem::Kind(number))?;
        if flags != 0 {
            return Err(Problem::Flags(flags));
        }
        let [length, sequence, payload_sum] =
            [length, sequence, payload_sum].map(|word| u32::from_le_bytes(*word));
        if length as usize > kind.max_len() {
            return Err(Problem::Length { kind, length });
        }
        Ok(Header {
            kind,
            length,
            sequence,
            payload_sum,
        })
    }
}

/// One row a kind: its number, its name, and the longest payload it may have.
macro_rules! kinds {
    ($($kind:ident = $number:literal, $name:literal, $max:expr, $doc:literal;)*) => {
        /// What a frame is.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub(crate) enum Kind { $(#[doc = $doc] $kind = $number,)* }

        impl Kind {
            pub(crate) fn from_number(number: u16) -> Option<Kind> {
                match number { $($number => Some(Kind::$kind),)* _ => None }
            }

            /// Its name in errors and probes.
            pub(crate) fn c_name(self) -> &'static CStr {
                match self { $(Kind::$kind => $name,)* }
            }

            /// The longest payload of a frame of this kind.
            pub(crate) fn max_len(self) -> usize {
                match self { $(Kind::$kind => $max,)* }
            }

            #[cfg(test)]
            pub(crate) const ALL: &[Kind] = &[$(Kind::$kind,)*];
        }
    };
}

kinds! {
    Hello = 1, c"hello", 64 << 10, "The source introduces the guest.";
    Welcome = 2, c"welcome", 64 << 10, "The destination can take it.";
    Ping = 3, c"ping", 64, "The source asks for the time.";
    Pong = 4, c"pong", 64, "The destination's answer.";
    Ram = 5, c"ram", super::ram::MAX_PAYLOAD, "Pages.";
    Ack = 6, c"ack", 64, "One more `ram` frame is loaded.";
    RoundEnd = 7, c"round-end", 64, "All pages of a round were sent.";
    RoundLoaded = 8, c"round-loaded", 64, "All pages of a round are loaded.";
    Device = 9, c"device", 16 << 20, "One device's state.";
    End = 10, c"end", 256, "Everything was sent.";
    Loaded = 11, c"loaded", 64, "Everything is in place and verified.";
    Commit = 12, c"commit", 64, "The guest is the destination's.";
    Running = 13, c"running", 2 << 20, "The guest runs; the destination's spans.";
    Alive = 15, c"alive", 8, "The sender is busy, but there.";
    Join = 16, c"join", 64, "A further connection, for pages, of a migration that has begun.";
    Learned = 17, c"learned", 512 << 10, "What stops of this guest have cost.";
    Failure = 14, c"failure", 2 << 20, "The sender gives up, and why.";
}

impl Kind {
    /// Whether its way from one side to the other is part of the downtime, so that the probes
    /// `channel_send` and `channel_recv` show it.
    pub(crate) fn is_switchover(self) -> bool {
        matches!(
            self,
            Kind::End | Kind::Loaded | Kind::Commit | Kind::Running
        )
    }

    /// Its name in errors.
    pub(crate) fn name(self) -> &'static str {
        self.c_name().to_str().unwrap_or_default()
    }
}

/// What can be wrong with a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Problem {
    /// The kind is none.
    #[error("there is no message of kind {0}")]
    Kind(u16),
    /// A flag is set; there are none yet.
    #[error("flags {0:#06x} are unknown")]
    Flags(u16),
    /// The payload is longer than its kind allows.
    #[error("{length} bytes are too many for a {} message, which has {} at most", kind.name(), kind.max_len())]
    Length {
        /// The kind.
        kind: Kind,
        /// The length in the header.
        length: u32,
    },
    /// A frame is missing or repeated.
    #[error("it is number {found} where number {expected} belongs")]
    Sequence {
        /// The number that follows the last one.
        expected: u32,
        /// The number in the header.
        found: u32,
    },
    /// The checksum differs.
    #[error("its checksum is {found:#010x}, its bytes have {expected:#010x}")]
    Checksum {
        /// Of the bytes that arrived.
        expected: u32,
        /// In the header.
        found: u32,
    },
}

/// A frame that has arrived whole.
#[derive(Debug)]
pub(crate) struct Frame<'a> {
    /// What it is.
    pub(crate) kind: Kind,
    /// Where it starts in its direction.
    pub(crate) offset: u64,
    /// What it carries.
    pub(crate) payload: &'a [u8],
}

impl<'a> Frame<'a> {
    /// The message that this frame carries. `expected` is what the error says when it carries
    /// another one. A `failure` becomes [`Error::Peer`] wherever it comes.
    pub(crate) fn decode<M: Message<'a>>(&self, expected: &'static str) -> Result<M, Error> {
        if self.kind != M::KIND {
            return Err(self.unexpected(expected));
        }
        match postcard::take_from_bytes(self.payload) {
            Ok((message, [])) => Ok(message),
            Ok((_, rest)) => Err(self.malformed(format!("{} bytes are left over", rest.len()))),
            Err(error) => Err(self.malformed(error.to_string())),
        }
    }

    /// The error for a frame that should not be here: the peer's own reason if it gave one.
    pub(crate) fn unexpected(&self, expected: &'static str) -> Error {
        if self.kind == Kind::Failure {
            return match postcard::from_bytes(self.payload) {
                Ok(Failure { reason, spans }) => Error::Peer { reason, spans },
                Err(error) => self.malformed(error.to_string()),
            };
        }
        Error::Unexpected {
            offset: self.offset,
            found: self.kind,
            expected,
        }
    }

    /// The error for a frame whose content makes no sense.
    pub(crate) fn malformed(&self, problem: String) -> Error {
        Error::Malformed {
            offset: self.offset,
            kind: self.kind,
            problem,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PING: Header = Header {
        kind: Kind::Ping,
        length: 3,
        sequence: 9,
        payload_sum: 7,
    };

    /// The header that has `bytes` before its sum.
    fn summed(bytes: [u8; 16]) -> Result<Header, Problem> {
        let mut header = [0; HEADER_LEN];
        header[..16].copy_from_slice(&bytes);
        header[16..].copy_from_slice(&crc32c::crc32c(&bytes).to_le_bytes());
        Header::decode(&header)
    }

    #[test]
    fn a_header_is_read_as_it_was_written() {
        assert_eq!(Header::decode(&PING.encode()), Ok(PING));
        for &kind in Kind::ALL {
            let header = Header { kind, ..PING };
            assert_eq!(Header::decode(&header.encode()), Ok(header));
        }
    }

    #[test]
    fn no_flipped_bit_goes_unseen() {
        for bit in 0..HEADER_LEN * 8 {
            let mut bytes = PING.encode();
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert!(
                matches!(Header::decode(&bytes), Err(Problem::Checksum { .. })),
                "bit {bit}"
            );
        }
    }

    #[test]
    fn a_header_that_says_the_impossible_is_refused() {
        let mut bytes = [0; 16];
        assert_eq!(summed(bytes), Err(Problem::Kind(0)));
        bytes[0] = Kind::Ping as u8;
        bytes[3] = 1;
        assert_eq!(summed(bytes), Err(Problem::Flags(0x100)));
        bytes[3] = 0;
        bytes[4..8].copy_from_slice(&65u32.to_le_bytes());
        let error = summed(bytes).unwrap_err().to_string();
        assert_eq!(
            error,
            "65 bytes are too many for a ping message, which has 64 at most"
        );
    }
}
