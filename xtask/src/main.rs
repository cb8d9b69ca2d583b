//! The project's own commands, one file per verb: `cargo xtask VERB`.

mod artifacts;
mod bench;
mod build;
mod ci;
mod command;
mod demo;
mod dist;
mod fuzz;
mod gate;
mod initramfs;
mod install;
mod kernel;
mod linux;
mod paths;
mod setup;
mod test;
mod testbed;
mod tidy;
mod toolchain;
mod two_hosts;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Sets up, builds, runs and checks Blackout.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Arguments {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Install what is missing; says what was there already.
    Setup(setup::Arguments),
    /// Build the eBPF programs, the VMM, the tool and the guest.
    Build(build::Arguments),
    /// Migrate a guest, measure its blackout, and show where it went.
    Demo(demo::Arguments),
    /// A shell, or one command, on an emulated machine with KVM: arm64 with an ITS, or x86-64.
    Testbed(testbed::Arguments),
    /// Run the tests: units, then integration on this machine and in the testbed.
    Test(test::Arguments),
    /// Feed the monitor's devices what a hostile guest or peer could send.
    Fuzz(fuzz::Arguments),
    /// Measure what the stop path costs.
    Bench(bench::Arguments),
    /// Hold the stop path against the instructions that it is known to take.
    Gate(gate::Arguments),
    /// Make what others install: static programs, manual pages, a Debian package.
    Dist(dist::Arguments),
    /// Install the tool and the monitor as `cargo install` does.
    Install(install::Arguments),
    /// Hold the sources against the project's own rules.
    Tidy(tidy::Arguments),
    /// Everything that a change has to pass.
    Ci(ci::Arguments),
}

fn main() -> ExitCode {
    let verb = Arguments::parse().verb;
    // The gate's 1 is a verdict.
    let failure = if matches!(verb, Verb::Gate(_)) { 3 } else { 1 };
    let result = match verb {
        Verb::Setup(arguments) => setup::run(&arguments).map(|()| 0),
        Verb::Build(arguments) => build::run(&arguments).map(|()| 0),
        Verb::Demo(arguments) => demo::run(&arguments),
        Verb::Testbed(arguments) => testbed::run(&arguments),
        Verb::Test(arguments) => test::run(&arguments),
        Verb::Fuzz(arguments) => fuzz::run(&arguments),
        Verb::Bench(arguments) => bench::run(&arguments),
        Verb::Gate(arguments) => gate::run(&arguments),
        Verb::Dist(arguments) => dist::run(&arguments),
        Verb::Install(arguments) => install::run(&arguments).map(|()| 0),
        Verb::Tidy(arguments) => tidy::run(&arguments),
        Verb::Ci(arguments) => ci::run(&arguments),
    };
    match result {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::from(failure)
        }
    }
}
