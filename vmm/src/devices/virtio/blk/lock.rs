//! The lock of an image: one monitor writes, or several read.
//!
//! It is QEMU's protocol (`block/file-posix.c`), so that QEMU is kept out too: open file description
//! locks, shared ones, each on a byte that says something. A byte from 100 on says "I do this", one
//! from 200 on "nobody else may". Who has taken its bytes looks whether somebody has one that
//! contradicts. A disk that changes hands between two monitors is unlocked by the source before it
//! commits and locked by the destination after that.

use std::fs::File;
use std::io;

use nix::fcntl::{FcntlArg, fcntl};

/// What a byte stands for: added to one of the two bases.
const READ: i64 = 0;
const WRITE: i64 = 1;
const I_DO: i64 = 100;
const NOBODY_MAY: i64 = 200;

/// The lock of one image.
#[derive(Debug)]
pub(super) struct ImageLock {
    file: File,
    readonly: bool,
    held: bool,
}

impl ImageLock {
    /// Not taken yet.
    pub(super) fn new(file: &File, readonly: bool) -> io::Result<Self> {
        Ok(ImageLock {
            file: file.try_clone()?,
            readonly,
            held: false,
        })
    }

    /// Takes it; held already, nothing happens.
    ///
    /// # Errors
    /// `EBUSY` when another process has the image in a way that excludes this one.
    pub(super) fn take(&mut self) -> io::Result<()> {
        if self.held {
            return Ok(());
        }
        let doing: &[i64] = if self.readonly {
            &[READ]
        } else {
            &[READ, WRITE]
        };
        // Nobody else may write: neither beside a writer nor under a reader.
        let taken = doing
            .iter()
            .map(|what| I_DO + what)
            .chain([NOBODY_MAY + WRITE])
            .try_for_each(|byte| self.set(byte, libc::F_RDLCK));
        let free = taken.and_then(|()| {
            let mut against = vec![I_DO + WRITE];
            against.extend(doing.iter().map(|what| NOBODY_MAY + what));
            against
                .into_iter()
                .try_for_each(|byte| self.nobody_has(byte))
        });
        match free {
            Ok(()) => {
                self.held = true;
                Ok(())
            }
            Err(error) => {
                self.unlock();
                Err(error)
            }
        }
    }

    /// Gives it up.
    pub(super) fn give_up(&mut self) {
        if std::mem::take(&mut self.held) {
            self.unlock();
        }
    }

    fn unlock(&self) {
        for byte in [I_DO + READ, I_DO + WRITE, NOBODY_MAY + WRITE] {
            if let Err(error) = self.set(byte, libc::F_UNLCK) {
                tracing::error!("an image stays locked: {error}");
            }
        }
    }

    fn set(&self, byte: i64, kind: i32) -> io::Result<()> {
        fcntl(&self.file, FcntlArg::F_OFD_SETLK(&range(byte, kind)))?;
        Ok(())
    }

    /// Looks whether an exclusive lock could be had, which our own locks do not stand against.
    fn nobody_has(&self, byte: i64) -> io::Result<()> {
        let mut lock = range(byte, libc::F_WRLCK);
        fcntl(&self.file, FcntlArg::F_OFD_GETLK(&mut lock))?;
        if i32::from(lock.l_type) == libc::F_UNLCK {
            return Ok(());
        }
        Err(io::Error::from_raw_os_error(libc::EBUSY))
    }
}

fn range(byte: i64, kind: i32) -> libc::flock {
    libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: byte,
        l_len: 1,
        l_pid: 0,
    }
}

#[cfg(test)]
mod tests {
    use std::fs::OpenOptions;

    use super::*;

    #[test]
    fn one_writes_or_several_read() {
        let image = tempfile::NamedTempFile::new().unwrap();
        let lock = |readonly| {
            let file = OpenOptions::new().read(true).write(true).open(image.path());
            ImageLock::new(&file.unwrap(), readonly).unwrap()
        };
        let busy = |lock: &mut ImageLock| {
            lock.take()
                .is_err_and(|e| e.raw_os_error() == Some(libc::EBUSY))
        };
        let (mut writer, mut other, mut reader, mut second) =
            (lock(false), lock(false), lock(true), lock(true));
        writer.take().unwrap();
        writer.take().unwrap();
        assert!(busy(&mut other) && busy(&mut reader));
        writer.give_up();
        other.take().unwrap();
        assert!(busy(&mut writer));
        drop(other);
        reader.take().unwrap();
        second.take().unwrap();
        assert!(busy(&mut writer));
        reader.give_up();
        second.give_up();
        writer.take().unwrap();
    }
}
