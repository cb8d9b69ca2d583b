//! The harness of the integration tests, the demo and the benchmarks: real monitors, a QMP client,
//! the tool as a child process.
//!
//! Programs are found by environment variables that `cargo xtask` sets; see [`programs`].

pub mod attached;
pub mod bridge;
pub mod certificates;
pub mod cpus;
pub mod guest_ram;
pub mod linux;
pub mod observer;
pub mod pair;
pub mod programs;
pub mod proxy;
pub mod qmp;
pub mod resources;
pub mod shell;
pub mod skip;
pub mod slow;
mod stamps;
pub mod tool;
pub mod vmm;

use std::process::ExitCode;

pub use bridge::Bridge;
pub use cpus::Cpus;
pub use guest_ram::GuestView;
pub use linux::Linux;
pub use observer::Observer;
pub use proxy::Proxy;
pub use qmp::{Qmp, QmpError};
pub use resources::Resources;
pub use shell::Shell;
pub use tool::{Recorder, Report};
pub use vmm::{Vmm, VmmOptions};

/// What a program of the harness ends with: it says on stderr why it failed, in one line.
pub fn exit(result: &anyhow::Result<()>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
