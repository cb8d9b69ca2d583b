#![doc = include_str!("FORMAT.md")]

mod frame;
mod reader;
mod stored;
#[cfg(test)]
mod tests;
mod wire;
mod writer;

pub use frame::{
    ArgDef, Basis, Calls, ClockAnchor, Cost, DeviceAttr, FdKind, Frame, Header, Hit, Ioctl,
    KernelFn, ProbeDef, Process, Relation, Thread, Value, ValueKind, VcpuEdges, VcpuGap, VcpuGuest,
};
pub use reader::{Ending, Reader};
pub use stored::Stored;
pub use writer::Writer;

use std::io;
use std::path::PathBuf;

use thiserror::Error;

/// The first bytes of every recording.
pub const MAGIC: [u8; 8] = *b"BLACKOUT";

/// The version that this tool writes, and the only one that it reads.
pub const VERSION: u16 = 1;

/// The largest payload of a frame, in bytes: far above any real frame, far below what would hurt.
pub const MAX_FRAME: usize = 64 * 1024;

/// Why a recording could not be written or read. Offsets are bytes from the start of the file.
#[derive(Debug, Error)]
pub enum Error {
    /// The file could not be opened or created.
    #[error("cannot open recording {}", path.display())]
    Open {
        /// Which file.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// A read failed.
    #[error("{name}: cannot read at byte {offset}")]
    Read {
        /// The recording's name.
        name: String,
        /// Where.
        offset: u64,
        /// The system's reason.
        source: io::Error,
    },
    /// A write failed.
    #[error("{name}: cannot write the recording")]
    Write {
        /// The recording's name.
        name: String,
        /// The system's reason.
        source: io::Error,
    },
    /// The file does not begin with the magic.
    #[error("{name} is not a recording of `blackout record` (byte 0 begins another format)")]
    Magic {
        /// The recording's name.
        name: String,
    },
    /// The file is a recording of another version.
    #[error(
        "{name}: recording version {found} at byte 8, this tool reads version {VERSION}; \
         use the tool that wrote it"
    )]
    Version {
        /// The recording's name.
        name: String,
        /// The version it claims.
        found: u16,
    },
    /// A frame's length is 0, above [`MAX_FRAME`] or no number.
    #[error("{name}: bad frame length at byte {offset} (allowed: 1 to {MAX_FRAME})")]
    Length {
        /// The recording's name.
        name: String,
        /// Where the frame begins.
        offset: u64,
    },
    /// A frame's payload is not one that this version knows.
    #[error("{name}: damaged frame at byte {offset}")]
    Decode {
        /// The recording's name.
        name: String,
        /// Where the frame begins.
        offset: u64,
        /// What the decoder said.
        source: postcard::Error,
    },
    /// A frame decodes, but says what it must not.
    #[error("{name}: frame at byte {offset} {what}")]
    Content {
        /// The recording's name.
        name: String,
        /// Where the frame begins.
        offset: u64,
        /// What is wrong with it, as the end of a sentence.
        what: &'static str,
    },
    /// A frame is too large to write, which means that a string in it is.
    #[error("{name}: a frame does not fit into {MAX_FRAME} bytes")]
    TooLarge {
        /// The recording's name.
        name: String,
    },
}
