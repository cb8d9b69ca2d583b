//! What the program `blackout` is made of; a library so that tests and tools can use it.
//!
//! Imports go one way: [`cli`] → [`report`], [`export`] → [`analysis`] → [`recording`] →
//! `blackout-abi`. [`usdt`] stands by itself.

pub mod analysis;
pub mod capture;
pub mod cli;
pub mod export;
pub mod recording;
pub mod report;
pub mod stats;
pub mod usdt;
