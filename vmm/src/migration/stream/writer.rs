//! Writes frames.

use std::io::{self, Write};

use super::Error;
use super::frame::{HEADER_LEN, Header, Kind, PREFACE, Problem};
use super::message::Message;
use super::timed_out;
use crate::probes;

/// Writes one direction of a stream.
pub(crate) struct FrameWriter<W> {
    inner: W,
    offset: u64,
    sequence: u32,
    /// A frame was begun and can't be ended: whatever followed would be read as its rest.
    cut: bool,
    scratch: Vec<u8>,
}

impl<W: Write> FrameWriter<W> {
    /// A writer of frames; [`FrameWriter::preface`] comes first.
    pub(crate) fn new(inner: W) -> Self {
        FrameWriter {
            inner,
            offset: 0,
            sequence: 0,
            cut: false,
            scratch: Vec::new(),
        }
    }

    /// Starts the stream.
    pub(crate) fn preface(&mut self) -> Result<(), Error> {
        self.write(&PREFACE)
    }

    /// Starts the stream by `write`, which must take all of the bytes or none: something else may go
    /// with them.
    pub(crate) fn preface_by(
        &mut self,
        write: impl FnOnce(&[u8]) -> io::Result<usize>,
    ) -> Result<(), Error> {
        let written = match write(&PREFACE) {
            Ok(written) if written == PREFACE.len() => Ok(written),
            Ok(_) => Err(io::ErrorKind::WriteZero.into()),
            Err(error) => Err(error),
        };
        let offset = self.offset;
        self.offset += written.map_err(|source| Error::Write { offset, source })? as u64;
        Ok(())
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
        let payload = frame.get(HEADER_LEN..).unwrap_or_default();
        let length = u32::try_from(payload.len()).unwrap_or(u32::MAX);
        if payload.len() > kind.max_len() {
            return Err(self.refuse(kind, Problem::Length { kind, length }.to_string()));
        }
        let sequence = self.sequence;
        let header = Header {
            kind,
            length,
            sequence,
            payload_sum: crc32c::crc32c(payload),
        };
        frame[..HEADER_LEN].copy_from_slice(&header.encode());
        if kind.is_switchover() {
            probes::channel_send(kind.c_name(), sequence.into());
        }
        self.write(frame)?;
        self.sequence = sequence.wrapping_add(1);
        Ok(())
    }

    fn refuse(&self, kind: Kind, problem: String) -> Error {
        Error::Malformed {
            offset: self.offset,
            kind,
            problem,
        }
    }

    fn write(&mut self, bytes: &[u8]) -> Result<(), Error> {
        let begun = self.offset;
        let written = match self.cut {
            true => Err(io::ErrorKind::BrokenPipe.into()),
            false => self.write_all(bytes),
        };
        written.map_err(|source| {
            let offset = self.offset;
            self.cut |= offset != begun;
            let source = timed_out(source);
            Error::Write { offset, source }
        })
    }

    fn write_all(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            match self.inner.write(bytes) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(written) => {
                    self.offset += written as u64;
                    bytes = bytes.get(written..).unwrap_or_default();
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Writes bytes that need not be a frame.
    #[cfg(fuzzing)]
    pub(crate) fn raw(&mut self, bytes: &[u8]) -> Result<(), Error> {
        self.write(bytes)
    }

    /// What was written to.
    #[cfg(any(test, fuzzing))]
    pub(crate) fn into_inner(self) -> W {
        self.inner
    }

    /// How many bytes the connection has taken.
    pub(crate) fn offset(&self) -> u64 {
        self.offset
    }
}

#[cfg(test)]
mod tests {
    use super::super::message::Alive;
    use super::*;

    /// Takes so many bytes, and no more before it is told to.
    struct Full(usize, Vec<u8>);

    impl Write for Full {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let taken = bytes.len().min(self.0);
            if taken == 0 {
                return Err(io::ErrorKind::WouldBlock.into());
            }
            self.0 -= taken;
            self.1.extend(&bytes[..taken]);
            Ok(taken)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn nothing_follows_a_part_of_a_frame() {
        for (room, follows) in [(0, true), (1, false), (HEADER_LEN - 1, false)] {
            let mut first = FrameWriter::new(Vec::new());
            first.send(&Alive {}).unwrap();
            let mut writer = FrameWriter::new(Full(room, Vec::new()));
            writer.send(&Alive {}).unwrap_err();
            writer.inner.0 = 100;
            assert_eq!(writer.send(&Alive {}).is_ok(), follows, "{room}");
            let taken = if follows { HEADER_LEN } else { room };
            assert_eq!(writer.inner.1, first.inner[..taken]);
        }
    }
}
