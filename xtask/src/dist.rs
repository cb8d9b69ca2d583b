//! `cargo xtask dist`: what others install: static programs for x86-64 and arm64, manual pages, shell
//! completions and bpftrace scripts, as an archive and as a Debian package.
//!
//! What was made is tried: every monitor has every probe of the table, and the Debian package of this
//! machine's architecture is installed into a folder, runs from there, and is removed again.

use std::env::consts::ARCH;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use blackout_abi::probes::{PROBES, PROVIDER};

use crate::artifacts::{self, Platform};
use crate::setup::{self, Purpose};
use crate::toolchain::{self, Choice, LLVM};
use crate::{command, paths};

/// The programs, and the folder of each kind of file below `usr`, as packages have them.
const PROGRAMS: [&str; 2] = ["blackout", "blackout-vmm"];
const PAGES: &str = "share/man/man1";
const SCRIPTS: &str = "share/blackout/scripts";
const DOCUMENTS: &str = "share/doc/blackout";
const UNITS: &str = "lib/systemd/system";

/// The service that watches, which the package installs but does not start.
const UNIT: &str = "blackout-watch.service";

/// Folder and file name of the completions of each shell, as packages have them.
const COMPLETIONS: [(&str, &str, &str); 3] = [
    ("share/bash-completion/completions", "", ".bash"),
    ("share/zsh/vendor-completions", "_", ""),
    ("share/fish/vendor_completions.d", "", ".fish"),
];

/// Arguments of `cargo xtask dist`.
#[derive(clap::Args, Default)]
pub(crate) struct Arguments {
    /// Where archives and packages go.
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Build for this machine's architecture alone.
    #[arg(long)]
    native: bool,
}

/// Runs the verb.
pub(crate) fn run(arguments: &Arguments) -> Result<u8> {
    setup::ensure(&[Purpose::Build, Purpose::Testbed, Purpose::Dist])?;
    let out = arguments.out.clone();
    let out = out.unwrap_or_else(|| paths::target().join("dist"));
    fs::create_dir_all(&out).with_context(|| format!("cannot make {}", out.display()))?;
    let manual = manual()?;
    let mut platforms = vec![Platform::Host];
    if ARCH != Platform::Testbed.arch() && !arguments.native {
        platforms.push(Platform::Testbed);
    }
    for platform in platforms {
        let arch = platform.arch();
        let choice = Choice::for_static(arch)
            .with_context(|| format!("no compiler here builds static {arch} programs"))?;
        let programs = artifacts::build_static(platform, &choice)?;
        let root = stage(&programs, &manual)?;
        for program in PROGRAMS {
            examine(&root.join("bin").join(program), arch)?;
        }
        let version = env!("CARGO_PKG_VERSION");
        let archive = out.join(format!("blackout-{version}-linux-{arch}.tar.gz"));
        command::run(
            Command::new("tar")
                .args(["--create", "--gzip", "--owner=0", "--group=0", "--file"])
                .arg(&archive)
                .arg("--directory")
                .arg(&root)
                .args(["bin", "lib", "share"]),
        )?;
        println!("archive  {}", archive.display());
        let package = package(&choice, &out)?;
        println!("package  {}", package.display());
        if arch == ARCH {
            install(&package)?;
        }
    }
    Ok(0)
}

/// Has the pages and completions written; where they are.
fn manual() -> Result<PathBuf> {
    let folder = paths::target().join("dist-manual");
    renew(&folder)?;
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    command::run(
        Command::new(cargo)
            .current_dir(paths::workspace())
            .args(["run", "--quiet", "--package", "blackout-manual", "--"])
            .arg(&folder),
    )?;
    Ok(folder)
}

/// Puts the files where packages have them, below one folder, which stands for `/usr`: also for
/// cargo-deb, which reads in `ebpf/user/Cargo.toml` what goes into the package.
fn stage(programs: &[PathBuf], manual: &Path) -> Result<PathBuf> {
    let root = paths::workspace().join("target/dist-root");
    renew(&root)?;
    for (name, program) in PROGRAMS.iter().zip(programs) {
        let staged = copy(program, &root.join("bin").join(name))?;
        // Debug information is half of a program. The probes' notes are none, and stay.
        let strip = format!("/usr/lib/llvm-{LLVM}/bin/llvm-strip");
        command::run(Command::new(strip).arg("--strip-debug").arg(staged))?;
        for (folder, prefix, suffix) in COMPLETIONS {
            let from = match prefix {
                "" => format!("{name}{suffix}"),
                prefix => format!("{prefix}{name}"),
            };
            // bash looks for a file of the program's own name.
            let to = if suffix == ".bash" {
                (*name).to_owned()
            } else {
                from.clone()
            };
            copy(
                &manual.join("completions").join(from),
                &root.join(folder).join(to),
            )?;
        }
    }
    every(&manual.join("man"), &root.join(PAGES))?;
    every(
        &paths::workspace().join("ebpf/scripts"),
        &root.join(SCRIPTS),
    )?;
    copy(
        &paths::workspace().join("ebpf/dist").join(UNIT),
        &root.join(UNITS).join(UNIT),
    )?;
    for name in ["README.md", "LICENSE"] {
        copy(
            &paths::workspace().join(name),
            &root.join(DOCUMENTS).join(name),
        )?;
    }
    Ok(root)
}

/// A program has to be for `arch` and static; the monitor needs every probe, and a build ID.
fn examine(program: &Path, arch: &str) -> Result<()> {
    let header = command::output(Command::new("readelf").args(["-hlnW"]).arg(program))?;
    let machine = match arch {
        "aarch64" => "AArch64",
        _ => "X86-64",
    };
    let name = program.display();
    ensure!(header.contains(machine), "{name} is not for {arch}");
    ensure!(!header.contains("INTERP"), "{name} is not static");
    if program.ends_with("blackout-vmm") {
        ensure!(
            header.contains("Build ID: "),
            "{name} has no build ID, by which perf knows programs"
        );
        let notes = header.lines().map(str::trim);
        let lacks = |probe: &&str| !notes.clone().any(|line| line == format!("Name: {probe}"));
        let missing: Vec<_> = PROBES
            .iter()
            .map(|probe| probe.name)
            .filter(lacks)
            .collect();
        ensure!(
            missing.is_empty(),
            "{name} lacks probes of {PROVIDER}: {missing:?}"
        );
    }
    Ok(())
}

/// Makes the Debian package of what is staged.
fn package(choice: &Choice, out: &Path) -> Result<PathBuf> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let path = command::output(
        Command::new(toolchain::cargo_deb()?)
            .current_dir(paths::workspace())
            .env("CARGO", cargo)
            .args([
                "--no-build",
                "--no-strip",
                "--package",
                "blackout",
                "--target",
            ])
            .args([&choice.target, "--output"])
            .arg(out),
    )?;
    let path = path.lines().last().context("cargo-deb named no package")?;
    Ok(PathBuf::from(path))
}

/// Installs a package into a folder, runs what it put there, and removes it.
fn install(package: &Path) -> Result<()> {
    let root = paths::target().join("dist-installed");
    renew(&root)?;
    let database = root.join("var/lib/dpkg");
    for folder in ["info", "updates"] {
        fs::create_dir_all(database.join(folder)).context("cannot make dpkg's folders")?;
    }
    fs::write(database.join("status"), "").context("cannot make dpkg's database")?;
    let dpkg = |action: &str, what: &Path| {
        command::run(
            Command::new("dpkg")
                .arg(format!("--root={}", root.display()))
                .args(["--force-not-root", "--force-bad-path", "--log=/dev/null"])
                .arg(action)
                .arg(what),
        )
    };
    dpkg("--install", package)?;
    for program in PROGRAMS {
        let installed = root.join("usr/bin").join(program);
        let version = command::output(Command::new(&installed).arg("--version"))?;
        ensure!(
            version.trim() == format!("{program} {}", env!("CARGO_PKG_VERSION")),
            "{program} says that it is {version}"
        );
        let page = root.join(format!("usr/{PAGES}/{program}.1.gz"));
        ensure!(page.is_file(), "{} is missing", page.display());
    }
    let probes = command::output(
        Command::new(root.join("usr/bin/blackout"))
            .arg("list")
            .arg(root.join("usr/bin/blackout-vmm")),
    )?;
    ensure!(
        probes.contains("migration_stop_vm_begin"),
        "no probes: {probes}"
    );
    let unit = root.join("usr").join(UNITS).join(UNIT);
    let says = fs::read_to_string(&unit)
        .with_context(|| format!("the service is not there: {}", unit.display()))?;
    let command = says
        .lines()
        .find_map(|line| line.strip_prefix("ExecStart="));
    let (program, arguments) = command
        .and_then(|command| command.split_once(' '))
        .context("the service starts nothing")?;
    let verb = arguments.split(' ').next().unwrap_or_default();
    let installed = root.join(program.trim_start_matches('/'));
    command::output(Command::new(installed).args([verb, "--help"]))
        .with_context(|| format!("the service's {command:?}"))?;
    dpkg("--remove", Path::new("blackout"))?;
    ensure!(
        !root.join("usr/bin/blackout").exists() && !unit.exists(),
        "removing the package leaves files in {}",
        root.display()
    );
    println!("installed into {}, run from there, removed", root.display());
    Ok(())
}

/// Copies a file into a folder that need not be there.
fn copy(from: &Path, to: &Path) -> Result<PathBuf> {
    if let Some(folder) = to.parent() {
        fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
    }
    fs::copy(from, to)
        .with_context(|| format!("cannot copy {} to {}", from.display(), to.display()))?;
    Ok(to.to_owned())
}

/// Copies every file of a folder.
fn every(from: &Path, to: &Path) -> Result<()> {
    let entries = fs::read_dir(from).with_context(|| format!("cannot read {}", from.display()))?;
    for entry in entries {
        let entry = entry?;
        copy(&entry.path(), &to.join(entry.file_name()))?;
    }
    Ok(())
}

/// Makes a folder that is empty.
fn renew(folder: &Path) -> Result<()> {
    if folder.exists() {
        fs::remove_dir_all(folder)
            .with_context(|| format!("cannot remove {}", folder.display()))?;
    }
    fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))
}
