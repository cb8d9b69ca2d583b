//! Debian's kernels, unpacked into the cache.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use super::{Need, debian::Archive};
use crate::command;
use crate::kernel::{Flavour, Kernel, Package};

impl Need for Package {
    fn name(&self) -> String {
        format!("{self}, and busybox")
    }

    fn found(&self) -> Result<Option<String>> {
        let folder = self.folder()?;
        let wanted = fs::read_to_string(folder.join("wanted")).unwrap_or_default();
        if Kernel::find(*self).is_err() || wanted != wanted_modules(*self) {
            return Ok(None);
        }
        Ok(fs::read_to_string(folder.join("version"))
            .ok()
            .map(|version| version.trim().to_owned()))
    }

    fn install(&self) -> Result<()> {
        let archive = Archive::open(self.arch.debian())?;
        let package = archive.resolve(&self.metapackage(), &format!("{}.", self.series))?;
        let folder = self.folder()?;
        let staging = folder.with_extension("new");
        let _ = fs::remove_dir_all(&staging);
        let unpacked = staging.join("unpacked");
        fs::create_dir_all(&unpacked)
            .with_context(|| format!("cannot create {}", unpacked.display()))?;
        archive.unpack("busybox-static", &unpacked)?;
        archive.unpack(&package, &unpacked)?;

        let release = package.trim_start_matches("linux-image-");
        rename(
            &unpacked.join(format!("boot/vmlinuz-{release}")),
            &staging.join("Image"),
        )?;
        rename(
            &unpacked.join(format!("boot/config-{release}")),
            &staging.join("config"),
        )?;
        rename(&busybox(&unpacked)?, &staging.join("busybox"))?;
        decompress_modules(*self, &unpacked, &staging.join("modules"))?;
        fs::write(staging.join("wanted"), wanted_modules(*self))?;
        fs::remove_dir_all(&unpacked).context("cannot remove what was unpacked")?;
        fs::write(staging.join("version"), format!("{release}\n"))?;
        // Only a whole folder gets the final name, so an interrupted setup leaves none behind.
        let _ = fs::remove_dir_all(&folder);
        rename(&staging, &folder)
    }
}

/// Kept beside the modules, so that a longer list is noticed.
fn wanted_modules(package: Package) -> String {
    package.modules().map(|name| format!("{name}\n")).collect()
}

fn rename(from: &Path, to: &Path) -> Result<()> {
    fs::rename(from, to)
        .with_context(|| format!("cannot move {} to {}", from.display(), to.display()))
}

/// Debian moved /bin into /usr between the releases that setup draws from.
fn busybox(unpacked: &Path) -> Result<std::path::PathBuf> {
    ["bin/busybox", "usr/bin/busybox"]
        .iter()
        .map(|file| unpacked.join(file))
        .find(|file| file.is_file())
        .context("the package busybox-static has no bin/busybox")
}

/// Finds the modules that `package` is to have below `unpacked` and writes them uncompressed:
/// busybox's insmod cannot decompress them, and the testbed would take long to do so.
fn decompress_modules(package: Package, unpacked: &Path, target: &Path) -> Result<()> {
    fs::create_dir_all(target).with_context(|| format!("cannot create {}", target.display()))?;
    let files = command::output(Command::new("find").arg(unpacked).args(["-name", "*.ko*"]))?;
    for name in package.modules() {
        let named = |file: &&str| {
            let file = file.rsplit('/').next().unwrap_or_default();
            file == format!("{name}.ko") || file == format!("{name}.ko.xz")
        };
        let Some(file) = files.lines().find(named) else {
            continue;
        };
        let output = fs::File::create(target.join(format!("{name}.ko")))?;
        let program = if file.ends_with(".xz") {
            ["xz", "-dc"].as_slice()
        } else {
            &["cat"]
        };
        command::run(
            Command::new(program[0])
                .args(&program[1..])
                .arg(file)
                .stdout(Stdio::from(output)),
        )?;
    }
    if package.flavour == Flavour::Generic && !target.join("9p.ko").is_file() {
        bail!("the kernel's package has no 9p module: the testbed could not share files");
    }
    Ok(())
}
