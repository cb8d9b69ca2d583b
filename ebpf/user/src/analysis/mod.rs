//! From frames to answers: what ran, which migrations there were, how long the guest ran nowhere.
//!
//! [`load`] reads a recording into one timeline a thread, or only what migrations need of it, where
//! [`spans`] pairs its probes; [`parts`] gives all of it, a part at a time.
//! [`migration`] finds the migrations and joins their sides, each a [`party`] on one time axis
//! ([`clock`]); [`downtime`] and [`its`] measure them. All of it is pure: no clock, no kernel.

mod by_kernel;
pub mod clock;
pub mod describe;
pub mod downtime;
pub mod its;
pub mod kvm;
pub mod load;
pub mod loss;
pub mod migration;
mod order;
pub mod parts;
pub mod party;
mod scan;
pub mod spans;
mod thread;
mod took;
pub mod wire;

pub use downtime::Downtime;
pub use load::Loaded;
pub use loss::{Loss, Losses};
pub use migration::{Migration, View, find};
pub use parts::Part;
pub use party::{Party, Placed, Side};
pub use spans::{Args, Point, Problem, Span};
pub use thread::{Process, Thread};
