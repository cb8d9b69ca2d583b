//! `cargo xtask ci`: all that a change has to pass, the same here and on a build server.

use std::env;
use std::process::Command;

use anyhow::{Context, Result};

use crate::artifacts::Platform;
use crate::setup::{self, Purpose};
use crate::toolchain::Choice;
use crate::{command, paths, test, tidy};

/// Arguments of `cargo xtask ci`.
#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// Stop before the tests.
    #[arg(long)]
    no_tests: bool,
    /// Also run the tests that take long.
    #[arg(long)]
    slow: bool,
}

/// Runs the verb. Every check runs, also after one failed; the exit code is 0 when all passed.
pub(crate) fn run(arguments: &Arguments) -> Result<u8> {
    setup::ensure(&[Purpose::Testbed, Purpose::Test])?;
    let mut failed = Vec::new();
    for (name, mut check) in checks()? {
        println!("== {name}");
        if let Err(error) = command::run(&mut check) {
            println!("{error:#}");
            failed.push(name);
        }
    }
    println!("== tidy");
    if tidy::run(&tidy::Arguments::default())? != 0 {
        failed.push("tidy".to_owned());
    }
    let tests = if arguments.no_tests {
        0
    } else {
        test::run(&test::Arguments::all(arguments.slow))?
    };
    if !failed.is_empty() {
        eprintln!("failed: {}", failed.join(", "));
    }
    Ok(u8::from(!failed.is_empty() || tests != 0))
}

/// Formatting, lints for every target that the project has code for, and documentation.
fn checks() -> Result<Vec<(String, Command)>> {
    let hosted = [
        "--workspace",
        "--exclude",
        "blackout-ebpf",
        "--exclude",
        "blackout-guest",
    ];
    let mut checks = vec![("formatting".to_owned(), cargo(&["fmt", "--all", "--check"]))];

    let mut clippy = cargo(&["clippy", "--all-targets"]);
    clippy.args(hosted);
    checks.push(("lints".to_owned(), clippy));

    let testbed = Choice::for_testbed().context("no compiler for the testbed")?;
    let ebpf = Choice::for_bpf().context("no compiler for eBPF programs")?;
    let mut elsewhere = vec![
        (
            "the testbed's programs",
            testbed,
            &["--package", "blackout-vmm", "--package", "blackout"][..],
        ),
        (
            "the eBPF programs",
            ebpf,
            &[
                "--package",
                "blackout-ebpf",
                "--target-dir",
                "target/bpf/lints",
            ],
        ),
    ];
    for platform in [Platform::Host, Platform::Testbed] {
        let guest = Choice::for_guest(platform.arch()).context("no compiler for guests")?;
        elsewhere.push(("the guest", guest, &["--package", "blackout-guest"]));
    }
    for (what, choice, packages) in elsewhere {
        // clippy comes with the active toolchain and reads its libraries only.
        if !choice.is_active() {
            println!("skipped: lints of {what}, which another compiler builds here");
            continue;
        }
        let mut clippy = choice.cargo("clippy")?;
        clippy.args(packages);
        checks.push((format!("lints of {what}, {}", choice.target), clippy));
    }
    for (_, check) in &mut checks[1..] {
        check.args(["--", "--deny", "warnings"]);
    }

    let mut documentation = cargo(&["doc", "--no-deps", "--document-private-items"]);
    documentation
        .args(hosted)
        .env("RUSTDOCFLAGS", "--deny warnings");
    checks.push(("documentation".to_owned(), documentation));
    Ok(checks)
}

fn cargo(arguments: &[&str]) -> Command {
    let mut cargo = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.current_dir(paths::workspace()).args(arguments);
    cargo
}
