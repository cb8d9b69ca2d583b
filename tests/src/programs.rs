//! Where the programs under test are.

use std::env;
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

fn find(variable: &str) -> Result<PathBuf> {
    let path = env::var_os(variable).with_context(|| {
        format!("{variable} is not set: `cargo xtask test` builds the programs and sets it")
    })?;
    let path = PathBuf::from(path);
    path.canonicalize()
        .with_context(|| format!("{variable}={}", path.display()))
}
