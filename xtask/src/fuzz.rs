//! `cargo xtask fuzz`: feeds what a hostile guest or peer could send to the monitor, and recordings
//! that anybody may have written to the tool.
//!
//! The targets are in `vmm/fuzz/` and `ebpf/user/fuzz/`, outside the workspace, in cargo-fuzz's layout.
//! They need a nightly compiler; the sanitizers that cargo-fuzz switches on exist nowhere else.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::{command, paths};

/// Every target.
const TARGETS: [&str; 5] = ["pci", "virtio", "state", "incoming", "recording"];

/// Where a target's package is, and the most memory that it may ask for at once, MiB: a monitor has
/// a guest's RAM, a file of some kilobytes stands for next to nothing.
fn package(target: &str) -> (&'static str, u32) {
    match target {
        "recording" => ("ebpf/user/fuzz", 64),
        _ => ("vmm/fuzz", 2048),
    }
}

/// What a run may take beyond its seconds: the build, and reading its corpus.
const OVERHEAD: Duration = Duration::from_secs(1200);

/// Arguments of `cargo xtask fuzz`.
#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// Seconds for each target.
    #[arg(long, default_value_t = 60)]
    seconds: u64,
    /// The targets; by default, every one.
    #[arg(value_parser = TARGETS)]
    targets: Vec<String>,
}

/// Runs the verb; the exit code is 1 when a target found something.
pub(crate) fn run(arguments: &Arguments) -> Result<u8> {
    if let Some(why) = missing() {
        bail!("{why}");
    }
    let targets: Vec<_> = match arguments.targets.as_slice() {
        [] => TARGETS.into(),
        given => given.iter().map(String::as_str).collect(),
    };
    let mut found = false;
    for name in targets {
        found |= !target(name, arguments.seconds)?;
    }
    Ok(u8::from(found))
}

/// Every target for `seconds`, for the tests' slow tier: each one's name, and whether it found
/// nothing.
///
/// # Errors
/// When a target can't be built or does not end.
pub(crate) fn every_target(seconds: u64) -> Result<Vec<(&'static str, bool)>> {
    let run = |name| Ok((name, target(name, seconds)?));
    TARGETS.into_iter().map(run).collect()
}

/// Why there can be no fuzzing here, if so.
pub(crate) fn missing() -> Option<&'static str> {
    let nightly = command::probe(Command::new("rustup").args(["run", "nightly", "rustc", "-V"]));
    nightly.is_none().then_some(
        "fuzzing needs a nightly compiler: rustup toolchain install nightly --profile minimal",
    )
}

/// Runs one target; whether it found nothing. What it finds is left in its package's `artifacts`.
fn target(name: &str, seconds: u64) -> Result<bool> {
    let (folder, at_once) = package(name);
    let folder = paths::workspace().join(folder);
    let mut fuzz = Command::new("rustup");
    fuzz.args(["run", "nightly"])
        .arg(cargo_fuzz()?)
        .args(["fuzz", "run", "--fuzz-dir"])
        .arg(&folder)
        .args([name, "--"])
        .arg(format!("-max_total_time={seconds}"))
        // Memory above this is a finding; a device's name, which is given once in a monitor's life
        // and never taken back, is none. libFuzzer and the sanitizer each have a switch for it.
        .args(["-rss_limit_mb=2048", "-detect_leaks=0", "-timeout=60"])
        .arg(format!("-malloc_limit_mb={at_once}"))
        .env("ASAN_OPTIONS", "detect_leaks=0")
        .args(["-max_len=4096", "-len_control=0", "-print_final_stats=1"])
        .current_dir(&folder)
        .env_remove("RUSTUP_TOOLCHAIN")
        .env_remove("CARGO")
        .env_remove("RUSTFLAGS");
    let limit = Duration::from_secs(seconds) + OVERHEAD;
    let ended = command::stream(&mut fuzz, limit, |line| {
        if line.contains("stat::number_of_executed") || line.contains("ERROR") {
            println!("fuzz {name}: {line}");
        }
    })?;
    Ok(ended
        .with_context(|| format!("fuzz {name} does not end"))?
        .success())
}

/// cargo-fuzz; installed into the project's cache when it is nowhere.
fn cargo_fuzz() -> Result<PathBuf> {
    if let Some(there) = command::find("cargo-fuzz") {
        return Ok(there);
    }
    let root = paths::cache()?.join("cargo-fuzz");
    let program = root.join("bin/cargo-fuzz");
    if !program.is_file() {
        install(&root)?;
    }
    Ok(program)
}

fn install(root: &Path) -> Result<()> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    command::run(
        Command::new(cargo)
            .args(["install", "--locked", "cargo-fuzz", "--root"])
            .arg(root)
            // The workspace's folder would bring its .cargo/config.toml into this build.
            .current_dir("/"),
    )
}
