//! What the VMs of a host do at the moment, on a screen: `blackout top`.
//!
//! [`model`] turns frames into what is shown, be they of a recorder or of a file; [`screen`] draws it.
//! `cli/top.rs` brings the frames, the clock and the keys.

pub mod migration;
pub mod model;
pub mod screen;
