#![doc = include_str!("../ARCHITECTURE.md")]

pub mod kvm;
pub mod payload;
pub mod probes;
pub mod runstate;
pub mod spanlog;
