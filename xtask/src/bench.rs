//! `cargo xtask bench`: what the stop path costs, in numbers that repeat.

mod boot;
mod compare;
mod dirty_log;
mod downtime;
mod gate;
mod gic;
pub(crate) mod its;
mod overhead;
mod plot;
mod prediction;
mod throughput;

use anyhow::Result;
use clap::Subcommand;

/// Arguments of `cargo xtask bench`.
#[derive(clap::Args)]
pub(crate) struct Arguments {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand)]
enum What {
    /// What the monitor costs by itself: time to the guest's first instruction, and memory.
    Boot(boot::Arguments),
    /// How long a guest is dark while it migrates, beside QEMU.
    Downtime(downtime::Arguments),
    /// How fast a large idle guest migrates, beside QEMU, on this machine.
    Throughput(throughput::Arguments),
    /// How well a monitor predicts the downtime, and whether it keeps to its limit.
    Prediction(prediction::Arguments),
    /// What the last look at what a guest wrote costs, by the guest's size, on this machine.
    DirtyLog(dirty_log::Arguments),
    /// Whether the gate that counts instructions flakes or misses, in the arm64 testbed.
    Gate(gate::Arguments),
    /// The state of the GIC by the number of vCPUs, in instructions, in the arm64 testbed.
    Gic(gic::Arguments),
    /// What the tool costs those whom it records, beside bpftrace, on this machine.
    Overhead(overhead::Arguments),
    /// ITS and GIC: save, pending tables and restore, in instructions, in the arm64 testbed.
    Its(its::Arguments),
}

/// Runs the verb; 1 when a figure is not what it should be.
pub(crate) fn run(arguments: &Arguments) -> Result<u8> {
    match &arguments.what {
        What::Boot(arguments) => boot::run(arguments),
        What::Downtime(arguments) => downtime::run(arguments),
        What::Throughput(arguments) => throughput::run(arguments),
        What::Prediction(arguments) => prediction::run(arguments),
        What::DirtyLog(arguments) => dirty_log::run(arguments),
        What::Gate(arguments) => gate::run(arguments),
        What::Gic(arguments) => gic::run(arguments),
        What::Overhead(arguments) => overhead::run(arguments),
        What::Its(arguments) => its::run(arguments),
    }
}
