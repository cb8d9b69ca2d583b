#![doc = include_str!("../ARCHITECTURE.md")]

pub mod devices;
pub mod kvm;
pub mod memory;
pub mod payload;
pub mod probes;
pub mod runstate;
pub mod spanlog;
pub mod vcpu;
