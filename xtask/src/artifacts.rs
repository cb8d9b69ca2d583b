//! What the project builds: programs of the machine itself, and the same for the testbed.

use std::collections::BTreeMap;
use std::env::consts::ARCH;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use clap::ValueEnum;
use serde_json::Value;

use crate::{command, kernel::Arch, paths, toolchain::Choice};

/// Where built programs will run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Platform {
    /// On this machine, with its own `/dev/kvm`.
    Host,
    /// In the arm64 testbed: static programs.
    Testbed,
}

impl Platform {
    /// Where programs for a testbed of `arch` come from: the x86-64 one runs those of an x86-64
    /// machine itself.
    ///
    /// # Errors
    /// When this machine builds none for it.
    pub(crate) fn of_testbed(arch: Arch) -> Result<Self> {
        match arch {
            Arch::Aarch64 => Ok(Self::Testbed),
            Arch::X86_64 if ARCH == "x86_64" => Ok(Self::Host),
            Arch::X86_64 => bail!("only x86-64 machines build for the x86-64 testbed"),
        }
    }

    /// The architecture, as Rust and the kernel's tools spell it.
    pub(crate) fn arch(self) -> &'static str {
        match self {
            Self::Host => ARCH,
            Self::Testbed => "aarch64",
        }
    }
}

/// Paths of the built files, for one platform.
#[derive(Clone, Debug)]
pub(crate) struct Artifacts {
    /// The virtual machine monitor, `blackout-vmm`.
    pub(crate) vmm: PathBuf,
    /// The measuring tool, `blackout`, with its eBPF programs inside.
    pub(crate) tool: PathBuf,
    /// The bare-metal guest, an ELF file.
    pub(crate) guest: PathBuf,
    /// One recorded migration of that guest, `blackout-scenario`.
    pub(crate) scenario: PathBuf,
    /// One host of a migration between two, `blackout-host`.
    pub(crate) host: PathBuf,
    /// What measures the monitor by itself, `bench-boot`.
    pub(crate) bench_boot: PathBuf,
    /// What measures the last look at a dirty log, `bench-dirty-log`.
    pub(crate) bench_dirty_log: PathBuf,
    /// What measures dark times, `bench-downtime`.
    pub(crate) bench_downtime: PathBuf,
    /// What holds predictions of downtimes against what came, `bench-prediction`.
    pub(crate) bench_prediction: PathBuf,
    /// What measures the tool's cost, `bench-overhead`.
    pub(crate) bench_overhead: PathBuf,
    /// What measures how fast migrations are, `bench-throughput`.
    pub(crate) bench_throughput: PathBuf,
}

impl Artifacts {
    /// Name and path of each program, for copying them somewhere.
    pub(crate) fn files(&self) -> [(&'static str, &Path); 4] {
        [
            ("blackout-vmm", &self.vmm),
            ("blackout", &self.tool),
            ("blackout-guest", &self.guest),
            ("blackout-scenario", &self.scenario),
        ]
    }

    /// The environment variables by which the harness finds the programs that it starts, with the
    /// folder that holds them under their own names, or with where they were built.
    pub(crate) fn environment(&self, folder: Option<&str>) -> [(&'static str, String); 3] {
        let place = |name: &str, path: &Path| match folder {
            Some(folder) => format!("{folder}/{name}"),
            None => path.display().to_string(),
        };
        [
            ("BLACKOUT_VMM", place("blackout-vmm", &self.vmm)),
            ("BLACKOUT_TOOL", place("blackout", &self.tool)),
            ("BLACKOUT_GUEST", place("blackout-guest", &self.guest)),
        ]
    }
}

/// Builds everything for `platform`; quick when nothing changed.
pub(crate) fn build(platform: Platform) -> Result<Artifacts> {
    let object = build_bpf(platform)?;
    let guest = build_guest(platform)?;
    let mut cargo = cargo(platform, "build")?;
    cargo
        .args([
            "--package",
            "blackout-vmm",
            "--package",
            "blackout",
            "--package",
            "blackout-tests",
            "--bins",
        ])
        .env("BLACKOUT_BPF_OBJECT", &object);
    let programs = executables(&mut cargo, Harness::None)?;
    let program = |name: &str| {
        programs
            .get(name)
            .cloned()
            .with_context(|| format!("cargo built no program {name}"))
    };
    Ok(Artifacts {
        vmm: program("blackout-vmm")?,
        tool: program("blackout")?,
        scenario: program("blackout-scenario")?,
        host: program("blackout-host")?,
        bench_boot: program("bench-boot")?,
        bench_dirty_log: program("bench-dirty-log")?,
        bench_downtime: program("bench-downtime")?,
        bench_prediction: program("bench-prediction")?,
        bench_overhead: program("bench-overhead")?,
        bench_throughput: program("bench-throughput")?,
        guest,
    })
}

/// What counts instructions in the testbed.
#[derive(Clone, Debug)]
pub(crate) struct Counter {
    /// What measures the ITS and GIC handlers, `bench-its`.
    pub(crate) program: PathBuf,
    /// The bare-metal guest.
    pub(crate) guest: PathBuf,
}

/// Builds nothing but what counts: this takes neither eBPF programs nor their compiler.
pub(crate) fn build_counter() -> Result<Counter> {
    build_counter_of(paths::workspace(), &paths::target())
}

/// The same from the sources in `workspace`; cargo works in `target`.
pub(crate) fn build_counter_of(workspace: &Path, target: &Path) -> Result<Counter> {
    let mut guest = guest_cargo(Platform::Testbed)?;
    let mut program = cargo(Platform::Testbed, "build")?;
    program.args(["--package", "blackout-tests", "--bin", "bench-its"]);
    for cargo in [&mut guest, &mut program] {
        cargo.current_dir(workspace).env("CARGO_TARGET_DIR", target);
    }
    let built = |cargo: &mut Command, name: &str| {
        executables(cargo, Harness::None)?
            .remove(name)
            .with_context(|| format!("cargo built no program {name}"))
    };
    Ok(Counter {
        guest: built(&mut guest, "blackout-guest")?,
        program: built(&mut program, "bench-its")?,
    })
}

/// Builds the integration tests for `platform`: name and path of each test program.
pub(crate) fn build_tests(platform: Platform) -> Result<BTreeMap<String, PathBuf>> {
    let object = build_bpf(platform)?;
    let mut cargo = cargo(platform, "test")?;
    cargo
        .args(["--package", "blackout-tests", "--tests", "--no-run"])
        // As in `build`: without it, each of the two would make the tool anew after the other.
        .env("BLACKOUT_BPF_OBJECT", &object);
    executables(&mut cargo, Harness::Libtest)
}

/// Builds a monitor of this machine's that has no probes, into a folder of its own.
pub(crate) fn build_without_probes() -> Result<PathBuf> {
    let mut cargo = cargo(Platform::Host, "build")?;
    cargo
        .args(["--package", "blackout-vmm", "--features", "no-probes"])
        .arg("--target-dir")
        .arg(paths::target().join("no-probes"));
    executables(&mut cargo, Harness::None)?
        .remove("blackout-vmm")
        .context("cargo built no blackout-vmm")
}

/// Builds the tool and the monitor, static: the compiler is one for static programs of the platform.
pub(crate) fn build_static(platform: Platform, choice: &Choice) -> Result<[PathBuf; 2]> {
    let object = build_bpf(platform)?;
    let mut cargo = choice.cargo("build")?;
    cargo
        .args([
            "--package",
            "blackout",
            "--package",
            "blackout-vmm",
            "--bins",
        ])
        .env("BLACKOUT_BPF_OBJECT", &object);
    let mut programs = executables(&mut cargo, Harness::None)?;
    let mut program = |name: &str| {
        let program = programs.remove(name);
        program.with_context(|| format!("cargo built no program {name}"))
    };
    Ok([program("blackout")?, program("blackout-vmm")?])
}

/// Builds the eBPF programs into `target/bpf/ARCH/blackout-ebpf`, the object file that the tool
/// includes.
pub(crate) fn build_bpf(platform: Platform) -> Result<PathBuf> {
    let arch = platform.arch();
    let folder = paths::target().join("bpf").join(arch);
    let choice = Choice::for_bpf()
        .context("no compiler here builds eBPF programs: run `cargo xtask setup`")?;
    let mut cargo = choice.cargo("build")?;
    // The layout of `pt_regs` depends on the architecture, and BTF has to survive the link. These
    // flags would rebuild everything else in turn, hence the folder of its own.
    let flags = [
        &format!("--cfg=bpf_target_arch=\"{arch}\""),
        "-Cdebuginfo=2",
        "-Clink-arg=--btf",
    ];
    cargo
        .env("CARGO_ENCODED_RUSTFLAGS", flags.join("\x1f"))
        .args(["--package", "blackout-ebpf", "--target-dir"])
        .arg(&folder);
    let built = executables(&mut cargo, Harness::None)?
        .remove("blackout-ebpf")
        .context("cargo built no eBPF object")?;
    let object = folder.join("blackout-ebpf");
    replace_if_changed(&built, &object)?;
    // By this file's age, the tool's build script tells whether the object is of its sources.
    let built = folder.join("built");
    fs::write(&built, []).with_context(|| format!("cannot write {}", built.display()))?;
    Ok(object)
}

/// Builds the bare-metal guest.
fn build_guest(platform: Platform) -> Result<PathBuf> {
    executables(&mut guest_cargo(platform)?, Harness::None)?
        .remove("blackout-guest")
        .context("cargo built no guest")
}

/// Cargo that builds the bare-metal guest.
fn guest_cargo(platform: Platform) -> Result<Command> {
    let arch = platform.arch();
    let choice = Choice::for_guest(arch).with_context(|| {
        format!("no compiler here builds bare-metal {arch} programs: run `cargo xtask setup`")
    })?;
    let mut cargo = choice.cargo("build")?;
    cargo.args(["--package", "blackout-guest"]);
    if choice.build_core {
        cargo.arg("--target-dir").arg(paths::target().join("guest"));
    }
    Ok(cargo)
}

/// Cargo for programs with an operating system below them.
fn cargo(platform: Platform, subcommand: &str) -> Result<Command> {
    match platform {
        Platform::Host => {
            let mut cargo =
                Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
            cargo
                .current_dir(paths::workspace())
                .args([subcommand, "--release"]);
            Ok(cargo)
        }
        Platform::Testbed => Choice::for_testbed()
            .context("no compiler here builds programs for the testbed: run `cargo xtask setup`")?
            .cargo(subcommand),
    }
}

/// What an executable has around the target's code. A test build also makes the programs that the
/// tests start, under the same names as those programs' own unit tests.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Harness {
    None,
    Libtest,
}

/// Runs a cargo build and returns the executables with that harness, by target name.
fn executables(cargo: &mut Command, harness: Harness) -> Result<BTreeMap<String, PathBuf>> {
    cargo
        .arg("--message-format=json-render-diagnostics")
        .stdin(Stdio::null());
    let messages = command::output(cargo)?;
    let mut found = BTreeMap::new();
    for line in messages.lines().filter(|line| line.starts_with('{')) {
        let message: Value = serde_json::from_str(line).context("cargo printed broken JSON")?;
        let libtest = message["profile"]["test"].as_bool() == Some(true);
        if libtest == (harness == Harness::Libtest)
            && let (Some(name), Some(file)) = (
                message["target"]["name"].as_str(),
                message["executable"].as_str(),
            )
        {
            found.insert(name.to_owned(), PathBuf::from(file));
        }
    }
    Ok(found)
}

/// Copies `from` to `to` unless it holds the same, so that dependants are not rebuilt in vain.
fn replace_if_changed(from: &Path, to: &Path) -> Result<()> {
    let new = fs::read(from).with_context(|| format!("cannot read {}", from.display()))?;
    if new.is_empty() {
        bail!("{} is empty", from.display());
    }
    if fs::read(to).is_ok_and(|old| old == new) {
        return Ok(());
    }
    fs::write(to, new).with_context(|| format!("cannot write {}", to.display()))
}
