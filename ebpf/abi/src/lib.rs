//! What the monitor, the eBPF programs and the tool must agree on: the [probe table](probes) and
//! the [records](event) that cross from the kernel to the tool; and what the monitor and the
//! project's guests tell each other [in memory](guest).
//!
//! `no_std` and free of dependencies (bar `aya` for its `Pod` marker behind the feature `user`),
//! so that each of the three can use it as it is.
#![no_std]

pub mod event;
pub mod guest;
pub mod probes;

pub use probes::{Arg, ArgKind, Edge, Nature, PROBES, PROVIDER, Probe, SPANS, Span};
