//! `cargo xtask bench`: what the stop path costs, in numbers that repeat.

mod its;
mod plot;

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
    /// ITS and GIC: save, pending tables and restore, in instructions, in the arm64 testbed.
    Its(its::Arguments),
}

/// Runs the verb; 1 when a figure is not what it should be.
pub(crate) fn run(arguments: &Arguments) -> Result<u8> {
    match &arguments.what {
        What::Its(arguments) => its::run(arguments),
    }
}
