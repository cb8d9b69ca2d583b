//! Descriptors that clients pass and name: `getfd`, `closefd`, and the `fd:` URIs.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;

use rustix::process::{PidfdFlags, PidfdGetfdFlags, getpid, pidfd_getfd, pidfd_open};

use crate::probes::Errno;

/// Descriptors that one client may have named at once.
const MOST: usize = 64;

/// There is no such descriptor, or no more can be had. Where QEMU has the same error, the text is
/// QEMU's.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// `closefd`.
    #[error("File descriptor named '{0}' not found")]
    NotFound(String),
    /// `fd:`.
    #[error("File descriptor named '{0}' has not been found")]
    NotHere(String),
    /// A number that this process has not open.
    #[error("this process has no file descriptor {0}")]
    NotOpen(String),
    /// `getfd` without one.
    #[error("No file descriptor supplied via SCM_RIGHTS")]
    NoneSupplied,
    /// It would be taken for a number.
    #[error("Parameter 'fdname' expects a name not starting with a digit")]
    Digit,
    /// Too many.
    #[error("a client can have {MOST} named file descriptors; close one with closefd")]
    TooMany,
}

impl Errno for Error {
    fn errno(&self) -> i32 {
        match self {
            Error::NotFound(_) | Error::NotHere(_) | Error::NotOpen(_) => libc::EBADF,
            Error::NoneSupplied | Error::Digit => libc::EINVAL,
            Error::TooMany => libc::EMFILE,
        }
    }
}

/// One client's descriptors. They are closed when it leaves.
#[derive(Debug, Default)]
pub struct Descriptors {
    named: BTreeMap<String, OwnedFd>,
    /// Came with the client's last bytes and has no name yet.
    passed: Option<OwnedFd>,
}

impl Descriptors {
    /// A descriptor has arrived; one that came before and was not named is closed, as in QEMU.
    pub fn pass(&mut self, fd: OwnedFd) {
        self.passed = Some(fd);
    }

    /// `getfd`: names the descriptor that arrived last. One that has the name already is closed.
    ///
    /// # Errors
    /// When there is none, or the name can't be had.
    pub fn name(&mut self, name: String) -> Result<(), Error> {
        let fd = self.passed.take().ok_or(Error::NoneSupplied)?;
        if name.starts_with(|c: char| c.is_ascii_digit()) {
            return Err(Error::Digit);
        }
        if self.named.len() >= MOST && !self.named.contains_key(&name) {
            return Err(Error::TooMany);
        }
        self.named.insert(name, fd);
        Ok(())
    }

    /// `closefd`.
    ///
    /// # Errors
    /// When there is none of that name.
    pub fn close(&mut self, name: &str) -> Result<(), Error> {
        let closed = self.named.remove(name);
        closed.map(drop).ok_or(Error::NotFound(name.to_owned()))
    }

    /// Gives away the one that an `fd:` URI means: by its name, or by the number under which this
    /// process was started with it.
    ///
    /// # Errors
    /// When there is none.
    pub fn take(&mut self, name: &str) -> Result<OwnedFd, Error> {
        if !name.starts_with(|c: char| c.is_ascii_digit()) {
            let taken = self.named.remove(name);
            return taken.ok_or(Error::NotHere(name.to_owned()));
        }
        let not_open = || Error::NotOpen(name.to_owned());
        let number = name.parse().map_err(|_| not_open())?;
        // A number may be anything, so it is not taken over but duplicated, with all checks.
        let own = pidfd_open(getpid(), PidfdFlags::empty()).map_err(|_| not_open())?;
        pidfd_getfd(own, number, PidfdGetfdFlags::empty()).map_err(|_| not_open())
    }
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::os::fd::AsRawFd;

    use super::*;

    #[test]
    fn a_descriptor_is_named_taken_and_closed_once() {
        let mut descriptors = Descriptors::default();
        let fd = || OwnedFd::from(io::pipe().unwrap().0);
        assert_eq!(descriptors.name("a".into()), Err(Error::NoneSupplied));
        descriptors.pass(fd());
        descriptors.name("a".into()).unwrap();
        assert_eq!(descriptors.name("a".into()), Err(Error::NoneSupplied));
        descriptors.take("a").unwrap();
        assert_eq!(
            descriptors.take("a").unwrap_err(),
            Error::NotHere("a".into())
        );
        assert_eq!(descriptors.close("a"), Err(Error::NotFound("a".into())));
        descriptors.pass(fd());
        assert_eq!(descriptors.name("1a".into()), Err(Error::Digit));
        for number in 0..MOST {
            descriptors.pass(fd());
            descriptors.name(format!("n{number}")).unwrap();
        }
        descriptors.pass(fd());
        assert_eq!(descriptors.name("more".into()), Err(Error::TooMany));
        descriptors.close("n0").unwrap();
    }

    #[test]
    fn a_number_is_a_descriptor_of_this_process() {
        let (reader, _writer) = io::pipe().unwrap();
        let mut descriptors = Descriptors::default();
        let taken = descriptors.take(&reader.as_raw_fd().to_string()).unwrap();
        assert_ne!(taken.as_raw_fd(), reader.as_raw_fd());
        for number in ["999999", "1x", "99999999999"] {
            assert_eq!(
                descriptors.take(number).unwrap_err(),
                Error::NotOpen(number.into())
            );
        }
    }
}
