//! What the program `blackout` is made of; a library so that tests and tools can use it.
//!
//! Imports go one way: [`cli`] → [`mod@bench`], [`top`], [`html`] → [`gate`] → [`sets`] → [`report`],
//! [`export`] → [`analysis`] → [`recording`] → `blackout-abi`. [`usdt`], [`stats`] and [`foreign`]
//! stand by themselves; [`import`] writes a [`recording`]; [`doctor`] stands on [`capture`].

pub mod analysis;
pub mod bench;
pub mod capture;
pub mod cli;
pub mod doctor;
pub mod export;
pub mod foreign;
pub mod gate;
pub mod html;
pub mod import;
pub mod recording;
pub mod report;
pub mod sets;
pub mod stats;
pub mod top;
pub mod usdt;
pub mod watch;
