//! Debian's bpftrace, perf, gdb, QEMU and tc for the arm64 testbed, with the libraries that they need.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result};

use super::{Need, debian::Archive};
use crate::kernel::Arch;
use crate::paths;

/// The programs, and the packages that have them.
const PROGRAMS: [&str; 5] = ["bpftrace", "perf", "gdb", "qemu-system-aarch64", "tc"];
const PACKAGES: [&str; 5] = [
    "bpftrace",
    "linux-perf",
    "gdb",
    "qemu-system-arm",
    "iproute2",
];
const FOLDERS: [&str; 2] = ["bin", "sbin"];

/// What nobody reads in a testbed.
const UNREAD: [&str; 3] = ["doc", "locale", "man"];

/// They lie in one folder, which a testbed mounts as its `/usr`.
pub(super) struct StockTools;

/// That folder.
pub(crate) fn folder() -> Result<PathBuf> {
    Ok(paths::cache()?.join("tools-arm64"))
}

impl Need for StockTools {
    fn name(&self) -> String {
        format!("{} for the arm64 testbed", PROGRAMS.join(", "))
    }

    fn found(&self) -> Result<Option<String>> {
        let folder = folder()?;
        let there = |name: &str| FOLDERS.map(|sub| folder.join(sub).join(name).is_file());
        let complete = PROGRAMS.iter().all(|name| there(name).contains(&true));
        Ok(complete.then(|| folder.display().to_string()))
    }

    fn install(&self) -> Result<()> {
        let folder = folder()?;
        let staging = folder.with_extension("new");
        let _ = fs::remove_dir_all(&staging);
        fs::create_dir_all(&staging)
            .with_context(|| format!("cannot create {}", staging.display()))?;
        Archive::open(Arch::Aarch64.debian())?.unpack_all(&PACKAGES, &staging)?;
        let usr = staging.join("usr");
        for unread in UNREAD {
            let _ = fs::remove_dir_all(usr.join("share").join(unread));
        }
        // Only a whole folder gets the final name.
        let _ = fs::remove_dir_all(&folder);
        fs::rename(&usr, &folder).with_context(|| format!("cannot make {}", folder.display()))?;
        fs::remove_dir_all(&staging).with_context(|| format!("cannot remove {}", staging.display()))
    }
}
