//! Many migrations as one set of samples: what [`crate::gate`] compares and summaries show.
//!
//! A set is made of reports, so that a recording and the JSON report on it give the same samples.
//! [`collect`] turns a report's migrations into samples, [`read`] finds and reads the files,
//! [`text`] shows a set on a terminal.

pub mod collect;
pub mod read;
mod samples;
pub mod text;

pub use samples::{Key, Left, Nature, SCHEMA, Samples, Series, Table};
