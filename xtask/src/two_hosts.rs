//! A migration between two hosts: two testbeds whose clocks differ, joined by nothing but a network,
//! each with a recorder of its own, and one report of both.

use std::fs;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::artifacts::{self, Artifacts, Platform};
use crate::kernel::{Arch, Kernel, Package, Series};
use crate::testbed::Testbed;

/// How long both hosts may take for it all.
const LIMIT: Duration = Duration::from_secs(600);

/// A clock between two emulated hosts is known better than this; what a busy machine takes for a
/// round trip between them is most of it. Ns.
const CLOCK_ERROR_NS: u64 = 20_000_000;

/// The hosts: name, address, role, and the year that its clock shows.
const HOSTS: [(&str, &str, &[&str], &str); 2] = [
    (
        "two-hosts-destination",
        "10.77.0.2",
        &["destination"],
        "2031-07-01",
    ),
    (
        "two-hosts-source",
        "10.77.0.1",
        &["source", "--to", "10.77.0.2"],
        "2024-02-29",
    ),
];

/// Migrates a guest from one testbed to another, and checks what the report says of it.
///
/// # Errors
/// When a host fails, or when the report is not what it should be.
pub(crate) fn check(series: Series) -> Result<()> {
    let artifacts = artifacts::build(Platform::Testbed)?;
    let tool = artifacts::build(Platform::Host)?.tool;
    let [destination, source] = migrate(series, &artifacts)?;
    let recordings = [&source, &destination].map(|out| out.join("recording"));
    println!("{}", report(&tool, &recordings, &[])?);
    let json: Value = serde_json::from_str(&report(&tool, &recordings, &["--json"])?)?;
    let said = fs::read(source.join("query-migrate.json")).context("query-migrate.json")?;
    judge(&json, &serde_json::from_slice(&said)?)
}

/// Runs both hosts; the folders with what they left, the destination's first.
fn migrate(series: Series, artifacts: &Artifacts) -> Result<[PathBuf; 2]> {
    let kernel = Kernel::find(Package::testbed(series, Arch::Aarch64))?;
    let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
    let testbeds = HOSTS.map(|(name, _, role, clock)| {
        let end = if role == ["destination"] {
            "listen"
        } else {
            "connect"
        };
        Testbed::new(kernel.clone(), name)
            .programs(artifacts)
            .file(&artifacts.host, "/bin/blackout-host")
            .network(&format!("socket,{end}=127.0.0.1:{port}"))
            .clock(clock)
    });
    let run = |index: usize| -> Result<PathBuf> {
        let ((name, address, role, _), testbed) = (HOSTS[index], &testbeds[index]);
        let up = format!(
            "ip link set eth0 up && ip addr add {address}/24 dev eth0 && \
             exec blackout-host --out /share/out \"$@\""
        );
        let mut program = vec!["sh", "-c", &up, "sh"];
        program.extend(role);
        let finished = testbed
            .run(&program, LIMIT, |line| println!("{line}"))
            .with_context(|| name.to_owned())?;
        if finished.status != 0 {
            bail!("{name} ended with status {}", finished.status);
        }
        Ok(testbed.share().join("out"))
    };
    thread::scope(|scope| {
        // Who listens has to be there first; QEMU does not try again.
        let destination = scope.spawn(|| run(0));
        thread::sleep(Duration::from_secs(1));
        let source = run(1);
        let destination = destination.join();
        let Ok(destination) = destination else {
            bail!("the destination's thread panicked");
        };
        Ok([destination?, source?])
    })
}

fn report(tool: &Path, recordings: &[PathBuf; 2], how: &[&str]) -> Result<String> {
    let mut command = Command::new(tool);
    let output = command
        .arg("report")
        .args(how)
        .args(recordings)
        .output()
        .with_context(|| format!("{command:?}"))?;
    let complaint = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{command:?}: {complaint}");
    Ok(String::from_utf8(output.stdout)?)
}

/// The report knows both sides, how well the clocks fit, and the downtime that the source's own
/// arithmetic gives.
fn judge(report: &Value, said: &Value) -> Result<()> {
    let migrations = report["migrations"].as_array().context("no migrations")?;
    let [migration] = migrations.as_slice() else {
        bail!("{} migrations, not one", migrations.len());
    };
    let number = |of: &Value, pointer: &str| {
        let value = of.pointer(pointer).and_then(Value::as_u64);
        value.with_context(|| format!("no {pointer}"))
    };
    ensure!(
        migration["status"] == "completed",
        "{}",
        migration["status"]
    );
    let spans = migration["spans"].as_array().context("no spans")?;
    for side in ["source", "destination"] {
        ensure!(spans.iter().any(|span| span["side"] == side), "no {side}");
    }
    let error_ns = number(migration, "/clock_error_ns")?;
    ensure!(
        (1..CLOCK_ERROR_NS).contains(&error_ns),
        "the clocks fit to ± {error_ns} ns"
    );
    let downtime_ns = number(migration, "/downtime_ns")?;
    let said_ns = number(said, "/blackout/downtime-ns")?;
    let off_ns = downtime_ns.abs_diff(said_ns);
    let bound_ns = error_ns + number(said, "/blackout/clock/error-ns")?;
    println!(
        "downtime {downtime_ns} ns by the tool, {said_ns} ns by the monitor, clocks ± {error_ns} ns"
    );
    ensure!(
        off_ns <= bound_ns,
        "{off_ns} ns apart, more than the clocks' {bound_ns} ns explain"
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn said() -> Value {
        json!({ "blackout": { "downtime-ns": 9_000_000, "clock": { "error-ns": 100_000 } } })
    }

    fn seen(error_ns: u64, downtime_ns: u64, sides: [&str; 2]) -> Value {
        let spans: Vec<_> = sides.iter().map(|side| json!({ "side": side })).collect();
        json!({ "migrations": [{
            "status": "completed",
            "clock_error_ns": error_ns,
            "downtime_ns": downtime_ns,
            "spans": spans,
        }] })
    }

    #[test]
    fn two_sides_that_agree_within_their_clocks_are_well() {
        let both = ["source", "destination"];
        assert!(judge(&seen(200_000, 9_250_000, both), &said()).is_ok());
        assert!(judge(&seen(200_000, 9_350_000, both), &said()).is_err());
        assert!(judge(&seen(0, 9_000_000, both), &said()).is_err());
        assert!(judge(&seen(CLOCK_ERROR_NS, 9_000_000, both), &said()).is_err());
        let one = ["source", "source"];
        assert!(judge(&seen(200_000, 9_000_000, one), &said()).is_err());
    }
}
