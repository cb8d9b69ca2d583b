//! One guest, migrated for real, on whatever machine this runs on: what `cargo xtask demo` shows
//! and what recordings are made with.
//!
//! Starts a source and a destination monitor, waits until the guest has set itself up, attaches the
//! tool to both, migrates, and checks that the guest goes on. Says on stderr what it does, and
//! prints the report on stdout.

mod bare;
mod linux;

use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use clap::{Parser, ValueEnum};
use harness::{Recorder, Vmm, tool};
use serde_json::Value;

/// Migrates a guest between two monitors and records it.
#[derive(Parser)]
#[command(name = "blackout-scenario")]
struct Arguments {
    /// The guest.
    #[arg(long, value_enum, default_value = "bare")]
    guest: Guest,
    /// Devices that the bare-metal guest maps in its ITS (arm64).
    #[arg(long, default_value_t = 256)]
    devices: u32,
    /// Events of each device.
    #[arg(long, default_value_t = 16)]
    events: u32,
    /// Guest RAM [default: 128M, Linux 192M].
    #[arg(long)]
    memory: Option<String>,
    /// Bytes that the bare-metal guest keeps dirty; K, M and G are understood.
    #[arg(long, default_value = "1M")]
    dirty: String,
    /// vCPUs.
    #[arg(long, default_value_t = 1)]
    cpus: u32,
    /// Migrate the bare-metal guest over a unix socket instead of TCP on loopback.
    #[arg(long)]
    unix: bool,
    /// Directory for `recording`, `report.json`, `trace.json` and `query-migrate.json`.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
}

/// What is migrated.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Guest {
    /// The bare-metal program, which programs an ITS as large as it is told to.
    Bare,
    /// Debian's Linux, which writes to its disk and answers pings.
    Linux,
}

fn main() -> ExitCode {
    harness::exit(&run(&Arguments::parse()))
}

fn run(arguments: &Arguments) -> Result<()> {
    fs::create_dir_all(&arguments.out)?;
    let stage = Stage {
        start: Instant::now(),
        out: arguments.out.clone(),
    };
    match arguments.guest {
        Guest::Bare => bare::run(arguments, &stage),
        Guest::Linux => linux::run(arguments, &stage),
    }
}

/// Where it all happens.
struct Stage {
    start: Instant,
    out: PathBuf,
}

impl Stage {
    /// Tells whoever watches.
    fn say(&self, text: impl AsRef<str>) {
        let elapsed = self.start.elapsed().as_secs_f64();
        eprintln!("[{elapsed:6.2} s] {}", text.as_ref());
    }

    /// Attaches the tool to both monitors.
    fn record(&self, source: &mut Vmm, destination: &Vmm) -> Result<Recorder> {
        let pids = [source.pid(), destination.pid()];
        let recorder = Recorder::start(&pids, &self.out.join("recording"))?;
        self.say(format!(
            "`blackout record` is attached to {} and {}",
            pids[0], pids[1]
        ));
        // The first time that code runs is not the time to measure it: the pages that the probes
        // were put on are new, and an emulator translates them anew. A `stop` takes the stop path
        // once.
        source.qmp.execute("stop", Value::Null)?;
        source.qmp.execute("cont", Value::Null)?;
        Ok(recorder)
    }

    /// Keeps what `query-migrate` said.
    ///
    /// # Errors
    /// When the migration did not complete.
    fn keep(&self, answer: &Value) -> Result<()> {
        let file = self.out.join("query-migrate.json");
        fs::write(file, serde_json::to_vec_pretty(answer)?)?;
        match answer["status"].as_str() {
            Some("completed") => Ok(()),
            status => bail!(
                "the migration {}: {}",
                status.unwrap_or_default(),
                answer["error-desc"]
            ),
        }
    }

    /// Ends the recording and prints the report.
    fn report(&self, recorder: Recorder) -> Result<()> {
        self.say(recorder.stop()?.trim_end().replace('\n', "\n           "));
        let recording = self.out.join("recording");
        let recording = recording
            .to_str()
            .context("the output's path is not UTF-8")?;
        let json = tool::run(&["report", "--json", recording])?;
        fs::write(self.out.join("report.json"), json)?;
        let trace = tool::run(&["export", "chrome", recording])?;
        fs::write(self.out.join("trace.json"), trace)?;
        println!("{}", tool::run(&["report", recording])?.trim_end());
        Ok(())
    }
}
