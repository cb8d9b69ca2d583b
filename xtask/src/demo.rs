//! `cargo xtask demo`: one migration, measured, from nothing to the report.

use std::env::consts::ARCH;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::artifacts::{self, Artifacts, Platform};
use crate::kernel::{Arch, Kernel, Package, Series};
use crate::setup::{self, Purpose};
use crate::testbed::Testbed;
use crate::{linux, paths};

/// What the demo leaves for a person to open.
const RESULTS: [&str; 4] = [
    "recording",
    "report.json",
    "trace.json",
    "query-migrate.json",
];

/// How long the testbed may take for it all.
const LIMIT: Duration = Duration::from_secs(600);

/// Arguments of `cargo xtask demo`.
#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// Where the monitors run; by default in the arm64 testbed, on an arm64 machine with /dev/kvm
    /// on itself.
    #[arg(long, value_enum)]
    on: Option<Platform>,
    /// The guest: a bare-metal program whose ITS is as large as it is told to make it, or Debian's
    /// Linux, which writes to its disk and answers pings.
    #[arg(long, value_parser = ["bare", "linux"], default_value = "bare")]
    guest: String,
    /// vCPUs of the guest.
    #[arg(long, default_value_t = 1)]
    cpus: u32,
    /// Devices that the guest maps in its ITS (arm64).
    #[arg(long, default_value_t = 256)]
    devices: u32,
    /// Events of each device.
    #[arg(long, default_value_t = 16)]
    events: u32,
    /// Bytes of RAM that the guest keeps dirty.
    #[arg(long, default_value = "1M")]
    dirty: String,
}

/// Runs the verb.
pub(crate) fn run(arguments: &Arguments) -> Result<u8> {
    let native = ARCH == "aarch64" && Path::new("/dev/kvm").exists();
    let platform = arguments.on.unwrap_or(if native {
        Platform::Host
    } else {
        Platform::Testbed
    });
    let purpose = match platform {
        Platform::Host => Purpose::Build,
        Platform::Testbed => Purpose::Testbed,
    };
    setup::ensure(&[purpose])?;
    eprintln!("demo: building the monitor, the tool and the guest");
    let artifacts = artifacts::build(platform)?;

    let results = paths::target().join("demo");
    fs::create_dir_all(&results)?;
    let status = match platform {
        Platform::Host => on_host(&artifacts, arguments, &results)?,
        Platform::Testbed => in_testbed(&artifacts, arguments, &results)?,
    };
    if status != 0 {
        bail!("the scenario ended with status {status}");
    }
    println!();
    for name in RESULTS {
        println!("{}", results.join(name).display());
    }
    println!("\nOpen trace.json in ui.perfetto.dev or chrome://tracing.");
    Ok(0)
}

fn scenario(arguments: &Arguments, out: &str) -> Vec<String> {
    let Arguments {
        guest,
        cpus,
        devices,
        events,
        dirty,
        ..
    } = arguments;
    let numbers = [
        ("--cpus", cpus),
        ("--devices", devices),
        ("--events", events),
    ];
    let mut words: Vec<_> = numbers
        .into_iter()
        .flat_map(|(flag, n)| [flag.to_owned(), n.to_string()])
        .collect();
    words.extend(["--guest", guest, "--dirty", dirty, "--out", out].map(str::to_owned));
    words
}

fn on_host(artifacts: &Artifacts, arguments: &Arguments, results: &Path) -> Result<i32> {
    let out = results
        .to_str()
        .context("the target folder's path is not UTF-8")?;
    let mut scenario_command = Command::new(&artifacts.scenario);
    scenario_command
        .args(scenario(arguments, out))
        .envs(artifacts.environment(None));
    if arguments.guest == "linux" {
        let arch = if ARCH == "aarch64" {
            Arch::Aarch64
        } else {
            Arch::X86_64
        };
        scenario_command.env(linux::VARIABLE, linux::prepare(arch)?);
    }
    let status = scenario_command
        .status()
        .with_context(|| format!("{scenario_command:?}"))?;
    Ok(status.code().unwrap_or(1))
}

fn in_testbed(artifacts: &Artifacts, arguments: &Arguments, results: &Path) -> Result<i32> {
    eprintln!("demo: booting arm64 Linux with KVM, a GICv3 and its ITS, under emulation");
    let mut testbed = Testbed::new(
        Kernel::find(Package::testbed(Series::V6_12, Arch::Aarch64))?,
        "demo",
    )
    .programs(artifacts);
    if arguments.guest == "linux" {
        testbed = testbed
            .shared(&linux::prepare(Arch::Aarch64)?, "linux")?
            .env(linux::VARIABLE, "/share/linux");
    }
    let words = scenario(arguments, "/share/out");
    let program: Vec<_> = ["blackout-scenario"]
        .into_iter()
        .chain(words.iter().map(String::as_str))
        .collect();
    let finished = testbed.run(&program, LIMIT, |line| println!("{line}"))?;
    for name in RESULTS {
        let from = testbed.share().join("out").join(name);
        if from.exists() {
            fs::copy(&from, results.join(name))
                .with_context(|| format!("keeping {}", from.display()))?;
        }
    }
    Ok(finished.status)
}
