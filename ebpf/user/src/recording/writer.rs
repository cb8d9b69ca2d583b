//! Writes a recording.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

use super::frame::{Frame, Header};
use super::wire::{Encoder, Wire};
use super::{Error, MAGIC, MAX_FRAME, VERSION};

/// Writes frames to a stream, buffered. The recorder is its one user; tests are the other.
#[derive(Debug)]
pub struct Writer<W: Write> {
    name: String,
    out: BufWriter<W>,
    coding: Encoder,
    payload: Vec<u8>,
}

impl Writer<File> {
    /// Creates the file at `path`, or empties it, and writes the recording's head.
    ///
    /// # Errors
    /// [`Error::Open`] and [`Error::Write`].
    pub fn create(path: &Path, header: Header) -> Result<Self, Error> {
        let file = File::create(path).map_err(|source| Error::Open {
            path: path.to_path_buf(),
            source,
        })?;
        Self::new(path.display().to_string(), file, header)
    }
}

impl<W: Write> Writer<W> {
    /// Writes the recording's head to `out`, which errors will call `name`.
    ///
    /// # Errors
    /// [`Error::Write`].
    pub fn new(name: String, out: W, header: Header) -> Result<Self, Error> {
        let mut writer = Self {
            name,
            out: BufWriter::new(out),
            coding: Encoder::default(),
            payload: Vec::with_capacity(256),
        };
        writer.put(&MAGIC)?;
        writer.put(&VERSION.to_le_bytes())?;
        writer.write(&Frame::Header(header))?;
        Ok(writer)
    }

    /// Appends one frame.
    ///
    /// # Errors
    /// [`Error::Write`], after which the file is cut at some frame; [`Error::TooLarge`], after
    /// which it is whole and goes on without this one.
    pub fn write(&mut self, frame: &Frame) -> Result<(), Error> {
        if let Some(task) = self.coding.new_task(frame) {
            self.frame(&task)?;
        }
        // The coding's clock moves only with a frame that is really written.
        let before = self.coding.last_ns();
        let wire = self.coding.encode(frame);
        let written = self.frame(&wire);
        if matches!(written, Err(Error::TooLarge { .. })) {
            self.coding.rewind(before);
        }
        written
    }

    /// Hands what is buffered to the system, so that it outlives the recorder.
    ///
    /// # Errors
    /// [`Error::Write`].
    pub fn flush(&mut self) -> Result<(), Error> {
        self.out.flush().map_err(|source| Error::Write {
            name: self.name.clone(),
            source,
        })
    }

    /// Appends the end frame, flushes, and gives the stream back.
    ///
    /// # Errors
    /// [`Error::Write`].
    pub fn finish(mut self, at_ns: u64) -> Result<W, Error> {
        self.write(&Frame::End { at_ns })?;
        let name = self.name;
        self.out.into_inner().map_err(|error| Error::Write {
            name,
            source: error.into_error(),
        })
    }

    fn frame(&mut self, wire: &Wire<'_>) -> Result<(), Error> {
        let mut payload = std::mem::take(&mut self.payload);
        payload.clear();
        let too_large = |_| Error::TooLarge {
            name: self.name.clone(),
        };
        payload = postcard::to_extend(wire, payload).map_err(too_large)?;
        if payload.len() > MAX_FRAME {
            return Err(Error::TooLarge {
                name: self.name.clone(),
            });
        }
        let mut length = [0; 10];
        let length = postcard::to_slice(&payload.len(), &mut length).map_err(too_large)?;
        self.put(length)?;
        self.put(&payload)?;
        self.payload = payload;
        Ok(())
    }

    fn put(&mut self, bytes: &[u8]) -> Result<(), Error> {
        self.out.write_all(bytes).map_err(|source| Error::Write {
            name: self.name.clone(),
            source,
        })
    }
}
