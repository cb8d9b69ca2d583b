//! One of two hosts of a migration, each with a recorder of its own: what `cargo xtask test` runs in
//! two testbeds that share nothing but a network.
//!
//! The destination says over a connection of its own that it waits, the source that it is done.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::{Parser, Subcommand};
use harness::{GuestView, Recorder, Vmm, VmmOptions};

/// How long anything may take: two emulated machines share one that is real.
const LIMIT: Duration = Duration::from_secs(240);

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
    let arguments = Arguments::parse();
    let done = match &arguments.role {
        Role::Destination => destination(&arguments.out),
        Role::Source { to } => source(to, &arguments.out),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn machine() -> VmmOptions {
    VmmOptions {
        cmdline: "its_devices=16 its_events=16 dirty=1M".into(),
        // Both hosts are this machine's, and so is their network.
        extra: vec!["--allow-plaintext".into()],
        ..VmmOptions::default()
    }
}

fn destination(out: &Path) -> Result<()> {
    let control = TcpListener::bind(("0.0.0.0", CONTROL_PORT))?;
    let uri = format!("tcp:0.0.0.0:{MIGRATION_PORT}");
    let vmm = Vmm::spawn(&machine().incoming(&uri))?;
    let recorder = Recorder::start(&[vmm.pid()], &out.join("recording"))?;
    eprintln!("destination: waits for a guest");
    let (mut source, _) = control.accept()?;
    source.write_all(b"ready\n")?;
    hear(&source, "done")?;
    GuestView::open(vmm.pid())?.wait_progress(0, LIMIT)?;
    recorder.stop()?;
    eprintln!("destination: runs the guest");
    Ok(())
}

fn source(to: &str, out: &Path) -> Result<()> {
    let mut vmm = Vmm::spawn(&machine())?;
    let guest = GuestView::open(vmm.pid())?;
    guest
        .wait_ready(LIMIT)
        .with_context(|| format!("the console says: {}", vmm.console()))?;
    let recorder = Recorder::start(&[vmm.pid()], &out.join("recording"))?;
    let mut destination = reach(to)?;
    hear(&destination, "ready")?;
    let uri = format!("tcp:{to}:{MIGRATION_PORT}");
    eprintln!("source: QMP migrate {uri}");
    let answer = vmm.qmp.migrate(&uri, LIMIT)?;
    fs::write(
        out.join("query-migrate.json"),
        serde_json::to_vec_pretty(&answer)?,
    )?;
    ensure!(answer["status"] == "completed", "{answer}");
    destination.write_all(b"done\n")?;
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

/// Waits for the other host to say `word`.
fn hear(from: &TcpStream, word: &str) -> Result<()> {
    from.set_read_timeout(Some(LIMIT))?;
    let mut line = String::new();
    BufReader::new(from).read_line(&mut line)?;
    ensure!(line.trim_end() == word, "the other host said '{line}'");
    Ok(())
}
