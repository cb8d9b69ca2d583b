//! `blackout bench`: the tool has real monitors migrate a guest in turn, and judges them.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Output};

use anyhow::{Context, Result, ensure};
use harness::{programs, skip};
use serde_json::Value;

use crate::recorded::need_tool;

/// Runs the bench between two programs.
fn bench(baseline: &Path, current: &Path, options: &[&str]) -> Result<Output> {
    let mut command = Command::new(programs::tool()?);
    command
        .arg("bench")
        .arg("--baseline")
        .arg(baseline)
        .arg("--current")
        .arg(current)
        .arg("--payload")
        .arg(programs::guest()?)
        .args(["--settle", "0.2", "--json"])
        .args(options)
        .args(["--", "--memory", "32M"]);
    command.output().with_context(|| format!("{command:?}"))
}

fn check(output: &Output) -> Result<Value> {
    serde_json::from_slice(&output.stdout).with_context(|| {
        let said = String::from_utf8_lossy(&output.stderr);
        format!("no check; it ended with {} and said {said}", output.status)
    })
}

#[test]
fn a_bench_of_equals_finds_nothing_and_keeps_what_it_measured() -> Result<()> {
    need_tool!();
    let vmm = programs::vmm()?;
    let kept = tempfile::tempdir()?;
    let folder = kept.path().to_str().context("the folder's name")?;
    let output = bench(&vmm, &vmm, &["--runs", "4", "--keep", folder])?;
    let found = check(&output)?;
    // Four runs prove no slowdown, and may or may not prove that there is none.
    ensure!(matches!(output.status.code(), Some(0 | 2)), "{output:?}");
    ensure!(found["verdict"] != "regression", "{found}");
    for set in ["baseline", "current"] {
        ensure!(found[set]["migrations"] == 4, "{}", found[set]);
        ensure!(fs::read_dir(kept.path().join(set))?.count() == 4);
    }
    // What was kept can't be mixed with another bench's.
    let again = bench(&vmm, &vmm, &["--runs", "2", "--keep", folder])?;
    ensure!(again.status.code() == Some(3), "{again:?}");
    Ok(())
}

#[test]
fn a_monitor_that_has_more_to_save_is_slower() -> Result<()> {
    need_tool!();
    if cfg!(target_arch = "aarch64") {
        skip!("a clear verdict takes sixteen migrations, which is long in an emulator");
    }
    let vmm = programs::vmm()?;
    let folder = tempfile::tempdir()?;
    let slower = folder.path().join("slower");
    let script = format!("#!/bin/sh\nexec {} --cpus 8 \"$@\"\n", vmm.display());
    fs::write(&slower, script)?;
    fs::set_permissions(&slower, fs::Permissions::from_mode(0o755))?;
    let output = bench(&vmm, &slower, &["--runs", "8", "--only", "downtime"])?;
    let found = check(&output)?;
    if found["verdict"] == "inconclusive" {
        skip!("the machine is too busy: the tool asks for more runs");
    }
    ensure!(output.status.code() == Some(1), "{output:?}");
    ensure!(found["verdict"] == "regression", "{found}");
    Ok(())
}

#[test]
fn a_monitor_that_does_not_start_is_named() -> Result<()> {
    let output = bench(&programs::vmm()?, Path::new("/bin/false"), &["--runs", "2"])?;
    ensure!(output.status.code() == Some(3), "{output:?}");
    let said = String::from_utf8(output.stderr)?;
    ensure!(said.contains("/bin/false ended with"), "{said}");
    Ok(())
}
