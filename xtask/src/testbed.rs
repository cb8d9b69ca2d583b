//! `cargo xtask testbed`: a shell, or one command, on an emulated machine with KVM: arm64 with an
//! ITS, or x86-64.

mod heartbeat;
mod machine;

use std::io::{self, Write};
use std::time::Duration;

use anyhow::{Context, Result, ensure};

pub(crate) use self::machine::{Mode, STARTED_AGAIN, Testbed};
use crate::artifacts::{self, Platform};
use crate::kernel::{Arch, Kernel, Package, Series};
use crate::linux;
use crate::setup::{self, Purpose};

/// Arguments of `cargo xtask testbed`.
#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// What to emulate.
    #[arg(long, value_enum, default_value = "aarch64")]
    arch: Arch,
    /// Count instructions instead of time: one CPU whose clock advances 1 ns an instruction.
    #[arg(long)]
    icount: bool,
    /// The kernel to boot.
    #[arg(long, value_enum, default_value = "6.12")]
    kernel: Series,
    /// Do not build; take the programs that an earlier build left.
    #[arg(long)]
    no_build: bool,
    /// Put a file of this machine into the testbed (repeatable).
    #[arg(long, value_name = "HOST=GUEST")]
    file: Vec<String>,
    /// Show it the tests' Linux guests, as /share/linux.
    #[arg(long)]
    linux: bool,
    /// Give it Debian's bpftrace, perf, gdb, QEMU and tc (arm64).
    #[arg(long)]
    tools: bool,
    /// The testbed's memory in MiB.
    #[arg(long, default_value_t = 2048)]
    memory: u32,
    /// Give up after this many seconds.
    #[arg(long, default_value_t = 600)]
    timeout: u64,
    /// Working files go to target/testbed/NAME; needed to run two at a time.
    #[arg(long, default_value = "shell")]
    name: String,
    /// The command to run; without one, a shell on this terminal.
    #[arg(last = true)]
    command: Vec<String>,
}

/// Runs the verb; the exit code is the command's.
pub(crate) fn run(arguments: &Arguments) -> Result<u8> {
    if !arguments.no_build {
        setup::ensure(&[Purpose::Testbed])?;
    }
    let mut testbed = Testbed::new(
        Kernel::find(Package::testbed(arguments.kernel, arguments.arch))?,
        &arguments.name,
    )
    .memory_mib(arguments.memory)
    .mode(if arguments.icount {
        Mode::Counting
    } else {
        Mode::Function
    });
    if !arguments.no_build {
        testbed = testbed.programs(&artifacts::build(Platform::of_testbed(arguments.arch)?)?);
    }
    if arguments.linux {
        testbed = testbed
            .shared(&linux::prepare(arguments.arch)?, "linux")?
            .env(linux::VARIABLE, "/share/linux");
    }
    if arguments.tools {
        ensure!(
            arguments.arch == Arch::Aarch64,
            "--tools are of the arm64 testbed"
        );
        setup::ensure(&[Purpose::StockTools])?;
        testbed = testbed.usr(&setup::stock_tools::folder()?);
    }
    for file in &arguments.file {
        let (host, guest) = file
            .split_once('=')
            .with_context(|| format!("--file {file}: expected HOST=GUEST"))?;
        testbed = testbed.file(host, guest);
    }
    let command: Vec<_> = arguments.command.iter().map(String::as_str).collect();
    let finished = if command.is_empty() {
        testbed.interact(&command)?
    } else {
        testbed.run(&command, Duration::from_secs(arguments.timeout), |line| {
            // A reader that went away, such as `head`, is no reason to stop the command.
            let _ = writeln!(io::stdout(), "{line}");
        })?
    };
    eprintln!(
        "testbed: exit status {} after {:.1} s",
        finished.status,
        finished.elapsed.as_secs_f64()
    );
    Ok(u8::try_from(finished.status).unwrap_or(1))
}
