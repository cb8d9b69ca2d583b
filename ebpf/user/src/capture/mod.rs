//! Capture: from a running process to the frames of a recording.
//!
//! [`Recorder`] is the whole of it: it loads the eBPF [`Programs`], puts them onto what this kernel
//! offers, attaches to processes, and turns what arrives into frames. `cli/record.rs` drives it;
//! `cli/doctor.rs` uses [`Programs`] alone to see what the kernel takes, and [`kernel`] to say why
//! it does not.
//!
//! One file for each question: what is loaded ([`programs`](Programs)), where it could be put
//! ([`sources`](Source)) and what the kernel takes of that (`attach`), which probes are wanted and what their sites look like ([`sites`]), what a file
//! descriptor stands for (`fds`), what a record means (`translate`), what a process is (`process`),
//! how one is started so that no probe of it is missed ([`Child`]), which capabilities all that takes
//! ([`rights`]).

mod attach;
mod child;
mod clock;
mod fds;
pub mod kernel;
mod multi;
mod object;
mod process;
mod programs;
mod recorder;
pub mod rights;
pub mod sites;
mod sources;
mod translate;

use std::io;
use std::path::PathBuf;

use aya::EbpfError;
use aya::maps::MapError;
use thiserror::Error;

use crate::{recording, usdt};

pub use child::Child;
pub use clock::monotonic;
pub use object::object;
pub use process::{with_exe, with_name, with_vm};
pub use programs::{Options, Programs};
pub use recorder::{Recorder, Summary, Totals};
use rights::Right;
pub use sources::{Backend, Coverage, Refusal, Source};

/// Why nothing could be recorded.
#[derive(Debug, Error)]
pub enum Error {
    /// The program was built without the eBPF object.
    #[error(
        "this `blackout` was built without its eBPF programs: build it with `cargo xtask build`, \
         or name an object file with --bpf-object"
    )]
    NoObject,
    /// A file could not be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// Which file.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// The process lacks a capability.
    #[error(
        "the right {} is missing, which it takes to {}: run as root (`blackout doctor` says more)",
        .0.name, .0.what_for
    )]
    Rights(Right),
    /// The eBPF object could not be loaded.
    #[error("cannot load the eBPF object (`blackout doctor` says what this kernel lacks)")]
    Load(#[source] Box<EbpfError>),
    /// The object lacks a program or map, so it is another version's.
    #[error("the eBPF object has no `{0}`: it was built for another version of this tool")]
    Foreign(&'static str),
    /// A map could not be used.
    #[error("cannot use the eBPF map `{name}`")]
    Map {
        /// Its name.
        name: &'static str,
        /// aya's reason.
        source: MapError,
    },
    /// The kernel takes no program for a source without which nothing can be recorded.
    #[error("the kernel refuses the program for {what}: {why} (`blackout doctor` says more)")]
    Refused {
        /// What it is for.
        what: &'static str,
        /// The kernel's reason.
        why: String,
    },
    /// A system call failed.
    #[error("cannot {what}")]
    System {
        /// What was tried.
        what: String,
        /// The system's reason.
        source: io::Error,
    },
    /// More probe sites than the programs have room for.
    #[error("more than {limit} probe sites are wanted: narrow the choice with --probe")]
    TooManySites {
        /// The bound.
        limit: usize,
    },
    /// A probe could not be read or attached.
    #[error(transparent)]
    Usdt(#[from] usdt::Error),
    /// The recording could not be written.
    #[error(transparent)]
    Recording(#[from] recording::Error),
}
