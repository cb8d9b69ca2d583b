#![doc = include_str!("../ARCHITECTURE.md")]

pub mod arch;
pub mod args;
pub mod check;
pub mod control;
pub mod devices;
pub mod kvm;
pub mod machine;
pub mod memory;
pub mod migration;
pub mod payload;
pub mod probes;
pub mod qmp;
pub mod runstate;
pub mod socket;
pub mod spanlog;
pub mod vcpu;
