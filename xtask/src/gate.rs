//! `cargo xtask gate`: a latency gate that needs no arm64 hardware, no KVM, no root and no luck.
//!
//! The monitor's own stop, save, load and start run in the arm64 testbed, whose clock counts
//! instructions: a figure repeats from boot to boot, on any machine, so one run of a quarter of a
//! minute is enough. The figures stand in `tests/counts.txt`, one a line, so that a change of cost is
//! reviewed like any other change; `--update` rewrites it. `--against` counts another revision in the
//! same testbed instead. `cargo xtask bench gate` shows that the gate neither flakes nor misses.

mod counts;
mod revision;

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail};

pub(crate) use self::counts::{Counts, is_handler};
use crate::artifacts::{self, Counter};
use crate::bench::its::Plan;
use crate::kernel::{Arch, Kernel, Package, Series};
use crate::paths;
use crate::setup::{self, Purpose};

/// Sizes of the ITS that are measured: devices, and events of each.
const SIZES: [(u64, u64); 2] = [(16, 16), (256, 16)];

/// Arguments of `cargo xtask gate`.
#[derive(clap::Args, Default)]
pub(crate) struct Arguments {
    /// Write what was measured into the baseline instead of holding it against it.
    #[arg(long, conflicts_with = "against")]
    update: bool,
    /// The baseline.
    #[arg(long, value_name = "FILE", conflicts_with = "against")]
    baseline: Option<PathBuf>,
    /// Count this git revision, too, and hold the working tree against that instead of the baseline.
    #[arg(long, value_name = "REVISION")]
    against: Option<String>,
    /// Count this git revision instead of the working tree.
    #[arg(long, value_name = "REVISION")]
    current: Option<String>,
    /// Measure so many times, booting anew each time; every time has to pass.
    #[arg(long, default_value_t = 1)]
    repeat: u32,
}

/// Runs the verb; the exit code is 1 when a figure grew, or is not in the baseline. (`main` makes it 3
/// when it could not run.)
pub(crate) fn run(arguments: &Arguments) -> Result<u8> {
    setup::ensure(&[Purpose::Gate])?;
    let file = arguments.baseline.clone();
    let file = file.unwrap_or_else(|| paths::workspace().join("tests/counts.txt"));
    // A name that git does not know is told before anything is built.
    let against = arguments.against.as_deref().map(revision::build);
    let against = against.transpose()?;
    let counter = match &arguments.current {
        Some(revision) => revision::build(revision)?,
        None => artifacts::build_counter()?,
    };
    if arguments.update {
        let counts = measure(&counter, None)?;
        fs::write(&file, counts.write())
            .with_context(|| format!("cannot write {}", file.display()))?;
        println!("wrote {}", file.display());
        return Ok(0);
    }
    let baseline = match &against {
        Some(counter) => measure(counter, None)?,
        None => {
            let text = fs::read_to_string(&file).with_context(|| {
                let file = file.display();
                format!("cannot read {file}; `cargo xtask gate --update` writes it")
            })?;
            Counts::read(&text)?
        }
    };
    let mut worst = 0;
    for _ in 0..arguments.repeat.max(1) {
        let counts = measure(&counter, None)?;
        let passed = print(&baseline, &counts);
        worst = worst.max(u8::from(!passed));
    }
    if worst > 0 && arguments.against.is_none() {
        println!("if this is what the change is meant to cost: cargo xtask gate --update");
    }
    Ok(worst)
}

/// Says what was found; whether nothing is wrong.
fn print(baseline: &Counts, counts: &Counts) -> bool {
    let found = counts.against(baseline);
    for text in &found.better {
        println!("better: {text}");
    }
    for problem in &found.problems {
        println!("FAIL: {problem}");
    }
    if found.problems.is_empty() {
        println!("pass: {} figures", found.compared);
    }
    if counts.kernel != baseline.kernel {
        println!(
            "note: the baseline was counted on Linux {}, this testbed runs {}: what their ioctls \
             take was not compared. `cargo xtask gate --against REVISION` counts another revision on \
             the same kernel; `--update` renews the baseline.",
            baseline.kernel, counts.kernel
        );
    }
    found.problems.is_empty()
}

/// Boots the testbed and counts, with the ITS's handler slowed down by so many instructions.
///
/// # Errors
/// When the testbed does not boot, or the guest in it does not run.
pub(crate) fn measure(counter: &Counter, slower: Option<u32>) -> Result<Counts> {
    let plan = Plan {
        kernel: Series::V6_12,
        sizes: &SIZES,
        stops: 9,
        restores: 3,
        cpus: 1,
        rehearse: false,
        slower,
        timeout: Duration::from_secs(900),
    };
    let kernel = Kernel::find(Package::testbed(plan.kernel, Arch::Aarch64))?;
    let mut counts = Counts {
        kernel: kernel.release,
        ..Counts::default()
    };
    for line in plan.run(counter, "gate")? {
        counts.add(&serde_json::from_str(&line).context("bench-its printed broken JSON")?);
    }
    if counts.figures.is_empty() {
        bail!("bench-its measured nothing");
    }
    Ok(counts)
}
