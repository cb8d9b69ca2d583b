//! Recordings in the formats of other programs, one file a format.

pub mod chrome;
pub mod csv;
pub mod folded;
pub mod otlp;
pub mod perfetto;
pub mod speedscope;
mod stacks;
pub mod trace;
