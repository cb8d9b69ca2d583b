//! `cargo xtask build`: the eBPF programs, the VMM, the tool and the guest, for one platform.

use anyhow::Result;

use crate::artifacts::{self, Platform};
use crate::paths;

/// Arguments of `cargo xtask build`.
#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// Where the programs will run.
    #[arg(long = "target", value_enum, default_value = "host")]
    platform: Platform,
    /// Also build the integration tests.
    #[arg(long)]
    tests: bool,
}

/// Runs the verb: builds, and prints where each program is.
pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    let artifacts = artifacts::build(arguments.platform)?;
    let mut built: Vec<_> = artifacts
        .files()
        .map(|(name, file)| (name.to_owned(), file.to_owned()))
        .into();
    if arguments.tests {
        built.extend(artifacts::build_tests(arguments.platform)?);
    }
    for (name, file) in built {
        let file = file.strip_prefix(paths::workspace()).unwrap_or(&file);
        println!("{name:16} {}", file.display());
    }
    Ok(())
}
