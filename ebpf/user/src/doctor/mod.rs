//! What may keep events from being seen, and what seeing them costs.
//!
//! The kernel's part is [`survey`](crate::capture::kernel::survey); [`program`] looks at one
//! monitor, and [`calibrate`] measures. `cli/doctor.rs` prints what they find.

pub mod calibrate;
pub mod program;
mod site;
