//! Where things are: the workspace, its build output and the per-user cache.

use std::env;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// The workspace's root folder. Every path below is absolute, so verbs work from any folder.
pub(crate) fn workspace() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .unwrap_or(Path::new("/"))
}

/// Cargo's output folder of this workspace.
pub(crate) fn target() -> PathBuf {
    match env::var_os("CARGO_TARGET_DIR") {
        Some(dir) => workspace().join(dir),
        None => workspace().join("target"),
    }
}

/// What `cargo xtask setup` fetched or built once for this user: kernels, bpf-linker, test tools.
///
/// It lives outside the workspace so that a second clone finds everything there.
/// `BLACKOUT_CACHE` moves it.
pub(crate) fn cache() -> Result<PathBuf> {
    if let Some(dir) = env::var_os("BLACKOUT_CACHE") {
        return std::path::absolute(dir).context("BLACKOUT_CACHE is not a usable path");
    }
    let base = match env::var_os("XDG_CACHE_HOME") {
        Some(dir) => PathBuf::from(dir),
        None => {
            let home = env::var_os("HOME")
                .context("neither HOME nor BLACKOUT_CACHE is set: no place for downloads")?;
            PathBuf::from(home).join(".cache")
        }
    };
    Ok(base.join("blackout"))
}
