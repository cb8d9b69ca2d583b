//! The testbed's kernels: which ones there are, and where `cargo xtask setup` puts them.

use std::fmt;
use std::path::PathBuf;

use anyhow::{Result, bail};
use clap::ValueEnum;

use crate::paths;

/// A long-term series of Linux that the testbed can boot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Series {
    /// Linux 6.12 of Debian 13: fentry and the dirty ring work on arm64.
    #[value(name = "6.12")]
    V6_12,
    /// Linux 6.1 of Debian 12: neither does.
    #[value(name = "6.1")]
    V6_1,
}

impl Series {
    /// The folder of this series' files in the cache.
    pub(crate) fn folder(self) -> Result<PathBuf> {
        Ok(paths::cache()?.join(format!("kernel-{self}-arm64")))
    }
}

impl fmt::Display for Series {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::V6_12 => "6.12",
            Self::V6_1 => "6.1",
        })
    }
}

/// Modules that the testbed loads, each after those it needs. A series that has one built in, or
/// that lacks it, does without: 6.1 splits fscache from netfs, and 6.12 has virtio-pci built in.
pub(crate) const MODULES: [&str; 14] = [
    "virtio",
    "virtio_ring",
    "virtio_pci_modern_dev",
    "virtio_pci_legacy_dev",
    "virtio_pci",
    "virtio_console",
    "fscache",
    "netfs",
    "9pnet",
    "9pnet_virtio",
    "9p",
    "failover",
    "net_failover",
    "virtio_net",
];

/// A kernel that is there to be booted, with the static busybox that goes with it.
#[derive(Clone, Debug)]
pub(crate) struct Kernel {
    /// The kernel's `Image`.
    pub(crate) image: PathBuf,
    /// A static arm64 busybox.
    pub(crate) busybox: PathBuf,
    /// Name and file of each module to load, in order.
    pub(crate) modules: Vec<(String, PathBuf)>,
}

impl Kernel {
    /// The kernel of `series` that `cargo xtask setup` fetched.
    ///
    /// # Errors
    /// When it is not there.
    pub(crate) fn find(series: Series) -> Result<Self> {
        let folder = series.folder()?;
        let image = folder.join("Image");
        if !image.is_file() {
            bail!("the testbed's kernel {series} is not there: run `cargo xtask setup`");
        }
        let modules = MODULES
            .iter()
            .map(|&name| {
                (
                    name.to_owned(),
                    folder.join("modules").join(format!("{name}.ko")),
                )
            })
            .filter(|(_, file)| file.is_file())
            .collect();
        Ok(Self {
            image,
            busybox: folder.join("busybox"),
            modules,
        })
    }
}
