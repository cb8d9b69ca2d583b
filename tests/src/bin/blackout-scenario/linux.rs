//! Debian's Linux with a disk that it writes to and a network card that it answers pings on.

use std::fs::File;
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use harness::Bridge;
use harness::linux::{ADDRESS, Linux, MAC, machine};

use super::{Arguments, Stage};

/// Bytes of the disk.
const DISK: u64 = 32 << 20;

/// How long the guest works before it is moved, and after it.
const WORK: Duration = Duration::from_secs(5);

/// Tap interfaces of the source and the destination.
const TAPS: [&str; 2] = ["demo-a", "demo-b"];

/// Migrates it once, at work.
pub(super) fn run(arguments: &Arguments, stage: &Stage) -> Result<()> {
    let folder = tempfile::tempdir()?;
    let disk = folder.path().join("disk");
    File::create(&disk)?.set_len(DISK)?;
    let bridge = Bridge::new("br-demo")?;
    let extra = |tap: &str| {
        let disk = format!("path={}", disk.display());
        let net = format!("tap={tap},mac={MAC}");
        ["--disk", &disk, "--net", &net, "--rng"].map(str::to_owned)
    };
    let mut options = machine("6.12", arguments.cpus, &extra(TAPS[0]));
    if let Some(memory) = &arguments.memory {
        options.memory.clone_from(memory);
    }
    stage.say(format!(
        "booting Linux 6.12: {} vCPU, {} of RAM, a disk, a network card",
        options.cpus, options.memory
    ));
    let mut guest = Linux::boot(options, Some((&bridge, TAPS[0])))?;
    let interrupts = guest.run("grep MSIX /proc/interrupts")?;
    for line in interrupts.lines() {
        stage.say(line);
    }
    guest.run("head -c 4194304 /dev/urandom > /tmp/copy")?;
    let write = "while true; do dd if=/tmp/copy of=/dev/vda bs=256k oflag=direct conv=notrunc \
                 2> /dev/null || touch /tmp/failed; echo >> /tmp/copies; done";
    guest.start(write)?;
    let mut ping = Command::new("ping");
    let mut ping = ping
        .arg(ADDRESS.to_string())
        .stdout(Stdio::piped())
        .spawn()
        .context("ping")?;
    stage.say(format!(
        "it writes to its disk, and {ADDRESS} answers pings"
    ));
    thread::sleep(WORK);

    let there = guest.destination(&extra(TAPS[1]), Some((&bridge, TAPS[1])))?;
    let recorder = stage.record(&mut guest.vmm, &there.vmm)?;
    stage.say("QMP migrate");
    stage.keep(&guest.migrate_to(there)?)?;
    stage.say("the guest runs at the destination");
    thread::sleep(WORK);

    let copies = guest.number("wc -l < /tmp/copies")?;
    guest.run("[ ! -e /tmp/failed ]")?;
    ping.kill()?;
    let pings = ping.wait_with_output()?;
    let pings = String::from_utf8_lossy(&pings.stdout).into_owned();
    let answered = pings.lines().filter(|line| line.contains("seq=")).count();
    ensure!(answered > 0, "no ping was answered: {pings}");
    stage.say(format!(
        "{copies} copies of 4 MiB are on its disk, {answered} pings were answered"
    ));
    stage.report(recorder)
}
