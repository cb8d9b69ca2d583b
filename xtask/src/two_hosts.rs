//! A migration between two hosts: two testbeds whose clocks differ, joined by a network, with the disk
//! of a Linux guest in storage that both have; each with a recorder of its own, and one report of both.

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
use crate::{linux, paths};

/// How long both hosts may take for it all.
const LIMIT: Duration = Duration::from_secs(900);

/// A clock between two emulated hosts is known better than this; what a busy machine takes for a
/// round trip between them is most of it. Ns.
const CLOCK_ERROR_NS: u64 = 20_000_000;

/// Where a span begins is read twice, by the monitor and at its probe, with this much between at most.
/// Ns.
const PROBE_NS: u64 = 1_000_000;

/// The size of the guest's disk.
const DISK_BYTES: u64 = 16 << 20;

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

/// Makes the folder that both hosts have, with the guest's disk: numbers that say where they stand.
fn storage() -> Result<PathBuf> {
    let folder = paths::target().join("testbed").join("two-hosts-storage");
    fs::create_dir_all(&folder).with_context(|| format!("cannot create {}", folder.display()))?;
    let disk = folder.join("disk");
    let words: Vec<u8> = (0..DISK_BYTES / 8).flat_map(u64::to_le_bytes).collect();
    fs::write(&disk, words).with_context(|| format!("cannot write {}", disk.display()))?;
    Ok(folder)
}

/// Runs both hosts; the folders with what they left, the destination's first.
fn migrate(series: Series, artifacts: &Artifacts) -> Result<[PathBuf; 2]> {
    let kernel = Kernel::find(Package::testbed(series, Arch::Aarch64))?;
    let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
    let (guests, storage) = (linux::prepare(Arch::Aarch64)?, storage()?);
    let testbed = |(name, _, role, clock): (_, _, &[&str], _)| -> Result<Testbed> {
        let end = if role == ["destination"] {
            "listen"
        } else {
            "connect"
        };
        Ok(Testbed::new(kernel.clone(), name)
            .programs(artifacts)
            .file(&artifacts.host, "/bin/blackout-host")
            .shared(&guests, "linux")?
            .env(linux::VARIABLE, "/share/linux")
            .shared(&storage, "storage")?
            .network(&format!("socket,{end}=127.0.0.1:{port}"))
            .clock(clock))
    };
    let testbeds = [testbed(HOSTS[0])?, testbed(HOSTS[1])?];
    let run = |index: usize| -> Result<PathBuf> {
        let ((name, address, role, _), testbed) = (HOSTS[index], &testbeds[index]);
        let up = format!(
            "ip link set eth0 up && ip addr add {address}/24 dev eth0 && \
             exec blackout-host --out /share/out --disk /share/storage/disk \"$@\""
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
    let resume_ns_seen =
        resume_ns(spans, "start_ns")?.checked_sub(number(migration, "/downtime_start_ns")?);

    let said = said.get("blackout").context("no breakdown")?;
    let said_ns = number(said, "/downtime-ns")?;
    let said_spans = said["spans"]
        .as_array()
        .context("no spans of the monitor")?;
    let resume_said = resume_ns(said_spans, "start-ns")?;
    let resume_ns_said = resume_said.checked_sub(number(said, "/downtime-start-ns")?);
    let bound_ns = error_ns + number(said, "/clock/error-ns")? + PROBE_NS;
    println!(
        "downtime {downtime_ns} ns by the tool, {said_ns} ns by the monitor, clocks ± {error_ns} ns"
    );
    // The downtime itself ends for the monitor where a vCPU's thread is about to call KVM_RUN, and
    // for the tool where it does: a busy machine lets time pass between the two.
    let (Some(seen), Some(told)) = (resume_ns_seen, resume_ns_said) else {
        bail!("the guest was resumed before it was stopped");
    };
    let off_ns = seen.abs_diff(told);
    ensure!(
        off_ns <= bound_ns,
        "from the stop to resume_all_vcpus it is {seen} ns by the tool, {told} ns by the monitor: \
         more apart than the clocks' {bound_ns} ns explain"
    );
    ensure!(
        downtime_ns + bound_ns >= said_ns,
        "the tool has lost some of the downtime"
    );
    Ok(())
}

/// When the destination's vCPUs are resumed.
fn resume_ns(spans: &[Value], start: &str) -> Result<u64> {
    let resume = spans
        .iter()
        .find(|span| span["name"] == "resume_all_vcpus" && span["side"] == "destination");
    let start = resume.and_then(|span| span[start].as_u64());
    start.context("no resume_all_vcpus at the destination")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// What the monitor says: 8 ms from the stop to the resumption, by clocks that fit to 0.1 ms.
    fn said() -> Value {
        json!({ "blackout": {
            "downtime-ns": 9_000_000,
            "downtime-start-ns": 5_000_000,
            "clock": { "error-ns": 100_000 },
            "spans": [{ "name": "resume_all_vcpus", "side": "destination", "start-ns": 13_000_000 }],
        } })
    }

    fn seen(error_ns: u64, resumed_ns: u64, downtime_ns: u64, first: &str) -> Value {
        json!({ "migrations": [{
            "status": "completed",
            "clock_error_ns": error_ns,
            "downtime_ns": downtime_ns,
            "downtime_start_ns": 1_000_000,
            "spans": [
                { "side": first, "name": "migrate" },
                {
                    "side": "destination",
                    "name": "resume_all_vcpus",
                    "start_ns": 1_000_000 + resumed_ns,
                },
            ],
        }] })
    }

    #[test]
    fn two_sides_that_agree_within_their_clocks_are_well() {
        let well = |report: Value| judge(&report, &said()).is_ok();
        assert!(well(seen(200_000, 8_000_000, 9_000_000, "source")));
        assert!(well(seen(200_000, 9_250_000, 10_000_000, "source")));
        // A busy machine.
        assert!(well(seen(200_000, 8_000_000, 30_000_000, "source")));
        assert!(!well(seen(200_000, 9_350_000, 10_000_000, "source")));
        assert!(!well(seen(200_000, 8_000_000, 7_600_000, "source")));
        assert!(!well(seen(0, 8_000_000, 9_000_000, "source")));
        let wide = seen(CLOCK_ERROR_NS, 8_000_000, 9_000_000, "source");
        assert!(!well(wide));
        assert!(!well(seen(200_000, 8_000_000, 9_000_000, "destination")));
    }
}
