//! What the program `blackout` is made of; a library so that tests and tools can use it.
//!
//! Imports go one way: [`cli`] → `report`, `export` → [`analysis`] → [`recording`] → `blackout-abi`.

pub mod analysis;
pub mod cli;
pub mod recording;
pub mod usdt;
