//! Debian packages: those of this machine, and those of testbeds and guests, only unpacked.
//!
//! The latter come through an apt directory of our own in the cache, one for each architecture, so
//! fetching them needs no root and leaves the machine's architectures, sources and lists as they
//! are. apt checks every signature against Debian's keyring, as it does for the machine itself.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::{command, paths};

const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// Suites that are added to the machine's own: they have Linux 6.12.
const KERNEL_SUITES: [&str; 2] = ["bookworm-backports", "trixie"];

/// Installs packages on this machine; needs root.
pub(crate) fn install(packages: &[String]) -> Result<()> {
    let apt = || {
        let mut apt = Command::new("apt-get");
        // Another package manager may be at work; wait for it rather than fail.
        apt.args(["-o", "DPkg::Lock::Timeout=300", "-q"])
            .env("DEBIAN_FRONTEND", "noninteractive");
        apt
    };
    command::run(apt().arg("update"))?;
    command::run(
        apt()
            .args(["install", "--yes", "--no-install-recommends"])
            .args(packages),
    )
}

/// Whether this process may install packages.
pub(crate) fn is_root() -> bool {
    command::probe(Command::new("id").arg("-u")).is_some_and(|id| id.trim() == "0")
}

/// The version of `package` on this machine, if it is installed.
pub(crate) fn installed_version(package: &str) -> Option<String> {
    let query = [
        "--show",
        "--showformat=${db:Status-Status} ${Version}",
        package,
    ];
    let text = command::probe(Command::new("dpkg-query").args(query))?;
    text.strip_prefix("installed ").map(str::to_owned)
}

/// Debian's packages of one architecture, through an apt directory in the cache.
pub(crate) struct Archive {
    folder: PathBuf,
    /// Debian's name of the architecture.
    arch: &'static str,
}

impl Archive {
    /// Prepares the apt directory for `arch`, Debian's name of it, and fetches the lists of packages.
    ///
    /// # Errors
    /// When this machine has no apt, or does not tell where Debian's packages are.
    pub(crate) fn open(arch: &'static str) -> Result<Self> {
        let folder = paths::cache()?.join(format!("apt-{arch}"));
        for needed in ["lists/partial", "cache/archives/partial", "parts"] {
            fs::create_dir_all(folder.join(needed))
                .with_context(|| format!("cannot create {}", folder.join(needed).display()))?;
        }
        let archive = Self { folder, arch };
        archive.write("status", "")?;
        archive.write("apt.conf", &archive.configuration())?;
        let mut sources = String::new();
        for (base, suite) in archive.suites()? {
            sources += &format!("deb [arch={arch} signed-by={KEYRING}] {base} {suite} main\n");
        }
        archive.write("sources.list", &sources)?;
        // One suite that cannot be had or verified is no reason to stop: `find` says what is missing.
        if let Err(error) = command::run(archive.apt("apt-get").args(["-q", "update"])) {
            eprintln!("  warning: {error:#}");
        }
        Ok(archive)
    }

    /// The newest package that the metapackage `name` of a version starting with `prefix` stands
    /// for, such as the kernel image of a series.
    pub(crate) fn resolve(&self, name: &str, prefix: &str) -> Result<String> {
        let records = command::output(self.apt("apt-cache").args(["show", name]))?;
        let dependency = records
            .split("\n\n")
            .filter(|record| {
                field(record, "Version").is_some_and(|version| version.starts_with(prefix))
            })
            .find_map(|record| field(record, "Depends"))
            .with_context(|| format!("Debian's lists have no {name} of version {prefix}*"))?;
        let first = dependency.split([',', ' ']).next().unwrap_or_default();
        Ok(first.to_owned())
    }

    /// Fetches and verifies `package`, the newest or with a version as `name=version`, and unpacks
    /// it into `target`.
    pub(crate) fn unpack(&self, package: &str, target: &Path) -> Result<()> {
        let downloads = self.folder.join("downloads");
        let _ = fs::remove_dir_all(&downloads);
        fs::create_dir_all(&downloads)
            .with_context(|| format!("cannot create {}", downloads.display()))?;
        command::run(
            self.apt("apt-get")
                .args(["-q", "download", package])
                .current_dir(&downloads),
        )?;
        let file = fs::read_dir(&downloads)?
            .filter_map(|entry| Some(entry.ok()?.path()))
            .find(|file| file.extension().is_some_and(|extension| extension == "deb"))
            .with_context(|| format!("apt-get download {package} left no file"))?;
        command::run(Command::new("dpkg").arg("--extract").arg(&file).arg(target))?;
        fs::remove_dir_all(&downloads)
            .with_context(|| format!("cannot remove {}", downloads.display()))
    }

    /// Fetches and verifies `packages` with all that they depend on, as if nothing were installed, and
    /// unpacks them into `target`.
    pub(crate) fn unpack_all(&self, packages: &[&str], target: &Path) -> Result<()> {
        let downloads = self.folder.join("cache/archives");
        command::run(
            self.apt("apt-get")
                .args(["-q", "--yes", "--no-install-recommends", "--download-only"])
                .arg("install")
                .args(packages),
        )?;
        for entry in fs::read_dir(&downloads)? {
            let file = entry?.path();
            if file.extension().is_some_and(|extension| extension == "deb") {
                command::run(Command::new("dpkg").arg("--extract").arg(&file).arg(target))?;
                fs::remove_file(&file)
                    .with_context(|| format!("cannot remove {}", file.display()))?;
            }
        }
        Ok(())
    }

    fn apt(&self, program: &str) -> Command {
        let mut apt = Command::new(program);
        apt.arg("-c").arg(self.folder.join("apt.conf"));
        apt
    }

    fn configuration(&self) -> String {
        let Self { folder, arch } = self;
        let folder = folder.display();
        // The machine's apt.conf.d stays in force, since it may name a proxy, but for its hooks.
        format!(
            "Dir::State \"{folder}\";\n\
             Dir::State::lists \"{folder}/lists\";\n\
             Dir::State::status \"{folder}/status\";\n\
             Dir::Cache \"{folder}/cache\";\n\
             Dir::Etc::sourcelist \"{folder}/sources.list\";\n\
             Dir::Etc::sourceparts \"{folder}/parts\";\n\
             Dir::Etc::preferencesparts \"{folder}/parts\";\n\
             APT::Architecture \"{arch}\";\n\
             APT::Architectures {{ \"{arch}\"; }};\n\
             APT::Sandbox::User \"\";\n\
             #clear APT::Update::Post-Invoke;\n\
             Acquire::Languages \"none\";\n\
             Acquire::IndexTargets::deb::DEP-11::DefaultEnabled \"false\";\n"
        )
    }

    /// Where the packages come from, as (base address, suite): the machine's own Debian suites and
    /// those with the testbed's kernel. `BLACKOUT_DEBIAN_MIRROR` names the base address instead.
    fn suites(&self) -> Result<Vec<(String, String)>> {
        if let Ok(base) = env::var("BLACKOUT_DEBIAN_MIRROR") {
            let suites = ["bookworm"].iter().chain(&KERNEL_SUITES);
            return Ok(suites
                .map(|suite| (base.clone(), (*suite).to_owned()))
                .collect());
        }
        let lists = self.folder.join("parts");
        let uris = command::output(
            Command::new("apt-get")
                .args(["update", "--print-uris", "-o"])
                .arg(format!("Dir::State::lists={}", lists.display())),
        )?;
        let release = fs::read_to_string("/etc/os-release").unwrap_or_default();
        let codename = release
            .lines()
            .find_map(|line| line.strip_prefix("VERSION_CODENAME="))
            .unwrap_or("bookworm");
        let mut suites = own_suites(&uris, codename);
        let base = suites
            .iter()
            .find(|(_, suite)| suite == codename)
            .map(|(base, _)| base.clone())
            .context(
                "this machine's apt does not say where Debian's packages are: \
                 set BLACKOUT_DEBIAN_MIRROR to a mirror's address",
            )?;
        for suite in KERNEL_SUITES {
            if !suites.iter().any(|(_, own)| own == suite) {
                suites.push((base.clone(), suite.to_owned()));
            }
        }
        Ok(suites)
    }

    fn write(&self, name: &str, text: &str) -> Result<()> {
        let file = self.folder.join(name);
        fs::write(&file, text).with_context(|| format!("cannot write {}", file.display()))
    }
}

/// The (base address, suite) pairs of `codename` in what `apt-get update --print-uris` printed.
fn own_suites(uris: &str, codename: &str) -> Vec<(String, String)> {
    uris.lines()
        .filter_map(|line| line.strip_prefix('\'')?.split_once("/InRelease'"))
        .filter_map(|(uri, _)| uri.split_once("/dists/"))
        .filter(|(_, suite)| {
            suite
                .strip_prefix(codename)
                .is_some_and(|rest| rest.is_empty() || rest.starts_with('-'))
        })
        .map(|(base, suite)| (base.to_owned(), suite.to_owned()))
        .collect()
}

/// The value of a field in a record of Debian's package lists.
fn field<'a>(record: &'a str, name: &str) -> Option<&'a str> {
    record
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(": "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn own_suites_are_those_of_the_release() {
        let uris = "'http://mirror/debian/dists/bookworm/InRelease' mirror_bookworm 0 \n\
                    'http://mirror/security/dists/bookworm-security/InRelease' x 0 \n\
                    'http://other/dists/bookwormish/InRelease' x 0 \n\
                    'http://other/apt/dists/stable/InRelease' x 0 \n";
        assert_eq!(
            own_suites(uris, "bookworm"),
            [
                ("http://mirror/debian".to_owned(), "bookworm".to_owned()),
                (
                    "http://mirror/security".to_owned(),
                    "bookworm-security".to_owned()
                ),
            ]
        );
    }

    #[test]
    fn fields_are_matched_whole() {
        let record = "Package: a\nVersion-Note: 1\nVersion: 6.12.1\n";
        assert_eq!(field(record, "Version"), Some("6.12.1"));
        assert_eq!(field(record, "Depends"), None);
    }
}
