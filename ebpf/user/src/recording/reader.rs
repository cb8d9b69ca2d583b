//! Reads a recording, one frame at a time.

use std::fs::File;
use std::io::{self, BufReader, Read};
use std::path::Path;

use super::frame::Frame;
use super::wire::{Decoder, Wire};
use super::{Error, MAGIC, MAX_FRAME, VERSION};

/// How a recording ended. Known once the reader has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// The recorder finished it.
    Finished,
    /// The recorder was killed, or still writes: what precedes this byte was read.
    Cut {
        /// Where the last whole frame ends.
        offset: u64,
    },
}

/// Gives the frames of a recording in file order, and holds one of them at a time.
///
/// Ends after the last whole frame, or after the first error.
#[derive(Debug)]
pub struct Reader<R> {
    name: String,
    input: BufReader<R>,
    coding: Decoder,
    payload: Vec<u8>,
    offset: u64,
    done: bool,
}

impl Reader<File> {
    /// Opens the recording at `path`.
    ///
    /// # Errors
    /// [`Error::Open`], and what [`Reader::new`] returns.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let file = File::open(path).map_err(|source| Error::Open {
            path: path.to_path_buf(),
            source,
        })?;
        Self::new(path.display().to_string(), file)
    }
}

impl<R: Read> Reader<R> {
    /// Reads the head of `input`, which errors will call `name`.
    ///
    /// # Errors
    /// [`Error::Magic`], [`Error::Version`], [`Error::Read`].
    pub fn new(name: String, input: R) -> Result<Self, Error> {
        let mut input = BufReader::new(input);
        let mut head = [0; MAGIC.len() + 2];
        if let Err(source) = input.read_exact(&mut head) {
            return Err(match source.kind() {
                io::ErrorKind::UnexpectedEof => Error::Magic { name },
                _ => Error::Read {
                    name,
                    offset: 0,
                    source,
                },
            });
        }
        let [magic @ .., low, high] = head;
        if magic != MAGIC {
            return Err(Error::Magic { name });
        }
        let found = u16::from_le_bytes([low, high]);
        if found != VERSION {
            return Err(Error::Version { name, found });
        }
        Ok(Self {
            name,
            input,
            coding: Decoder::default(),
            payload: Vec::new(),
            offset: head.len() as u64,
            done: false,
        })
    }

    /// How the recording ended; meaningful once the iterator has returned `None`.
    pub fn ending(&self) -> Ending {
        if self.coding.ended() {
            Ending::Finished
        } else {
            Ending::Cut {
                offset: self.offset,
            }
        }
    }

    /// Bytes read so far, up to the end of the last whole frame.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// The next frame; `None` at the end, or where the last frame is cut.
    fn frame(&mut self) -> Result<Option<Frame>, Error> {
        loop {
            let Some((length, prefix)) = self.length()? else {
                return Ok(None);
            };
            self.payload.resize(length, 0);
            if let Err(source) = self.input.read_exact(&mut self.payload) {
                return match source.kind() {
                    io::ErrorKind::UnexpectedEof => Ok(None),
                    _ => Err(self.read_error(source)),
                };
            }
            let (wire, rest) = postcard::take_from_bytes::<Wire<'static>>(&self.payload)
                .map_err(|source| self.decode_error(source))?;
            if !rest.is_empty() {
                return Err(self.content_error("has bytes left over"));
            }
            let frame = self
                .coding
                .decode(wire)
                .map_err(|what| self.content_error(what))?;
            self.offset += (prefix + length) as u64;
            if let Some(frame) = frame {
                return Ok(Some(frame));
            }
        }
    }

    /// The next frame's length and the bytes that it takes itself; `None` at the end.
    fn length(&mut self) -> Result<Option<(usize, usize)>, Error> {
        let mut length = 0;
        // Three bytes hold 21 bits; the bound has 17.
        for index in 0..3 {
            let mut byte = [0];
            match self.input.read_exact(&mut byte) {
                Ok(()) => {}
                Err(source) if source.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
                Err(source) => return Err(self.read_error(source)),
            }
            let [byte] = byte;
            length |= usize::from(byte & 0x7f) << (7 * index);
            if byte & 0x80 == 0 {
                return match length {
                    1..=MAX_FRAME => Ok(Some((length, index + 1))),
                    _ => Err(self.length_error()),
                };
            }
        }
        Err(self.length_error())
    }

    fn length_error(&self) -> Error {
        Error::Length {
            name: self.name.clone(),
            offset: self.offset,
        }
    }

    fn read_error(&self, source: io::Error) -> Error {
        Error::Read {
            name: self.name.clone(),
            offset: self.offset,
            source,
        }
    }

    fn decode_error(&self, source: postcard::Error) -> Error {
        Error::Decode {
            name: self.name.clone(),
            offset: self.offset,
            source,
        }
    }

    fn content_error(&self, what: &'static str) -> Error {
        Error::Content {
            name: self.name.clone(),
            offset: self.offset,
            what,
        }
    }
}

impl<R: Read> Iterator for Reader<R> {
    type Item = Result<Frame, Error>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.done {
            return None;
        }
        let frame = self.frame().transpose();
        self.done = !matches!(frame, Some(Ok(_)));
        frame
    }
}
