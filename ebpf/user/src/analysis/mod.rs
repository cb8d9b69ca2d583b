//! From frames to answers: what ran, which migrations there were, how long the guest ran nowhere.
//!
//! [`load`] reads a recording into one timeline a thread, [`spans`] pairs its probes.

pub mod load;
pub mod spans;

pub use load::{Loaded, Process, Thread};
pub use spans::{Args, Point, Problem, Span};
