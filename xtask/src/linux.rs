//! The Linux guests of the tests: Debian's kernels, and the initramfs that they start from.

mod vmlinux;

use std::env::consts::ARCH;
use std::fs;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result};

use crate::initramfs::Initramfs;
use crate::kernel::{Arch, Flavour, Kernel, Package, Series};
use crate::{command, paths};

/// The environment variable by which the harness finds the folder that [`prepare`] makes.
pub(crate) const VARIABLE: &str = "BLACKOUT_LINUX";

/// The kernels that guests of `arch` boot, by the names of their files.
fn kernels(arch: Arch) -> Vec<(String, Package)> {
    let mut kernels: Vec<_> = Series::ALL
        .map(|series| (format!("kernel-{series}"), Package::guest(series, arch)))
        .into();
    if arch == Arch::Aarch64 {
        // The cloud kernels have no driver for the power button.
        let generic = Package::testbed(Series::V6_12, arch);
        kernels.push(("kernel-6.12-generic".to_owned(), generic));
    }
    kernels
}

/// The disk with a whole Debian, of this machine's architecture, that `cargo xtask setup` makes.
pub(crate) fn root_disk() -> Result<PathBuf> {
    Ok(paths::cache()?.join(format!("debian-{ARCH}.ext4")))
}

/// Makes the folder `target/linux/ARCH` with the guests' files: `kernel-SERIES`, on x86-64
/// `vmlinux-6.12`, `initramfs`, and a copy of the [`root_disk`] as `root`, if that is there.
///
/// # Errors
/// When `cargo xtask setup` has not fetched the kernels.
pub(crate) fn prepare(arch: Arch) -> Result<PathBuf> {
    let folder = paths::target().join("linux").join(arch.rust());
    fs::create_dir_all(&folder).with_context(|| format!("cannot create {}", folder.display()))?;
    let mut initramfs = Initramfs::create(&folder.join("initramfs"))?;
    initramfs.file("/init", include_bytes!("linux/init.sh"))?;
    let mut busybox = None;
    for (name, package) in kernels(arch) {
        let kernel = Kernel::find(package)?;
        let copy = folder.join(&name);
        fs::copy(&kernel.image, &copy)
            .with_context(|| format!("cannot write {}", copy.display()))?;
        if arch == Arch::X86_64 && package.series == Series::V6_12 {
            vmlinux::extract(&kernel.image, &folder.join("vmlinux-6.12"))?;
        }
        // `uname -r` tells the guest's init which ones are its own.
        let own = match package.flavour {
            Flavour::Generic => format!("{}-generic", package.series),
            Flavour::Cloud => format!("{}-cloud", package.series),
        };
        let mut names = String::new();
        for (module, file) in &kernel.modules {
            initramfs.copy(file, &format!("/modules/{own}/{module}.ko"))?;
            names += &format!("{module}\n");
        }
        initramfs.file(&format!("/modules/{own}/list"), names.as_bytes())?;
        busybox = Some(kernel.busybox);
    }
    let busybox = busybox.context("there is no kernel for guests")?;
    initramfs.copy(&busybox, "/bin/busybox")?;
    initramfs.copy(&busybox, "/bin/sh")?;
    initramfs.finish()?;
    let disk = root_disk()?;
    if arch.rust() == ARCH && disk.is_file() {
        // A new file: what a guest wrote to the last one may be in use still.
        let mut copy = Command::new("cp");
        copy.args(["--sparse=always", "--remove-destination"]);
        command::run(copy.arg(&disk).arg(folder.join("root")))?;
    }
    Ok(folder)
}
