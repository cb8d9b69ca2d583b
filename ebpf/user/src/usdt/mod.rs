//! USDT on Linux: reads the probes of an ELF file and attaches an eBPF program to them.
//!
//! A USDT probe ("statically defined tracing", `sys/sdt.h`) is a nop in the code and a note that
//! names it: provider, name, and where its arguments are at that moment, in the words of the
//! assembler. [`Binary::open`] reads the notes; [`Uprobes::attach`] puts a uprobe onto a site,
//! raises its semaphore, and gives the program a cookie that says which site it is.
//!
//! An [`Operand`] is free of the architecture: registers are byte offsets into the registers that
//! the kernel saves, so that one program can evaluate the operands of every site.
//!
//! The module stands by itself: it uses nothing of the crate around it. Files are hostile input:
//! what is read of one is bounded, and a bad one is an [`Error`](enum@Error).
//!
//! Sources: systemtap's `sys/sdt.h`
//! (<https://sourceware.org/systemtap/wiki/UserSpaceProbeImplementation>) for the notes,
//! `perf_event_open(2)` and `bpf(2)` for the attaching.

mod aarch64;
mod attach;
mod elf;
mod note;
mod operand;
#[cfg(test)]
mod tests;
mod x86_64;

use std::io;
use std::path::PathBuf;

use thiserror::Error;

pub use attach::{Attachment, Point, Uprobes};
pub use elf::Machine;
pub use note::{Binary, Dangling, Site};
pub use operand::{Arg, Operand};

/// Why probes could not be read or attached.
#[derive(Debug, Error)]
pub enum Error {
    /// The file could not be opened.
    #[error("cannot open {}", path.display())]
    Open {
        /// Which file.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// A part of the file could not be read; most often the file is cut.
    #[error("cannot read the {what} of {} ({size} bytes at {offset:#x})", path.display())]
    Read {
        /// Which file.
        path: PathBuf,
        /// Which part.
        what: &'static str,
        /// Where it should be.
        offset: u64,
        /// How long it should be.
        size: u64,
        /// The system's reason.
        source: io::Error,
    },
    /// The file is of a kind that has no probes that could be attached.
    #[error("{} is not a 64-bit little-endian ELF file for x86-64 or arm64", path.display())]
    NotElf {
        /// Which file.
        path: PathBuf,
    },
    /// The file contradicts itself.
    #[error("{}: damaged {what}", path.display())]
    Damaged {
        /// Which file.
        path: PathBuf,
        /// Which part.
        what: &'static str,
    },
    /// A part of the file is larger than any that this reader takes.
    #[error("the {what} of {} is {size} bytes long, at most {limit} are read", path.display())]
    TooLarge {
        /// Which file.
        path: PathBuf,
        /// Which part.
        what: &'static str,
        /// Its size.
        size: u64,
        /// The bound.
        limit: u64,
    },
    /// The kernel has no uprobes to attach by.
    #[error("this kernel has no uprobe PMU (CONFIG_UPROBE_EVENTS): cannot use {}", path.display())]
    NoUprobes {
        /// The file in sysfs that says so.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// The kernel cannot raise semaphores, and the site has one.
    #[error("the probe has a semaphore, which this kernel cannot raise (Linux 4.20 and later can)")]
    NoSemaphores,
    /// The path cannot be passed to the kernel.
    #[error("{} cannot be passed to the kernel: it has a NUL in it", path.display())]
    Path {
        /// Which path.
        path: PathBuf,
    },
    /// The kernel refused the uprobe.
    #[error("cannot put a uprobe at offset {offset:#x} of {}", path.display())]
    Uprobe {
        /// Which file.
        path: PathBuf,
        /// Where in it.
        offset: u64,
        /// The system's reason.
        source: io::Error,
    },
    /// The kernel refused to run the program on the uprobe, or on the uprobes from it on.
    #[error("cannot link the program to the uprobes of {}, at offset {offset:#x}", path.display())]
    Link {
        /// Which file.
        path: PathBuf,
        /// Where in it.
        offset: u64,
        /// The system's reason.
        source: io::Error,
    },
}
