//! A recording that is read more than once.

use std::fs::File;
use std::io::{self, Read, Seek};
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::{Error, Reader};

/// A recording in a file. Each [`Stored::reader`] begins at its begin and ends where the file ended
/// when it was opened, though a recorder may have gone on since.
#[derive(Debug)]
pub struct Stored {
    name: String,
    file: File,
    length: u64,
}

impl Stored {
    /// Opens the file at `path`. What is no file, such as a pipe, is copied to a nameless one first.
    ///
    /// # Errors
    /// [`Error::Open`], [`Error::Read`].
    pub fn open(path: &Path) -> Result<Self, Error> {
        let open_error = |source| Error::Open {
            path: path.to_path_buf(),
            source,
        };
        let name = path.display().to_string();
        let mut file = File::open(path).map_err(open_error)?;
        let kind = file.metadata().map_err(open_error)?;
        if kind.is_file() {
            let length = kind.len();
            return Ok(Self { name, file, length });
        }
        let copy = |file: &mut File| {
            let mut copy = tempfile::tempfile()?;
            io::copy(file, &mut copy)?;
            let length = copy.stream_position()?;
            Ok((copy, length))
        };
        match copy(&mut file) {
            Ok((file, length)) => Ok(Self { name, file, length }),
            Err(source) => Err(Error::Read {
                name,
                offset: 0,
                source,
            }),
        }
    }

    /// What messages call it: its path.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Reads it from its begin.
    ///
    /// # Errors
    /// What [`Reader::new`] returns.
    pub fn reader(&self) -> Result<Reader<impl Read + '_>, Error> {
        let part = Part {
            file: &self.file,
            at: 0,
            end: self.length,
        };
        Reader::new(self.name.clone(), part)
    }
}

/// What of a file lies between two places.
struct Part<'f> {
    file: &'f File,
    at: u64,
    end: u64,
}

impl Read for Part<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let left = usize::try_from(self.end.saturating_sub(self.at)).unwrap_or(usize::MAX);
        let length = left.min(into.len());
        let read = self
            .file
            .read_at(into.get_mut(..length).unwrap_or_default(), self.at)?;
        self.at += read as u64;
        Ok(read)
    }
}
