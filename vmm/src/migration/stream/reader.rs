//! Reads frames.

use std::io::{self, BufRead, BufReader, Read};

use super::Error;
use super::frame::{Frame, HEADER_LEN, Header, Kind, PREFACE, Problem, VERSION};
use super::timed_out;
use crate::probes;

/// The longest payload that is read in one go; a longer one is given memory as it arrives.
const STEP: usize = 512 << 10;

/// Reads one direction of a stream.
pub(crate) struct FrameReader<R> {
    inner: BufReader<R>,
    offset: u64,
    sequence: u32,
    /// What lies past the current payload is left from an earlier one.
    payload: Vec<u8>,
    /// Kind, offset and length of the frame that `payload` holds.
    current: (Kind, u64, usize),
}

impl<R: Read> FrameReader<R> {
    /// A reader of frames; [`FrameReader::preface`] comes first.
    pub(crate) fn new(inner: R) -> Self {
        FrameReader {
            inner: BufReader::new(inner),
            offset: 0,
            sequence: 0,
            payload: Vec::new(),
            current: (Kind::Failure, 0, 0),
        }
    }

    /// Checks how the stream starts.
    pub(crate) fn preface(&mut self) -> Result<(), Error> {
        let mut start = [0; PREFACE.len()];
        let place = "inside its first 8 bytes";
        let read = read_exact(&mut self.inner, &mut self.offset, &mut start, place);
        // A record of a handshake, or of an alert, which has 7 bytes.
        if let [0x15 | 0x16, 3, ..] = start {
            return Err(Error::Encrypted);
        }
        read?;
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

    /// The stream goes on elsewhere: forgets what was read of what follows here.
    pub(crate) fn skip_what_was_read_ahead(&mut self) {
        let ahead = self.inner.buffer().len();
        self.inner.consume(ahead);
    }

    /// How many bytes were read.
    pub(crate) fn offset(&self) -> u64 {
        self.offset
    }

    /// The frame that was read last.
    pub(crate) fn current(&self) -> Frame<'_> {
        let (kind, offset, len) = self.current;
        Frame {
            kind,
            offset,
            payload: self.payload.get(..len).unwrap_or_default(),
        }
    }

    /// Takes the offset and the payload of the frame that was read last, and leaves `buffer` for the next
    /// one.
    pub(crate) fn take(&mut self, buffer: Vec<u8>) -> (u64, Vec<u8>) {
        let (_, offset, len) = &mut self.current;
        let mut payload = std::mem::replace(&mut self.payload, buffer);
        payload.truncate(std::mem::take(len));
        (*offset, payload)
    }

    /// Reads the next frame, and returns its kind; [`FrameReader::current`] has the rest of it.
    ///
    /// # Errors
    /// When the connection fails or ends, or when the frame is not what was sent.
    pub(crate) fn advance(&mut self) -> Result<Kind, Error> {
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
        let header = Header::decode(&header).map_err(corrupt)?;
        let Header {
            kind,
            length,
            sequence,
            payload_sum,
        } = header;
        if sequence != self.sequence {
            let (expected, found) = (self.sequence, sequence);
            return Err(corrupt(Problem::Sequence { expected, found }));
        }
        let len = length as usize;
        self.read_payload(len)?;
        let expected = crc32c::crc32c(self.payload.get(..len).unwrap_or_default());
        if expected != payload_sum {
            return Err(corrupt(Problem::Checksum {
                expected,
                found: payload_sum,
            }));
        }
        self.sequence = sequence.wrapping_add(1);
        if kind.is_switchover() {
            probes::channel_recv(kind.c_name(), sequence.into());
        }
        self.current = (kind, start, len);
        Ok(kind)
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
            result => {
                let offset = *offset;
                result.map_err(|e| Error::Read {
                    offset,
                    source: timed_out(e),
                })?
            }
        };
        *offset += read as u64;
        buf = buf.get_mut(read..).unwrap_or_default();
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::message::{Ack, Failure, Ping};
    use super::super::writer::FrameWriter;
    use super::*;

    impl<R: Read> FrameReader<R> {
        fn next(&mut self) -> Result<Frame<'_>, Error> {
            self.advance()?;
            Ok(self.current())
        }
    }

    fn stream() -> Vec<u8> {
        let mut writer = FrameWriter::new(Vec::new());
        writer.preface().unwrap();
        writer.send(&Ping { t1: 7 }).unwrap();
        writer.send(&Ack { bytes: u64::MAX }).unwrap();
        writer.into_inner()
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
        let length = 16 << 20;
        let header = Header {
            kind: Kind::Device,
            length,
            sequence: 0,
            payload_sum: 0,
        }
        .encode();
        let mut reader = FrameReader::new(&header[..]);
        assert!(matches!(
            reader.next(),
            Err(Error::Truncated { offset: 20, .. })
        ));
        assert!(reader.payload.len() <= STEP);
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
        let bytes = writer.into_inner();
        let mut reader = FrameReader::new(&bytes[..]);
        let error = reader.next().unwrap().decode::<Ping>("a ping").unwrap_err();
        assert_eq!(error.to_string(), "the other side gave up: no room");
    }
}
