//! `blackout doctor`: what it finds at programs that are made to have a fault, and what it measures.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use anyhow::{Context, Result, ensure};
use harness::{Vmm, VmmOptions, programs, skip};
use serde_json::Value;

use crate::recorded::need_tool;

/// A probe with a semaphore, and data that only the start of the program writes.
const SOURCE: &str = r#"
#define _SDT_HAS_SEMAPHORES 1
#include <sys/sdt.h>
unsigned short test_hit_semaphore __attribute__((section(".probes")));
extern const char *const relocated[];
const char *const relocated[] = {"a", "b"};
int main(int count, char **words) {
  if (test_hit_semaphore) DTRACE_PROBE1(test, hit, count);
  return words[0] == relocated[count % 2];
}
"#;

fn doctor(arguments: &[&str]) -> Result<(Option<i32>, Value)> {
    let Output { status, stdout, .. } = Command::new(programs::tool()?)
        .args(["doctor", "--json"])
        .args(arguments)
        .output()?;
    Ok((status.code(), serde_json::from_slice(&stdout)?))
}

fn fact<'a>(found: &'a Value, name: &str) -> Result<&'a Value> {
    let facts = found["monitor"].as_array().context("no monitor")?;
    let named = facts.iter().find(|fact| fact["name"] == name);
    named.with_context(|| format!("no {name} in {found}"))
}

#[test]
fn the_layout_of_rusts_linker_is_found_and_its_cure_too() -> Result<()> {
    need_tool!();
    let dir = tempfile::tempdir()?;
    let Some(faulty) = build(dir.path(), "faulty", "--no-rosegment")? else {
        skip!("gcc, sys/sdt.h (systemtap-sdt-dev) or Rust's own lld is missing");
    };
    let (code, found) = doctor(&["--exe", &faulty.to_string_lossy()])?;
    ensure!(code == Some(1), "{found}");
    let semaphores = fact(&found, "semaphores")?;
    ensure!(semaphores["good"] == false, "{found}");
    let help = semaphores["help"].as_str().context("no help")?;
    let cure = "-z,separate-loadable-segments";
    ensure!(help.contains(cure), "{help}");

    let cured = build(dir.path(), "cured", "-z,separate-loadable-segments")?;
    let cured = cured.context("no longer built")?;
    let (code, found) = doctor(&["--exe", &cured.to_string_lossy()])?;
    ensure!(fact(&found, "semaphores")?["good"] == true, "{found}");
    ensure!(code == Some(0), "{found}");
    Ok(())
}

#[test]
fn a_monitor_that_runs_is_sound() -> Result<()> {
    need_tool!();
    let vmm = Vmm::spawn(&VmmOptions::default())?;
    let (code, found) = doctor(&["--pid", &vmm.pid().to_string()])?;
    ensure!(code == Some(0), "{found}");
    for name in ["process", "VM", "program", "USDT probes"] {
        ensure!(fact(&found, name)?["good"] == true, "{name}: {found}");
    }
    Ok(())
}

#[test]
fn what_an_event_costs_is_measured() -> Result<()> {
    need_tool!();
    let (_, found) = doctor(&["--calibrate"])?;
    let costs = found["calibration"]["costs"].as_array();
    let costs = costs.with_context(|| format!("no costs: {found}"))?;
    ensure!(costs.len() == 4, "{found}");
    let probe = &costs[0];
    let more = |cost: &Value| Some(cost["with_ns"].as_f64()? - cost["without_ns"].as_f64()?);
    // A uprobe is a trap: it can't be for nothing, and is never a millisecond.
    let hit = more(probe).context("no figures")?;
    ensure!(hit > 50.0 && hit < 1e6, "{probe}");
    ensure!(
        found["calibration"]["recorder_ns"].as_f64() > Some(0.0),
        "{found}"
    );
    Ok(())
}

/// `None` where something is missing for it.
fn build(dir: &Path, name: &str, option: &str) -> Result<Option<PathBuf>> {
    let sysroot = Command::new("rustc").args(["--print", "sysroot"]).output();
    let Ok(sysroot) = sysroot else {
        return Ok(None);
    };
    let sysroot = PathBuf::from(String::from_utf8(sysroot.stdout)?.trim());
    let host = format!("{}-unknown-linux-gnu", std::env::consts::ARCH);
    let linker = sysroot.join("lib/rustlib").join(host).join("bin/gcc-ld");
    let (source, program) = (dir.join("program.c"), dir.join(name));
    std::fs::write(&source, SOURCE)?;
    let built = Command::new("gcc")
        .args(["-O1", "-fPIE", "-pie", "-fuse-ld=lld", "-B"])
        .arg(linker)
        .arg(format!("-Wl,{option}"))
        .arg("-o")
        .args([&program, &source])
        .output();
    Ok(built
        .is_ok_and(|output| output.status.success())
        .then_some(program))
}
