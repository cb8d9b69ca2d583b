//! The folder of migrations that were kept: the last ones, and no more than it may hold.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use thiserror::Error;

/// What a segment is called while it grows.
const PART: &str = "part";
/// What it is called when it is kept.
const KEPT: &str = "rec";

/// Why nothing could be kept.
#[derive(Debug, Error)]
pub enum Error {
    /// The folder could not be made or read.
    #[error("cannot use the folder {}", .0.display())]
    Folder(PathBuf, #[source] io::Error),
    /// A recording could not be renamed or removed.
    #[error("cannot put {} in its place", .0.display())]
    File(PathBuf, #[source] io::Error),
}

/// A bounded folder of recordings.
#[derive(Debug)]
pub struct Folder {
    path: PathBuf,
    /// At most so many recordings.
    count: usize,
    /// At most so many bytes of them.
    bytes: u64,
    segment: PathBuf,
    /// Tells the segments of one second apart.
    number: u64,
}

impl Folder {
    /// Opens or makes the folder. A segment that a killed watcher left behind is in the list that
    /// comes with it.
    ///
    /// # Errors
    /// [`Error::Folder`].
    pub fn open(path: &Path, count: usize, bytes: u64) -> Result<(Self, Vec<PathBuf>), Error> {
        let failed = |source| Error::Folder(path.to_owned(), source);
        fs::create_dir_all(path).map_err(failed)?;
        let left = files(path, PART).map_err(failed)?;
        let mut folder = Self {
            path: path.to_owned(),
            count,
            bytes,
            segment: PathBuf::new(),
            number: 0,
        };
        folder.segment = folder.next_segment();
        Ok((folder, left))
    }

    /// The segment that grows.
    pub fn segment(&self) -> &Path {
        &self.segment
    }

    /// A name for the next one.
    pub fn next_segment(&mut self) -> PathBuf {
        self.number += 1;
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        let seconds = now.map_or(0, |now| now.as_secs());
        // The names sort by time.
        let name = format!("{seconds:012}-{:06}.{PART}", self.number % 1_000_000);
        self.path.join(name)
    }

    /// From here on `next` grows; gives the one that has ended.
    pub fn replace_segment(&mut self, next: PathBuf) -> PathBuf {
        std::mem::replace(&mut self.segment, next)
    }

    /// Keeps a segment that has ended if there are `migrations` in it, and makes room for it.
    ///
    /// # Errors
    /// [`Error::File`] and [`Error::Folder`].
    pub fn keep(&self, segment: PathBuf, migrations: usize) -> Result<(), Error> {
        let failed = |path: &Path| {
            let path = path.to_owned();
            |source| Error::File(path, source)
        };
        if migrations == 0 {
            return fs::remove_file(&segment).map_err(failed(&segment));
        }
        let kept = segment.with_extension(KEPT);
        fs::rename(&segment, &kept).map_err(failed(&segment))?;
        let list = files(&self.path, KEPT);
        let list = list.map_err(|source| Error::Folder(self.path.clone(), source))?;
        let mut bytes = 0_u64;
        for (newer, path) in list.iter().rev().enumerate() {
            let size = fs::metadata(path).map_or(0, |file| file.len());
            bytes = bytes.saturating_add(size);
            // The newest stays, however large it is.
            if newer > 0 && (newer >= self.count || bytes > self.bytes) {
                fs::remove_file(path).map_err(failed(path))?;
            }
        }
        Ok(())
    }
}

/// The files with that ending, the oldest first.
fn files(folder: &Path, ending: &str) -> io::Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path
            .extension()
            .is_some_and(|extension| extension == ending)
        {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(folder: &Path) -> usize {
        fs::read_dir(folder).unwrap().count()
    }

    fn segment(folder: &mut Folder, size: usize) -> PathBuf {
        let next = folder.next_segment();
        fs::write(&next, vec![0; size]).unwrap();
        next
    }

    #[test]
    fn the_last_ones_are_kept() {
        let place = tempfile::tempdir().unwrap();
        let (mut folder, left) = Folder::open(place.path(), 3, 1000).unwrap();
        assert!(left.is_empty());
        let mut last = PathBuf::new();
        for _ in 0..5 {
            let idle = segment(&mut folder, 1);
            folder.keep(idle, 0).unwrap();
            last = segment(&mut folder, 10);
            folder.keep(last.clone(), 1).unwrap();
        }
        assert_eq!(names(place.path()), 3);
        assert!(last.with_extension(KEPT).exists());
        // Larger than all the room there is: it takes the place of all.
        let large = segment(&mut folder, 2000);
        folder.keep(large, 2).unwrap();
        assert_eq!(names(place.path()), 1);
    }

    #[test]
    fn what_a_killed_one_left_is_found() {
        let place = tempfile::tempdir().unwrap();
        let (mut folder, _) = Folder::open(place.path(), 3, 1000).unwrap();
        let left = segment(&mut folder, 10);
        let (_, found) = Folder::open(place.path(), 3, 1000).unwrap();
        assert_eq!(found, [left]);
    }
}
