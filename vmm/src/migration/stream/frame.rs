//! Frames: how a stream starts, and how each message in it is bounded, counted and checked.

use std::ffi::CStr;
use std::io::{self, BufReader, Read, Write};

use super::Error;
use super::message::Message;

/// The version of the stream. A change of anything in it is a new version.
pub(crate) const VERSION: u16 = 1;
/// What each direction starts with: magic, then the version, little-endian.
pub(crate) const PREFACE: [u8; 8] = {
    let [low, high] = VERSION.to_le_bytes();
    [b'B', b'L', b'K', b'O', b'U', b'T', low, high]
};
/// Bytes of a frame before its payload.
pub(crate) const HEADER_LEN: usize = 16;
/// The longest payload that is read in one go; a longer one is given memory as it arrives.
const STEP: usize = 512 << 10;

/// One row a kind: its number, its name, and the longest payload it may have.
macro_rules! kinds {
    ($($kind:ident = $number:literal, $name:literal, $max:expr, $doc:literal;)*) => {
        /// What a frame is.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub(crate) enum Kind { $(#[doc = $doc] $kind = $number,)* }

        impl Kind {
            fn from_number(number: u16) -> Option<Kind> {
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
    Welcome = 2, c"welcome", 256, "The destination can take it.";
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
    Failure = 14, c"failure", 2 << 20, "The sender gives up, and why.";
}

impl Kind {
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
    /// Its number in its direction.
    pub(crate) sequence: u32,
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
                Ok(super::message::Failure { reason, .. }) => Error::Peer { reason },
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

/// Writes one direction of a stream.
pub(crate) struct FrameWriter<W> {
    inner: W,
    offset: u64,
    sequence: u32,
    scratch: Vec<u8>,
}

impl<W: Write> FrameWriter<W> {
    /// A writer of frames; [`FrameWriter::preface`] comes first.
    pub(crate) fn new(inner: W) -> Self {
        FrameWriter {
            inner,
            offset: 0,
            sequence: 0,
            scratch: Vec::new(),
        }
    }

    /// Starts the stream.
    pub(crate) fn preface(&mut self) -> Result<(), Error> {
        self.write(&PREFACE)
    }

    /// The number that the next frame will have.
    pub(crate) fn sequence(&self) -> u32 {
        self.sequence
    }

    /// Sends a message in one write.
    pub(crate) fn send<'a, M: Message<'a>>(&mut self, message: &M) -> Result<(), Error> {
        let mut frame = std::mem::take(&mut self.scratch);
        frame.clear();
        frame.resize(HEADER_LEN, 0);
        let mut frame =
            postcard::to_extend(message, frame).map_err(|e| self.refuse(M::KIND, e.to_string()))?;
        let sent = self.send_frame(M::KIND, &mut frame);
        self.scratch = frame;
        sent
    }

    /// Sends a frame in one write. Its payload starts at [`HEADER_LEN`] of `frame`; the bytes
    /// before it are for the header, which this fills in.
    pub(crate) fn send_frame(&mut self, kind: Kind, frame: &mut [u8]) -> Result<(), Error> {
        let (header, payload) = frame.split_at_mut(HEADER_LEN);
        let length = u32::try_from(payload.len()).unwrap_or(u32::MAX);
        if payload.len() > kind.max_len() {
            return Err(self.refuse(kind, Problem::Length { kind, length }.to_string()));
        }
        header[0..2].copy_from_slice(&(kind as u16).to_le_bytes());
        header[2..4].fill(0);
        header[4..8].copy_from_slice(&length.to_le_bytes());
        header[8..12].copy_from_slice(&self.sequence.to_le_bytes());
        let sum = crc32c::crc32c_append(crc32c::crc32c(&header[..12]), payload);
        header[12..16].copy_from_slice(&sum.to_le_bytes());
        self.sequence = self.sequence.wrapping_add(1);
        self.write(frame)
    }

    fn refuse(&self, kind: Kind, problem: String) -> Error {
        Error::Malformed {
            offset: self.offset,
            kind,
            problem,
        }
    }

    fn write(&mut self, mut bytes: &[u8]) -> Result<(), Error> {
        while !bytes.is_empty() {
            let offset = self.offset;
            let written = match self.inner.write(bytes) {
                Ok(0) => Err(io::ErrorKind::WriteZero.into()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                result => result,
            };
            let written = written.map_err(|source| Error::Write { offset, source })?;
            self.offset += written as u64;
            bytes = bytes.get(written..).unwrap_or_default();
        }
        Ok(())
    }

    /// How many bytes the connection has taken.
    pub(crate) fn offset(&self) -> u64 {
        self.offset
    }
}

/// Reads one direction of a stream.
pub(crate) struct FrameReader<R> {
    inner: BufReader<R>,
    offset: u64,
    sequence: u32,
    /// Only ever grows: what lies past the current payload is left from an earlier one.
    payload: Vec<u8>,
}

impl<R: Read> FrameReader<R> {
    /// A reader of frames; [`FrameReader::preface`] comes first.
    pub(crate) fn new(inner: R) -> Self {
        FrameReader {
            inner: BufReader::new(inner),
            offset: 0,
            sequence: 0,
            payload: Vec::new(),
        }
    }

    /// Checks how the stream starts.
    pub(crate) fn preface(&mut self) -> Result<(), Error> {
        let mut start = [0; PREFACE.len()];
        read_exact(
            &mut self.inner,
            &mut self.offset,
            &mut start,
            "inside its first 8 bytes",
        )?;
        if start == PREFACE {
            return Ok(());
        }
        match start {
            [b'B', b'L', b'K', b'O', b'U', b'T', low, high] => Err(Error::Version {
                theirs: u16::from_le_bytes([low, high]),
                ours: VERSION,
            }),
            _ => Err(Error::Foreign { start }),
        }
    }

    /// Whether everything that has arrived was read, as far as this side has looked.
    pub(crate) fn is_drained(&self) -> bool {
        self.inner.buffer().is_empty()
    }

    /// Reads the next frame.
    ///
    /// # Errors
    /// When the connection fails or ends, or when the frame is not what was sent.
    pub(crate) fn next(&mut self) -> Result<Frame<'_>, Error> {
        let start = self.offset;
        let mut header = [0; HEADER_LEN];
        let place = "where a message should start";
        read_exact(&mut self.inner, &mut self.offset, &mut header[..1], place)?;
        let place = "inside the header of a message";
        read_exact(&mut self.inner, &mut self.offset, &mut header[1..], place)?;

        let corrupt = |problem| Error::Corrupt {
            offset: start,
            problem,
        };
        let [
            k0,
            k1,
            f0,
            f1,
            l0,
            l1,
            l2,
            l3,
            s0,
            s1,
            s2,
            s3,
            c0,
            c1,
            c2,
            c3,
        ] = header;
        let (number, flags) = (u16::from_le_bytes([k0, k1]), u16::from_le_bytes([f0, f1]));
        let length = u32::from_le_bytes([l0, l1, l2, l3]);
        let sequence = u32::from_le_bytes([s0, s1, s2, s3]);
        let kind = Kind::from_number(number).ok_or(corrupt(Problem::Kind(number)))?;
        if flags != 0 {
            return Err(corrupt(Problem::Flags(flags)));
        }
        let len = usize::try_from(length).unwrap_or(usize::MAX);
        if len > kind.max_len() {
            return Err(corrupt(Problem::Length { kind, length }));
        }
        if sequence != self.sequence {
            return Err(corrupt(Problem::Sequence {
                expected: self.sequence,
                found: sequence,
            }));
        }
        self.read_payload(len)?;
        let payload = self.payload.get(..len).unwrap_or_default();

        let expected = crc32c::crc32c_append(crc32c::crc32c(&header[..12]), payload);
        let found = u32::from_le_bytes([c0, c1, c2, c3]);
        if expected != found {
            return Err(corrupt(Problem::Checksum { expected, found }));
        }
        self.sequence = self.sequence.wrapping_add(1);
        Ok(Frame {
            kind,
            sequence,
            offset: start,
            payload,
        })
    }

    /// Reads `len` bytes to the front of `self.payload`, which grows only by what has arrived and
    /// one step more.
    fn read_payload(&mut self, len: usize) -> Result<(), Error> {
        let mut filled = 0;
        while filled < len {
            let end = len.min(filled + STEP);
            if self.payload.len() < end {
                self.payload.resize(end, 0);
            }
            let part = self.payload.get_mut(filled..end).unwrap_or_default();
            read_exact(&mut self.inner, &mut self.offset, part, "inside a message")?;
            filled = end;
        }
        Ok(())
    }
}

fn read_exact<R: Read>(
    from: &mut R,
    offset: &mut u64,
    mut buf: &mut [u8],
    place: &'static str,
) -> Result<(), Error> {
    while !buf.is_empty() {
        let read = match from.read(buf) {
            Ok(0) => {
                return Err(Error::Truncated {
                    offset: *offset,
                    place,
                });
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            result => result.map_err(|source| Error::Read {
                offset: *offset,
                source,
            })?,
        };
        *offset += read as u64;
        buf = buf.get_mut(read..).unwrap_or_default();
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::message::{Ack, Failure, Ping};
    use super::*;

    fn stream() -> Vec<u8> {
        let mut writer = FrameWriter::new(Vec::new());
        writer.preface().unwrap();
        writer.send(&Ping { t1: 7 }).unwrap();
        writer.send(&Ack { bytes: u64::MAX }).unwrap();
        assert_eq!(
            (writer.offset(), writer.sequence()),
            (writer.inner.len() as u64, 2)
        );
        writer.inner
    }

    fn read(bytes: &[u8]) -> Result<(Ping, Ack), Error> {
        let mut reader = FrameReader::new(bytes);
        reader.preface()?;
        let ping = reader.next()?.decode("a ping")?;
        let ack = reader.next()?.decode("an ack")?;
        assert!(matches!(reader.next(), Err(Error::Truncated { .. })));
        Ok((ping, ack))
    }

    #[test]
    fn what_is_written_is_read() {
        assert_eq!(
            read(&stream()).unwrap(),
            (Ping { t1: 7 }, Ack { bytes: u64::MAX })
        );
    }

    #[test]
    fn every_truncation_is_an_error_that_says_where() {
        let stream = stream();
        for len in 0..stream.len() {
            match read(&stream[..len]) {
                Err(Error::Truncated { offset, .. }) => assert_eq!(offset, len as u64),
                other => panic!("cut at {len}: {other:?}"),
            }
        }
    }

    #[test]
    fn every_flipped_bit_is_an_error() {
        let stream = stream();
        for bit in 0..stream.len() * 8 {
            let mut flipped = stream.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert!(read(&flipped).is_err(), "bit {bit}");
        }
    }

    #[test]
    fn a_frame_that_is_lost_or_repeated_is_an_error() {
        let stream = stream();
        let second = PREFACE.len() + HEADER_LEN + 1;
        let mut lost = PREFACE.to_vec();
        lost.extend(&stream[second..]);
        let mut repeated = stream[..second].to_vec();
        repeated.extend(&stream[PREFACE.len()..]);
        for bytes in [lost, repeated] {
            let error = read(&bytes).unwrap_err();
            let sequence = matches!(
                error,
                Error::Corrupt {
                    problem: Problem::Sequence { .. },
                    ..
                }
            );
            assert!(sequence, "{error}");
        }
    }

    #[test]
    fn a_length_is_not_believed() {
        let mut header = [0; HEADER_LEN];
        header[0] = Kind::Device as u8;
        header[4..8].copy_from_slice(&(16u32 << 20).to_le_bytes());
        let mut reader = FrameReader::new(&header[..]);
        assert!(matches!(
            reader.next(),
            Err(Error::Truncated { offset: 16, .. })
        ));
        assert!(reader.payload.len() <= STEP);

        header[4..8].copy_from_slice(&u32::MAX.to_le_bytes());
        let error = FrameReader::new(&header[..])
            .next()
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("byte 0: 4294967295 bytes are too many for a device message"),
            "{error}"
        );
    }

    #[test]
    fn a_foreign_stream_and_another_version_are_told_apart() {
        let error = FrameReader::new(&b"QEVM\0\0\0\x03"[..])
            .preface()
            .unwrap_err();
        assert!(matches!(error, Error::Foreign { .. }));
        let error = FrameReader::new(&b"BLKOUT\x02\x01"[..])
            .preface()
            .unwrap_err();
        assert!(matches!(
            error,
            Error::Version {
                theirs: 0x0102,
                ours: VERSION
            }
        ));
    }

    #[test]
    fn a_failure_gives_its_reason_in_place_of_any_message() {
        let mut writer = FrameWriter::new(Vec::new());
        writer
            .send(&Failure {
                reason: "no room".into(),
                spans: Vec::new(),
            })
            .unwrap();
        let mut reader = FrameReader::new(&writer.inner[..]);
        let error = reader.next().unwrap().decode::<Ping>("a ping").unwrap_err();
        assert_eq!(error.to_string(), "the other side gave up: no room");
    }

    #[test]
    fn kinds_are_found_by_their_numbers() {
        for &kind in Kind::ALL {
            assert_eq!(Kind::from_number(kind as u16), Some(kind));
        }
        assert_eq!(Kind::from_number(0), None);
    }
}
