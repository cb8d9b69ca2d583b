//! One of two hosts of a migration, each with a recorder of its own: what `cargo xtask test` runs in
//! two testbeds that share nothing but a network.
//!
//! The destination says over a connection of its own that it waits, the source what its guest read
//! from the disk that both hosts have.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::{Parser, Subcommand};
use harness::linux::{Linux, machine};
use harness::{Recorder, Shell, Vmm, VmmOptions};

/// How long anything may take: two emulated machines share one that is real.
const LIMIT: Duration = Duration::from_secs(300);

const MIGRATION_PORT: u16 = 4444;
const CONTROL_PORT: u16 = 4445;

/// One host of a migration between two.
#[derive(Parser)]
#[command(name = "blackout-host")]
struct Arguments {
    #[command(subcommand)]
    role: Role,
    /// Directory for `recording` and, on the source, `query-migrate.json`.
    #[arg(long, value_name = "DIR", global = true, default_value = ".")]
    out: PathBuf,
    /// The guest's disk, which both hosts have and neither writes.
    #[arg(long, value_name = "FILE", global = true, default_value = "disk")]
    disk: PathBuf,
}

#[derive(Subcommand)]
enum Role {
    /// Wait for a guest, and run it.
    Destination,
    /// Boot a guest and send it to a host that waits.
    Source {
        /// The other host.
        #[arg(long, value_name = "ADDRESS")]
        to: String,
    },
}

fn main() -> ExitCode {
    let Arguments { role, out, disk } = Arguments::parse();
    let done = match &role {
        Role::Destination => destination(&disk, &out),
        Role::Source { to } => source(to, &disk, &out),
    };
    harness::exit(&done)
}

/// A Linux guest whose disk may be in use elsewhere. Both hosts are this machine's, and so is their
/// network.
fn options(disk: &Path) -> VmmOptions {
    let disk = format!("path={},readonly", disk.display());
    let extra = ["--allow-plaintext", "--disk", &disk].map(str::to_owned);
    machine("6.12", 1, &extra)
}

/// What the guest reads from its disk, past its cache.
const READ: &str = "dd if=/dev/vda bs=1M iflag=direct 2> /dev/null | sha256sum | cut -d ' ' -f 1";

fn destination(disk: &Path, out: &Path) -> Result<()> {
    let control = TcpListener::bind(("0.0.0.0", CONTROL_PORT))?;
    let uri = format!("tcp:0.0.0.0:{MIGRATION_PORT}");
    let vmm = Vmm::spawn(&options(disk).incoming(&uri))?;
    let mut shell = vmm.shell()?;
    let recorder = Recorder::start(&[vmm.pid()], &out.join("recording"))?;
    eprintln!("destination: waits for a guest");
    let (mut source, _) = control.accept()?;
    source.write_all(b"ready\n")?;
    let read = hear(&source)?;
    recorder.stop()?;
    same_guest(&mut shell, &read)?;
    eprintln!("destination: runs the guest, which reads its disk");
    Ok(())
}

/// The guest is the one that the other host ran, and its disk is the one that it read there.
fn same_guest(shell: &mut Shell, read: &str) -> Result<()> {
    let there = shell.run("echo $here", LIMIT)?;
    ensure!(there == read, "the guest read '{there}', not '{read}'");
    let again = shell.run(READ, LIMIT)?;
    ensure!(again == read, "the disk reads '{again}', not '{read}'");
    Ok(())
}

fn source(to: &str, disk: &Path, out: &Path) -> Result<()> {
    let mut guest = Linux::boot(options(disk), None)?;
    guest.run(&format!("here=$({READ})"))?;
    let read = guest.run("echo $here")?;
    let recorder = Recorder::start(&[guest.vmm.pid()], &out.join("recording"))?;
    let mut destination = reach(to)?;
    let word = hear(&destination)?;
    ensure!(word == "ready", "the other host said '{word}'");
    let uri = format!("tcp:{to}:{MIGRATION_PORT}");
    eprintln!("source: QMP migrate {uri}");
    let answer = guest.vmm.qmp.migrate(&uri, LIMIT)?;
    fs::write(
        out.join("query-migrate.json"),
        serde_json::to_vec_pretty(&answer)?,
    )?;
    ensure!(answer["status"] == "completed", "{answer}");
    writeln!(destination, "{read}")?;
    recorder.stop()?;
    eprintln!("source: the guest is gone");
    Ok(())
}

/// Connects to the destination's control port, as soon as that host is up.
fn reach(to: &str) -> Result<TcpStream> {
    let deadline = Instant::now() + LIMIT;
    loop {
        match TcpStream::connect((to, CONTROL_PORT)) {
            Ok(stream) => return Ok(stream),
            Err(_) if Instant::now() < deadline => thread::sleep(Duration::from_millis(200)),
            Err(error) => return Err(error).with_context(|| format!("{to} does not answer")),
        }
    }
}

/// What the other host says next.
fn hear(from: &TcpStream) -> Result<String> {
    from.set_read_timeout(Some(LIMIT))?;
    let mut line = String::new();
    BufReader::new(from).read_line(&mut line)?;
    Ok(line.trim_end().to_owned())
}
