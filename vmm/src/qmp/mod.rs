//! `[1]` QMP: the socket through which a VM is controlled, wire-compatible with QEMU's.
//!
//! `server` accepts clients, `session` holds each one's dialogue, `json` and `wire` are the
//! protocol, `commands` the verbs, `hub` the one way out for answers and events.

mod address;
mod arguments;
mod commands;
mod hub;
mod json;
mod monitor;
mod objects;
mod server;
mod session;
mod settings;
#[cfg(test)]
mod tests;
mod wire;

pub use address::{Address, AddressError};
pub use commands::{Backend, Change};
pub use hub::Hub;
pub use monitor::Monitor;
pub use server::{Server, ServerError};
pub use wire::Error;
