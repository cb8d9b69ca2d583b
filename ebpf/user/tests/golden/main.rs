//! Recordings, and exactly what the tool makes of them.
//!
//! The expected outputs are in `expected/`; `BLESS=1 cargo test -p blackout --test golden` rewrites
//! them, and the diff is then for a person to judge.

mod chrome;
mod crowded;
mod exports;
mod hostile;
mod merge;
#[path = "../../../../tests/perfetto/query.rs"]
mod perfetto;
mod report;
mod scenarios;
mod silent;
mod steps;
mod tape;

use std::fs;
use std::path::{Path, PathBuf};

/// A real migration; see `recordings/README.md`.
const TESTBED: &[u8] = include_bytes!("recordings/testbed.rec");

/// Compares `actual` with the file `expected/NAME`, or writes it there when asked to.
fn check(name: &str, actual: &[u8]) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/golden/expected")
        .join(name);
    if std::env::var_os("BLESS").is_some() {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, actual).unwrap();
        return;
    }
    let expected = fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    if expected != actual {
        let seen = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(name);
        fs::write(&seen, actual).unwrap();
        panic!("differs: diff {} {}", path.display(), seen.display());
    }
}
