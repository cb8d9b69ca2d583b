//! Where the programs under test are.

use std::env::{self, consts::ARCH};
use std::path::PathBuf;

use anyhow::{Context, Result};

/// The monitor: `BLACKOUT_VMM`.
pub fn vmm() -> Result<PathBuf> {
    find("BLACKOUT_VMM")
}

/// The tool: `BLACKOUT_TOOL`.
pub fn tool() -> Result<PathBuf> {
    find("BLACKOUT_TOOL")
}

/// The bare-metal guest: `BLACKOUT_GUEST`.
pub fn guest() -> Result<PathBuf> {
    find("BLACKOUT_GUEST")
}

/// The name of QEMU for this machine, which the path may have.
pub fn qemu() -> String {
    format!("qemu-system-{ARCH}")
}

/// Whether it has.
pub fn has_qemu() -> bool {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path).any(|folder| folder.join(qemu()).is_file())
}

/// The folder of Linux guests, kernels and an initramfs: `BLACKOUT_LINUX`, where there is a KVM that
/// boots them.
pub fn linux() -> Option<PathBuf> {
    env::var_os("BLACKOUT_LINUX").map(PathBuf::from)
}

fn find(variable: &str) -> Result<PathBuf> {
    let path = env::var_os(variable).with_context(|| {
        format!("{variable} is not set: `cargo xtask test` builds the programs and sets it")
    })?;
    let path = PathBuf::from(path);
    path.canonicalize()
        .with_context(|| format!("{variable}={}", path.display()))
}
