//! Debian's kernels, of testbeds and of guests: which ones there are, and where `cargo xtask setup`
//! puts them.

use std::fmt;
use std::fs;
use std::path::PathBuf;

use anyhow::{Result, bail};
use clap::ValueEnum;

use crate::paths;

/// A long-term series of Linux.
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
    /// Every series that guests are tested with.
    pub(crate) const ALL: [Self; 2] = [Self::V6_1, Self::V6_12];
}

impl fmt::Display for Series {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::V6_12 => "6.12",
            Self::V6_1 => "6.1",
        })
    }
}

/// An architecture that testbeds and guests have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Arch {
    /// arm64.
    #[value(name = "aarch64")]
    Aarch64,
    /// x86-64.
    #[value(name = "x86_64")]
    X86_64,
}

impl Arch {
    /// Debian's name of it.
    pub(crate) fn debian(self) -> &'static str {
        match self {
            Self::Aarch64 => "arm64",
            Self::X86_64 => "amd64",
        }
    }

    /// Rust's name of it.
    pub(crate) fn rust(self) -> &'static str {
        match self {
            Self::Aarch64 => "aarch64",
            Self::X86_64 => "x86_64",
        }
    }
}

/// What Debian has built a kernel for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Flavour {
    /// Real machines: what testbeds boot, with KVM and everything that eBPF needs.
    Generic,
    /// Virtual machines: what guests boot.
    Cloud,
}

/// One of Debian's kernels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Package {
    pub(crate) series: Series,
    pub(crate) flavour: Flavour,
    pub(crate) arch: Arch,
}

impl Package {
    /// The kernel of a testbed.
    pub(crate) fn testbed(series: Series, arch: Arch) -> Self {
        let flavour = Flavour::Generic;
        Self {
            series,
            flavour,
            arch,
        }
    }

    /// The kernel of a guest.
    pub(crate) fn guest(series: Series, arch: Arch) -> Self {
        let flavour = Flavour::Cloud;
        Self {
            series,
            flavour,
            arch,
        }
    }

    /// The folder of this kernel's files in the cache.
    pub(crate) fn folder(self) -> Result<PathBuf> {
        Ok(paths::cache()?.join(format!("kernel-{}", self.suffix())))
    }

    /// Debian's package that always stands for the newest kernel of this kind.
    pub(crate) fn metapackage(self) -> String {
        let arch = self.arch.debian();
        match self.flavour {
            Flavour::Generic => format!("linux-image-{arch}"),
            Flavour::Cloud => format!("linux-image-cloud-{arch}"),
        }
    }

    /// The modules that are kept, each after those it needs. A series that has one built in, or
    /// that lacks it, does without: 6.1 splits fscache from netfs, and 6.12 has virtio-pci built in.
    pub(crate) fn modules(self) -> impl Iterator<Item = &'static str> {
        let last: &[&str] = match (self.flavour, self.arch) {
            // The power button of guests that boot the same kernel; tap interfaces and the bridge
            // between them; networks that are slow and that lose packets.
            (Flavour::Generic, Arch::Aarch64) => &[
                "evdev",
                "gpio_keys",
                "llc",
                "stp",
                "bridge",
                "tun",
                "sch_tbf",
                "sch_netem",
            ],
            (Flavour::Generic, Arch::X86_64) => &[
                "irqbypass",
                "kvm",
                "ccp",
                "kvm-amd",
                "llc",
                "stp",
                "bridge",
                "tun",
            ],
            (Flavour::Cloud, _) => &GUEST_MODULES,
        };
        MODULES.into_iter().chain(last.iter().copied())
    }

    fn suffix(self) -> String {
        let arch = self.arch.debian();
        match self.flavour {
            Flavour::Generic => format!("{}-{arch}", self.series),
            Flavour::Cloud => format!("{}-cloud-{arch}", self.series),
        }
    }
}

impl fmt::Display for Package {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let flavour = match self.flavour {
            Flavour::Generic => "testbed's",
            Flavour::Cloud => "guests'",
        };
        let arch = self.arch.debian();
        write!(formatter, "the {flavour} {arch} kernel {}", self.series)
    }
}

/// Modules that testbeds and guests load.
const MODULES: [&str; 14] = [
    "virtio_ring",
    "virtio",
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

/// Modules that only guests load: the drivers of the monitor's other devices, and of a disk's files.
const GUEST_MODULES: [&str; 12] = [
    "virtio_blk",
    "rng-core",
    "virtio-rng",
    "vsock",
    "vmw_vsock_virtio_transport_common",
    "vmw_vsock_virtio_transport",
    "evdev",
    "button",
    "crc16",
    "mbcache",
    "jbd2",
    "ext4",
];

/// A kernel that is there to be booted, with the static busybox that goes with it.
#[derive(Clone, Debug)]
pub(crate) struct Kernel {
    /// What it runs on.
    pub(crate) arch: Arch,
    /// Its release, as `uname -r` says it.
    pub(crate) release: String,
    /// The kernel's `Image` or `bzImage`.
    pub(crate) image: PathBuf,
    /// A static busybox of the same architecture.
    pub(crate) busybox: PathBuf,
    /// Name and file of each module to load, in order.
    pub(crate) modules: Vec<(String, PathBuf)>,
}

impl Kernel {
    /// The kernel that `cargo xtask setup` fetched.
    ///
    /// # Errors
    /// When it is not there.
    pub(crate) fn find(package: Package) -> Result<Self> {
        let folder = package.folder()?;
        let image = folder.join("Image");
        if !image.is_file() {
            bail!("{package} is not there: run `cargo xtask setup`");
        }
        let modules = package
            .modules()
            .map(|name| {
                (
                    name.to_owned(),
                    folder.join("modules").join(format!("{name}.ko")),
                )
            })
            .filter(|(_, file)| file.is_file())
            .collect();
        let release = fs::read_to_string(folder.join("version")).unwrap_or_default();
        Ok(Self {
            arch: package.arch,
            release: release.trim().to_owned(),
            image,
            busybox: folder.join("busybox"),
            modules,
        })
    }
}
