//! The probe table, the built monitor and stock tools say the same.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use blackout::usdt::Binary;
use blackout_abi::{PROBES, PROVIDER};
use harness::{GuestView, Vmm, VmmOptions, programs, skip};

const LIMIT: Duration = Duration::from_secs(120);

#[test]
fn the_built_monitor_has_the_probes_of_the_table() -> Result<()> {
    let binary = Binary::open(&programs::vmm()?)?;
    let sites = || binary.sites.iter().filter(|site| site.provider == PROVIDER);
    let built: BTreeSet<_> = sites().map(|site| site.name.as_str()).collect();
    let table: BTreeSet<_> = PROBES.iter().map(|p| p.name).collect();
    let missing: Vec<_> = table.difference(&built).collect();
    let unknown: Vec<_> = built
        .iter()
        .filter(|name| PROBES.iter().all(|p| p.name != **name))
        .collect();
    ensure!(
        missing.is_empty(),
        "in the table, not in the monitor: {missing:?}"
    );
    ensure!(
        unknown.is_empty(),
        "in the monitor, not in the table: {unknown:?}"
    );
    for site in sites() {
        let row = PROBES
            .iter()
            .find(|p| p.name == site.name)
            .context("checked above")?;
        ensure!(
            site.args.len() == row.args.len(),
            "{}: {} arguments in the monitor, {} in the table",
            site.name,
            site.args.len(),
            row.args.len()
        );
        ensure!(site.semaphore.is_none(), "{} has a semaphore", site.name);
    }
    Ok(())
}

#[test]
fn bpftrace_lists_every_probe() -> Result<()> {
    if !bpftrace_is_here() {
        skip!("bpftrace is not on this machine");
    }
    let vmm = programs::vmm()?;
    let output = Command::new("bpftrace")
        .arg("-l")
        .arg(format!("usdt:{}:*", vmm.display()))
        .output()?;
    let listed = String::from_utf8_lossy(&output.stdout);
    for probe in PROBES {
        let line = format!(":{PROVIDER}:{}", probe.name);
        ensure!(
            listed.lines().any(|l| l.ends_with(&line)),
            "{line} is missing in:\n{listed}"
        );
    }
    Ok(())
}

/// Runs the README's bpftrace command through a shell, exactly as it is printed there.
#[test]
fn the_readmes_bpftrace_command_works_as_printed() -> Result<()> {
    if !bpftrace_is_here() {
        skip!("bpftrace is not on this machine");
    }
    let readme = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("../README.md"))?;
    let block = readme
        .split("```")
        .find(|block| block.contains("bpftrace -p"));
    let command = block
        .and_then(|b| b.split_once('\n'))
        .context("README has no such block")?
        .1;

    let options = VmmOptions {
        cmdline: "dirty=64K".into(),
        ..VmmOptions::default()
    };
    let mut source = Vmm::spawn(&options)?;
    GuestView::open(source.pid())?.wait_ready(LIMIT)?;
    let uri = format!("unix:{}", source.dir().join("migration").display());
    let _destination = Vmm::spawn(&options.incoming(&uri))?;
    let child = Command::new("timeout")
        .args(["--signal=INT", "10", "sh", "-c", command])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    // bpftrace has no way to say that it is attached.
    thread::sleep(Duration::from_secs(5));
    let answer = source.qmp.migrate(&uri, LIMIT)?;
    ensure!(answer["status"] == "completed", "{answer}");
    let output = child.wait_with_output()?;
    let printed = String::from_utf8_lossy(&output.stdout);
    let handler = if cfg!(target_arch = "x86_64") {
        "kvmclock"
    } else {
        "its"
    };
    ensure!(
        printed.contains(handler),
        "the handler {handler} is missing in:\n{printed}\n{}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(())
}

fn bpftrace_is_here() -> bool {
    Command::new("bpftrace")
        .arg("--version")
        .output()
        .is_ok_and(|o| o.status.success())
}
