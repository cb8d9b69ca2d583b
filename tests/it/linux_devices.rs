//! Linux finds every device of the monitor, uses it, and finds it again after it has moved.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use harness::linux::{ADDRESS, Linux, MAC, machine};
use harness::{Bridge, Vmm, bridge, programs, skip};

/// Under emulation, and with others on the same machine, a boot takes a minute.
const LIMIT: Duration = Duration::from_secs(300);

/// The arguments of a machine that has one of everything, whose files are in `folder`.
fn everything(folder: &Path, tap: &str, console: &str) -> Vec<String> {
    let path = |name: &str| folder.join(name).display().to_string();
    let options = [
        ("--disk", format!("path={},id=the-disk", path("disk"))),
        ("--disk", format!("path={},readonly", path("readonly"))),
        ("--net", format!("tap={tap},mac={MAC}")),
        ("--console", format!("unix:{}", path(console))),
        ("--vsock", format!("cid=7,path={}", path("vsock"))),
    ];
    let mut all: Vec<_> = options
        .into_iter()
        .flat_map(|(flag, value)| [flag.to_owned(), value])
        .collect();
    all.push("--rng".to_owned());
    all
}

fn ping() -> Result<()> {
    let output = Command::new("ping")
        .args(["-c", "1", "-W", "20", &ADDRESS.to_string()])
        .output()?;
    let said = String::from_utf8_lossy(&output.stdout);
    ensure!(output.status.success(), "no answer to a ping: {said}");
    Ok(())
}

/// Each device does what it is for; the disk's first block says that it was here for the `visit`th
/// time.
fn works(guest: &mut Linux, console: &Path, visit: u32) -> Result<()> {
    let serial = guest.run("cat /sys/block/vda/serial")?;
    ensure!(serial.trim() == "the-disk", "{serial}");
    ensure!(guest.run("cat /sys/block/vdb/ro")?.trim() == "1");
    let write =
        format!("echo visit {visit} | dd of=/dev/vda bs=512 conv=sync,notrunc,fsync 2> /dev/null");
    guest.run(&write)?;
    let read = "dd if=/dev/vdb of=/tmp/block bs=512 count=1 iflag=direct 2> /dev/null";
    guest.run(&format!("{read} && grep -q 'read only' /tmp/block"))?;
    let random = "dd if=/dev/hwrng of=/tmp/random bs=16 count=1 2> /dev/null";
    ensure!(guest.number(&format!("{random}; stat -c %s /tmp/random"))? == 16);
    guest.run(&format!("ping -c 1 -W 20 {}", bridge::HOST))?;
    ping()?;

    let mut client = UnixStream::connect(console)?;
    client.set_read_timeout(Some(LIMIT))?;
    // The terminal echoes and edits until it is told otherwise, and forgets that when it is closed.
    let answer = "(stty raw -echo; echo begin; read line; echo heard $line) <> /dev/hvc0 >&0";
    guest.start(answer)?;
    let mut lines = BufReader::new(client.try_clone()?);
    let mut line = String::new();
    lines.read_line(&mut line)?;
    ensure!(line.trim() == "begin", "the console said {line}");
    client.write_all(b"console\n")?;
    line.clear();
    lines.read_line(&mut line)?;
    ensure!(line.trim() == "heard console", "the console said {line}");
    Ok(())
}

#[test]
fn linux_finds_every_device_and_finds_it_again_after_it_moved() -> Result<()> {
    if programs::linux().is_none() {
        skip!("there are no Linux guests here");
    }
    let folder = tempfile::tempdir()?;
    let disk = folder.path().join("disk");
    File::create(&disk)?.set_len(16 << 20)?;
    let readonly = folder.path().join("readonly");
    fs::write(&readonly, format!("{:<511}\n", "read only\n"))?;
    let bridge = Bridge::new("br-devices")?;
    let taps = ["dev-a", "dev-b"];
    let extra = |place: usize| everything(folder.path(), taps[place], taps[place]);
    let console = |place: usize| folder.path().join(taps[place]);

    let mut guest = Linux::boot(machine("6.12", 1, &extra(0)), Some((&bridge, taps[0])))?;
    let interrupts = guest.run("cat /proc/interrupts")?;
    // Two disks, a card, a console, a vsock, a source of randomness, each with its queues.
    let msix = interrupts.lines().filter(|line| line.contains("MSIX"));
    ensure!(msix.count() == 6 + 1 + 1 + 2 + 2 + 3 + 1, "{interrupts}");
    works(&mut guest, &console(0), 1).context("before the move")?;
    let before = fs::read(&disk)?;
    ensure!(before.starts_with(b"visit 1"), "the disk is not written");

    guest.migrate(&extra(1), Some((&bridge, taps[1])))?;
    works(&mut guest, &console(1), 2).context("after the move")?;
    ensure!(fs::read(&disk)?.starts_with(b"visit 2"));
    sockets(&folder.path().join("vsock"))?;
    // The source's lock is gone with its guest; this one holds its own.
    let second = ["--disk".to_owned(), format!("path={}", disk.display())];
    if let Ok(mut second) = Vmm::spawn(&machine("6.12", 1, &second)) {
        let status = second.wait_exit(LIMIT)?;
        ensure!(!status.success(), "two monitors write to one disk");
    }
    Ok(())
}

/// The host's side of the vsock is there, though no program of the guest listens: it is refused.
fn sockets(path: &Path) -> Result<()> {
    let mut stream = UnixStream::connect(path)?;
    stream.set_read_timeout(Some(LIMIT))?;
    stream.write_all(b"CONNECT 99\n")?;
    let mut answer = String::new();
    // The guest's reset closes the connection, with or without an error.
    let _ = stream.read_to_string(&mut answer);
    ensure!(answer.is_empty(), "port 99 answered: {answer}");
    Ok(())
}
