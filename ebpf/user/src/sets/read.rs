//! Finds and reads the files of a set.
//!
//! A file is a recording, a report (`blackout.report/1`) or samples (`blackout.samples/1`). Of a
//! folder, every recording counts, or, if it has none, every report and samples; other files are
//! passed over. A folder in it is one run: its recordings are read together, as of a source and a
//! destination on two hosts.

use std::fs::{self, File};
use std::io::{self, BufReader, Read};
use std::path::{Path, PathBuf};

use serde_json::Value;
use thiserror::Error;

use super::collect::{self, Collector};
use super::{SCHEMA, Samples};
use crate::analysis::{self, Loaded};
use crate::recording::{self, MAGIC};
use crate::report::schema::{self, Report};

/// The largest JSON file that is read, in bytes: thousands of migrations.
const JSON_MAX: u64 = 1 << 30;

/// Why a set could not be read.
#[derive(Debug, Error)]
pub enum Error {
    /// A file or folder could not be opened or listed.
    #[error("cannot read {}", .0.display())]
    Open(PathBuf, #[source] io::Error),
    /// A recording is damaged.
    #[error(transparent)]
    Recording(#[from] recording::Error),
    /// A JSON file is damaged, or not of the schema that it claims.
    #[error("{}", .0.display())]
    Json(PathBuf, #[source] serde_json::Error),
    /// A JSON file is larger than `JSON_MAX`.
    #[error("{}: larger than {JSON_MAX} bytes", .0.display())]
    TooLarge(PathBuf),
    /// A file is neither a recording nor JSON of a known schema.
    #[error(
        "{} is neither a recording, nor JSON of schema {} or {SCHEMA}", .0.display(), schema::SCHEMA
    )]
    Unknown(PathBuf),
    /// The migrations do not make one set.
    #[error("{}", .0.display())]
    Set(PathBuf, #[source] collect::Error),
}

/// What a file is.
enum Kind {
    Recording,
    Json,
}

/// Reads `paths` into `set`. A file that is named has to be readable; one that is only found in a
/// folder is skipped if it is something else.
///
/// # Errors
/// What could not be read, and where.
pub fn into(set: &mut Collector, paths: &[PathBuf]) -> Result<(), Error> {
    for path in paths {
        if path.is_dir() {
            folder(set, path)?;
        } else {
            match kind(path)? {
                Some(Kind::Recording) => joined(set, path, std::slice::from_ref(path))?,
                Some(Kind::Json) => json(set, path)?,
                None => return Err(Error::Unknown(path.clone())),
            }
        }
    }
    Ok(())
}

fn folder(set: &mut Collector, path: &Path) -> Result<(), Error> {
    let (folders, files): (Vec<_>, Vec<_>) =
        entries(path)?.into_iter().partition(|entry| entry.is_dir());
    let (recordings, reports) = sort(files)?;
    for recording in &recordings {
        joined(set, recording, std::slice::from_ref(recording))?;
    }
    if recordings.is_empty() {
        found(set, &reports)?;
    }
    for run in folders {
        // What is deeper is not a part of the run.
        let files = entries(&run)?.into_iter().filter(|entry| !entry.is_dir());
        let (recordings, reports) = sort(files.collect())?;
        match recordings.as_slice() {
            [] => found(set, &reports)?,
            recordings => joined(set, &run, recordings)?,
        }
    }
    Ok(())
}

/// The recordings and the JSON files among `files`.
fn sort(files: Vec<PathBuf>) -> Result<(Vec<PathBuf>, Vec<PathBuf>), Error> {
    let (mut recordings, mut reports) = (Vec::new(), Vec::new());
    for file in files {
        match kind(&file)? {
            Some(Kind::Recording) => recordings.push(file),
            Some(Kind::Json) => reports.push(file),
            None => {}
        }
    }
    Ok((recordings, reports))
}

/// Reads those of the JSON files that were found which have samples.
fn found(set: &mut Collector, reports: &[PathBuf]) -> Result<(), Error> {
    for report in reports {
        match json(set, report) {
            Err(Error::Unknown(_)) => {}
            read => read?,
        }
    }
    Ok(())
}

fn entries(path: &Path) -> Result<Vec<PathBuf>, Error> {
    let list = || -> io::Result<Vec<PathBuf>> {
        fs::read_dir(path)?.map(|entry| Ok(entry?.path())).collect()
    };
    let mut entries = list().map_err(|source| Error::Open(path.to_owned(), source))?;
    entries.sort();
    Ok(entries)
}

/// What the file's first bytes say that it is.
fn kind(path: &Path) -> Result<Option<Kind>, Error> {
    let read = || -> io::Result<Vec<u8>> {
        let mut head = Vec::new();
        File::open(path)?.take(64).read_to_end(&mut head)?;
        Ok(head)
    };
    let head = read().map_err(|source| Error::Open(path.to_owned(), source))?;
    let first = head.iter().find(|byte| !byte.is_ascii_whitespace());
    Ok(match first {
        _ if head.starts_with(&MAGIC) => Some(Kind::Recording),
        Some(b'{') => Some(Kind::Json),
        _ => None,
    })
}

fn joined(set: &mut Collector, place: &Path, paths: &[PathBuf]) -> Result<(), Error> {
    let mut recordings = Vec::new();
    for path in paths {
        recordings.extend(Loaded::read_migrations(path)?);
    }
    let report = Report::new(&analysis::find(&recordings));
    add(set, place, &report)
}

fn json(set: &mut Collector, path: &Path) -> Result<(), Error> {
    let failed = |source| Error::Open(path.to_owned(), source);
    let open = File::open(path).map_err(failed)?;
    if open.metadata().map_err(failed)?.len() > JSON_MAX {
        return Err(Error::TooLarge(path.to_owned()));
    }
    let damaged = |source| Error::Json(path.to_owned(), source);
    let value: Value = serde_json::from_reader(BufReader::new(open)).map_err(damaged)?;
    match value.get("schema").and_then(Value::as_str) {
        Some(schema::SCHEMA) => {
            let report: Report = serde_json::from_value(value).map_err(damaged)?;
            add(set, path, &report)
        }
        Some(SCHEMA) => {
            let samples: Samples = serde_json::from_value(value).map_err(damaged)?;
            let failed = |source| Error::Set(path.to_owned(), source);
            set.extend(samples).map_err(failed)
        }
        _ => Err(Error::Unknown(path.to_owned())),
    }
}

fn add(set: &mut Collector, path: &Path, report: &Report) -> Result<(), Error> {
    for migration in &report.migrations {
        set.add(migration)
            .map_err(|source| Error::Set(path.to_owned(), source))?;
    }
    Ok(())
}
