//! `cargo xtask install`: what `cargo install` does, with the eBPF programs inside the tool, which cargo
//! alone can't build.

use std::env;
use std::path::PathBuf;
use std::process::Command;

use anyhow::Result;

use crate::artifacts::{self, Platform};
use crate::setup::{self, Purpose};
use crate::{command, paths};

/// The tool and the monitor.
const PACKAGES: [&str; 2] = ["ebpf/user", "vmm"];

/// Arguments of `cargo xtask install`.
#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// The programs go to DIR/bin; else to where `cargo install` puts all others.
    #[arg(long, value_name = "DIR")]
    root: Option<PathBuf>,
}

/// Runs the verb.
pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    setup::ensure(&[Purpose::Build])?;
    let object = artifacts::build_bpf(Platform::Host)?;
    for package in PACKAGES {
        let mut cargo = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        cargo
            .current_dir(paths::workspace())
            .args(["install", "--locked", "--path", package])
            .env("CARGO_TARGET_DIR", paths::target())
            .env("BLACKOUT_BPF_OBJECT", &object);
        if let Some(root) = &arguments.root {
            cargo.arg("--root").arg(std::path::absolute(root)?);
        }
        command::run(&mut cargo)?;
    }
    Ok(())
}
