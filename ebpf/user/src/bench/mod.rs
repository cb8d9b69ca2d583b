//! One guest, migrated again and again by two monitors in turn: the measurement behind `blackout
//! bench`.
//!
//! [`Scenario`] migrates once and records it; [`order`] says whose turn it is and when to look at what
//! has come of it; [`revision`] builds what is named by a git revision. The verdicts are those of [`crate::gate`].

pub mod order;
mod process;
mod qmp;
pub mod revision;
mod scenario;

use std::io;
use std::path::PathBuf;
use std::process::ExitStatus;

use thiserror::Error;

pub use scenario::Scenario;

/// Why a migration could not be measured.
#[derive(Debug, Error)]
pub enum Error {
    /// A program could not be started.
    #[error("cannot start {}", .0.display())]
    Start(PathBuf, #[source] io::Error),
    /// A program ended when it should have gone on.
    #[error("{} ended with {status}: {said}", program.display())]
    Ended {
        /// Which.
        program: PathBuf,
        /// How.
        status: ExitStatus,
        /// Its last words.
        said: String,
    },
    /// Something took too long.
    #[error("{what} took longer than {seconds} s")]
    Timeout {
        /// What was waited for.
        what: String,
        /// For how long.
        seconds: u64,
    },
    /// A monitor's QMP could not be read or written.
    #[error("QMP of the {monitor}")]
    Qmp {
        /// `source` or `destination`.
        monitor: &'static str,
        /// The system's reason.
        source: io::Error,
    },
    /// A monitor refused a command.
    #[error("QMP of the {monitor}: {command}: {answer}")]
    Refused {
        /// `source` or `destination`.
        monitor: &'static str,
        /// The verb.
        command: &'static str,
        /// What it answered.
        answer: String,
    },
    /// What is neither a program nor a revision that builds.
    #[error("{name}: no such file, and {why}")]
    Revision {
        /// What was asked for.
        name: String,
        /// Why it is no revision either.
        why: String,
    },
    /// A file, a folder or a port could not be had.
    #[error("cannot {what}")]
    System {
        /// What was tried.
        what: String,
        /// The system's reason.
        source: io::Error,
    },
}
