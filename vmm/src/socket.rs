//! Listening on a unix socket whose file comes and goes with the listener.

use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

/// A socket can't be listened on.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Another process answers there.
    #[error("socket {}: another process listens on it", .0.display())]
    InUse(PathBuf),
    /// Something else has that name.
    #[error("socket {}: a file of that name is there, and it is no socket", .0.display())]
    NotASocket(PathBuf),
    /// The system refused.
    #[error("can't listen on socket {}", path.display())]
    Listen {
        /// The socket.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// The file of a listening socket; removed when this is dropped.
#[derive(Debug)]
pub struct SocketFile {
    path: PathBuf,
    /// Device and inode: a file that took the name later is left alone.
    identity: (u64, u64),
}

/// Listens on `path`. A socket that a dead process left there is replaced.
///
/// # Errors
/// Why the socket can't be had.
pub fn listen(path: &Path) -> Result<(UnixListener, SocketFile), Error> {
    remove_stale(path)?;
    let failed = |source| Error::Listen {
        path: path.to_owned(),
        source,
    };
    let listener = UnixListener::bind(path).map_err(failed)?;
    let file = SocketFile {
        path: path.to_owned(),
        identity: identity(path).map_err(failed)?,
    };
    Ok((listener, file))
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if identity(&self.path).is_ok_and(|file| file == self.identity) {
            // Whoever removed it in between has done the work.
            let _ = fs::remove_file(&self.path);
        }
    }
}

fn identity(path: &Path) -> io::Result<(u64, u64)> {
    fs::symlink_metadata(path).map(|meta| (meta.dev(), meta.ino()))
}

/// Makes way for the socket, unless someone uses that name.
fn remove_stale(path: &Path) -> Result<(), Error> {
    let Ok(meta) = fs::symlink_metadata(path) else {
        return Ok(());
    };
    if !meta.file_type().is_socket() {
        return Err(Error::NotASocket(path.to_owned()));
    }
    match UnixStream::connect(path) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => fs::remove_file(path)
            .map_err(|source| Error::Listen {
                path: path.to_owned(),
                source,
            }),
        _ => Err(Error::InUse(path.to_owned())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_is_taken_over_only_from_the_dead() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let (listener, file) = listen(&path).unwrap();
        assert!(matches!(listen(&path), Err(Error::InUse(_))));
        drop(file);
        assert!(!path.exists());
        drop(listener);

        drop(UnixListener::bind(&path).unwrap());
        let (_listener, file) = listen(&path).unwrap();
        UnixStream::connect(&path).unwrap();
        fs::remove_file(&path).unwrap();
        fs::write(&path, "").unwrap();
        drop(file);
        assert!(path.exists(), "another one's file was removed");
        assert!(matches!(listen(&path), Err(Error::NotASocket(_))));

        let absent = listen(&folder.path().join("no/such/folder"));
        assert!(matches!(absent, Err(Error::Listen { .. })));
    }
}
