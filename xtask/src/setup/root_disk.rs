//! A disk with a whole Debian that guests boot to its login.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};

use super::{Need, debian};
use crate::command;
use crate::linux::root_disk;

/// The release that is installed.
const SUITE: &str = "trixie";

/// What it has beyond the essential packages: what a person needs to log in.
const PACKAGES: &str = "systemd-sysv,udev,login,passwd";

/// Room for it, and for what it writes as it boots.
const SIZE: &str = "640M";

/// The disk, for guests of this machine's own architecture: its packages run while they are installed.
pub(super) struct RootDisk;

impl Need for RootDisk {
    fn name(&self) -> String {
        format!("a disk with Debian {SUITE} for guests")
    }

    fn found(&self) -> Result<Option<String>> {
        let disk = root_disk()?;
        Ok(disk.is_file().then(|| disk.display().to_string()))
    }

    fn packages(&self) -> Vec<String> {
        ["mmdebstrap", "e2fsprogs"].map(str::to_owned).into()
    }

    fn install(&self) -> Result<()> {
        ensure!(
            debian::is_root(),
            "only root can install Debian into a folder"
        );
        let disk = root_disk()?;
        let staging = disk.with_extension("new");
        let root = disk.with_extension("root");
        let _ = fs::remove_dir_all(&root);
        install_debian(&root)?;
        command::run(
            Command::new("mke2fs")
                .args(["-q", "-F", "-t", "ext4", "-d"])
                .arg(&root)
                .arg(&staging)
                .arg(SIZE),
        )?;
        fs::remove_dir_all(&root).with_context(|| format!("cannot remove {}", root.display()))?;
        fs::rename(&staging, &disk).with_context(|| format!("cannot make {}", disk.display()))
    }
}

/// Installs Debian into the folder `root`; its administrator has no password.
fn install_debian(root: &Path) -> Result<()> {
    let mut mmdebstrap = Command::new("mmdebstrap");
    mmdebstrap.args(["--quiet", "--format=directory", "--variant=essential"]);
    mmdebstrap.arg(format!("--include={PACKAGES}"));
    for unread in ["doc", "locale", "man"] {
        mmdebstrap.arg(format!("--dpkgopt=path-exclude=/usr/share/{unread}/*"));
    }
    mmdebstrap
        .arg("--customize-hook=chroot \"$1\" passwd --quiet --delete root")
        .arg("--customize-hook=echo guest > \"$1/etc/hostname\"")
        .arg(SUITE)
        .arg(root);
    command::run(&mut mmdebstrap)
}
