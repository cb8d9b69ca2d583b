//! One guest, migrated for real, on whatever machine this runs on: what `cargo xtask demo` shows
//! and what recordings are made with.
//!
//! Starts a source and a destination monitor, waits until the guest has set itself up, attaches the
//! tool to both, migrates, and checks that the guest goes on. Says on stderr what it does, and
//! prints the report on stdout.

use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::Parser;
use harness::pair::free_port;
use harness::{GuestView, Recorder, Vmm, VmmOptions, tool};
use serde_json::Value;

/// How long the guest may take to set itself up, and the migration to end: the testbed is slow.
const LIMIT: Duration = Duration::from_secs(120);

/// Migrates a bare-metal guest between two monitors and records it.
#[derive(Parser)]
#[command(name = "blackout-scenario")]
struct Arguments {
    /// Devices that the guest maps in its ITS (arm64).
    #[arg(long, default_value_t = 256)]
    devices: u32,
    /// Events of each device.
    #[arg(long, default_value_t = 16)]
    events: u32,
    /// Guest RAM.
    #[arg(long, default_value = "128M")]
    memory: String,
    /// Bytes that the guest keeps dirty; K, M and G are understood.
    #[arg(long, default_value = "1M")]
    dirty: String,
    /// vCPUs.
    #[arg(long, default_value_t = 1)]
    cpus: u32,
    /// Migrate over a unix socket instead of TCP on loopback.
    #[arg(long)]
    unix: bool,
    /// Directory for `recording`, `report.json`, `trace.json` and `query-migrate.json`.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
}

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> Result<()> {
    fs::create_dir_all(&arguments.out)?;
    let start = Instant::now();
    let say = |text: String| eprintln!("[{:6.2} s] {text}", start.elapsed().as_secs_f64());

    let Arguments {
        devices,
        events,
        memory,
        dirty,
        cpus,
        ..
    } = arguments;
    say(format!(
        "booting a guest: {cpus} vCPU, {memory} of RAM, {dirty} of it kept dirty"
    ));
    let options = VmmOptions {
        memory: memory.clone(),
        cpus: *cpus,
        cmdline: format!("its_devices={devices} its_events={events} dirty={dirty} cpus={cpus}"),
        ..VmmOptions::default()
    };
    let mut source = Vmm::spawn(&options)?;
    let guest = GuestView::open(source.pid())?;
    guest
        .wait_ready(LIMIT)
        .with_context(|| format!("the console says: {}", source.console()))?;
    guest.wait_progress(0, LIMIT)?;
    if guest.events() > 0 {
        say(format!(
            "the guest's ITS maps {} devices, {} events",
            guest.devices(),
            guest.events()
        ));
    }

    let uri = if arguments.unix {
        format!("unix:{}", source.dir().join("migration").display())
    } else {
        format!("tcp:127.0.0.1:{}", free_port()?)
    };
    let destination = Vmm::spawn(&options.incoming(&uri))?;
    let recording = arguments.out.join("recording");
    let recorder = Recorder::start(&[source.pid(), destination.pid()], &recording)?;
    say(format!(
        "`blackout record` is attached to {} and {}",
        source.pid(),
        destination.pid()
    ));

    // The first time that code runs is not the time to measure it: the pages that the probes were
    // put on are new, and an emulator translates them anew. A `stop` takes the stop path once.
    source.qmp.execute("stop", Value::Null)?;
    source.qmp.execute("cont", Value::Null)?;
    guest.wait_progress(0, LIMIT)?;

    say(format!("QMP migrate {uri}"));
    let answer = source.qmp.migrate(&uri, LIMIT)?;
    let status = answer["status"].as_str().unwrap_or_default().to_owned();
    fs::write(
        arguments.out.join("query-migrate.json"),
        serde_json::to_vec_pretty(&answer)?,
    )?;
    if status != "completed" {
        bail!("the migration {status}: {}", answer["error-desc"]);
    }
    GuestView::open(destination.pid())?.wait_progress(0, LIMIT)?;
    say("the guest runs at the destination".into());
    say(recorder.stop()?.trim_end().replace('\n', "\n           "));

    let file = |name| arguments.out.join(name);
    let recording = recording
        .to_str()
        .context("the output's path is not UTF-8")?;
    fs::write(
        file("report.json"),
        tool::run(&["report", "--json", recording])?,
    )?;
    fs::write(
        file("trace.json"),
        tool::run(&["export", "chrome", recording])?,
    )?;
    println!("{}", tool::run(&["report", recording])?.trim_end());
    Ok(())
}
