//! `cargo xtask test`: unit tests, then the integration tests on this machine and in the testbed.

use std::env;
use std::env::consts::ARCH;
use std::fmt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::Result;
use clap::ValueEnum;

use crate::artifacts::{self, Platform};
use crate::kernel::{Arch, Kernel, Package, Series};
use crate::setup::{self, Purpose};
use crate::testbed::{STARTED_AGAIN, Testbed};
use crate::{command, dist, fuzz, gate, linux, paths, two_hosts};

/// Longer than any part takes on two slow cores; a test that hangs ends here.
const TIMEOUT: Duration = Duration::from_secs(1800);

/// How long the slow tier runs each fuzz target.
const FUZZ_SECONDS: u64 = 60;

/// Arguments of `cargo xtask test`.
#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// Also run the tests that take long: many migrations, large tables.
    #[arg(long)]
    slow: bool,
    /// Run only this part (repeatable).
    #[arg(long = "part", value_enum, value_name = "PART")]
    parts: Vec<Part>,
    /// The testbed's kernel.
    #[arg(long, value_enum, default_value = "6.12")]
    kernel: Series,
    /// Run only the tests whose name contains one of these.
    filters: Vec<String>,
}

impl Arguments {
    /// Every part, every test.
    pub(crate) fn all(slow: bool) -> Self {
        Self {
            slow,
            parts: Vec::new(),
            kernel: Series::V6_12,
            filters: Vec::new(),
        }
    }
}

/// Where a test runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Part {
    /// Pure logic: needs neither KVM nor root.
    Unit,
    /// Integration tests on this machine's own `/dev/kvm`.
    Host,
    /// The same tests in the arm64 testbed.
    Testbed,
    /// A migration between two testbeds, which are two hosts with two clocks.
    TwoHosts,
    /// The tests with Linux guests in the x86-64 testbed: few development machines' KVM boots Linux.
    Nested,
}

/// Runs the verb. The last line is the sum: `N passed, N failed, N skipped`.
pub(crate) fn run(arguments: &Arguments) -> Result<u8> {
    setup::ensure(&[Purpose::Testbed])?;
    if let Err(error) = setup::ensure(&[Purpose::Test]) {
        println!("{error:#}\nwithout them, tests that need them are skipped");
    }
    if arguments.slow
        && let Err(error) = setup::ensure(&[Purpose::SlowTest])
    {
        println!("{error:#}\nwithout it, the test that needs it is skipped");
    }
    let mut tally = Tally::default();
    for part in Part::value_variants() {
        if !arguments.parts.is_empty() && !arguments.parts.contains(part) {
            continue;
        }
        match part {
            Part::Unit => {
                unit_tests(arguments, &mut tally)?;
                if arguments.slow && arguments.filters.is_empty() {
                    fuzz_targets(&mut tally)?;
                }
            }
            Part::Host => host_tests(arguments, &mut tally)?,
            Part::Testbed => testbed_tests(arguments, &mut tally)?,
            Part::TwoHosts => two_hosts_test(arguments, &mut tally),
            Part::Nested => nested_tests(arguments, &mut tally)?,
        }
    }
    if arguments.slow && arguments.parts.is_empty() && arguments.filters.is_empty() {
        tools(&mut tally);
    }
    println!("{tally}");
    Ok(u8::from(tally.failed > 0))
}

/// The verbs that others rely on: the gate, and the packages, which are installed and run.
fn tools(tally: &mut Tally) {
    let verbs: [(&str, &dyn Fn() -> Result<u8>); 2] = [
        ("gate", &|| gate::run(&gate::Arguments::default())),
        ("dist", &|| dist::run(&dist::Arguments::default())),
    ];
    for (name, verb) in verbs {
        println!("== cargo xtask {name}");
        match verb() {
            Ok(0) => tally.ok += 1,
            Ok(code) => {
                println!("cargo xtask {name}: FAILED, {code}");
                tally.failed += 1;
            }
            Err(error) => {
                println!("cargo xtask {name}: FAILED: {error:#}");
                tally.failed += 1;
            }
        }
    }
}

fn unit_tests(arguments: &Arguments, tally: &mut Tally) -> Result<()> {
    println!("== unit tests");
    let mut cargo = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo
        .current_dir(paths::workspace())
        .args(["test", "--workspace", "--no-fail-fast"]);
    // The first two need targets of their own, the last needs built programs.
    for package in ["blackout-ebpf", "blackout-guest", "blackout-tests"] {
        cargo.args(["--exclude", package]);
    }
    // Tests of the trace ask Perfetto, which that interpreter has; skipped ones say so.
    cargo.env("BLACKOUT_PYTHON", setup::python()?);
    cargo.env("BLACKOUT_SPEEDSCOPE", setup::speedscope::page()?);
    cargo.args(["--", "--nocapture"]).args(&arguments.filters);
    tally.stream(&mut cargo)
}

/// A short run of every fuzz target.
fn fuzz_targets(tally: &mut Tally) -> Result<()> {
    println!("== fuzz targets, {FUZZ_SECONDS} s each");
    if let Some(why) = fuzz::missing() {
        println!("SKIP: fuzz targets: {why}");
        tally.ignored += 1;
        return Ok(());
    }
    for (name, clean) in fuzz::every_target(FUZZ_SECONDS)? {
        println!("fuzz {name}: {}", if clean { "ok" } else { "FAILED" });
        if clean {
            tally.ok += 1;
        } else {
            tally.failed += 1;
        }
    }
    Ok(())
}

fn host_tests(arguments: &Arguments, tally: &mut Tally) -> Result<()> {
    println!("== integration tests on this machine");
    let artifacts = artifacts::build(Platform::Host)?;
    let guests = linux_on_this_machine()?;
    for program in artifacts::build_tests(Platform::Host)?.values() {
        let mut test = Command::new(program);
        if let Some(folder) = &guests {
            test.env(linux::VARIABLE, folder);
        }
        test.current_dir(paths::workspace())
            .args(libtest_arguments(arguments))
            .envs(artifacts.environment(None))
            .env("BLACKOUT_PYTHON", setup::python()?)
            .env("BLACKOUT_SLOW", slow(arguments));
        tally.stream(&mut test)?;
    }
    Ok(())
}

/// The Linux guests for this machine's own KVM, unless it is PVM, which boots none.
fn linux_on_this_machine() -> Result<Option<PathBuf>> {
    if Path::new("/sys/module/kvm_pvm").exists() {
        return Ok(None);
    }
    let arch = if ARCH == "aarch64" {
        Arch::Aarch64
    } else {
        Arch::X86_64
    };
    linux::prepare(arch).map(Some)
}

fn testbed_tests(arguments: &Arguments, tally: &mut Tally) -> Result<()> {
    println!("== integration tests in the testbed");
    let kernel = Package::testbed(arguments.kernel, Arch::Aarch64);
    in_testbed(kernel, arguments, libtest_arguments(arguments), tally)
}

/// One test, which no libtest runs: it is of two machines.
fn two_hosts_test(arguments: &Arguments, tally: &mut Tally) {
    const NAME: &str = "two_hosts::one_report_shows_both";
    let wanted = |filter: &String| NAME.contains(filter.as_str());
    if !arguments.filters.is_empty() && !arguments.filters.iter().any(wanted) {
        return;
    }
    println!("== a migration between two testbeds");
    match two_hosts::check(arguments.kernel) {
        Ok(()) => {
            println!("test {NAME} ... ok");
            tally.ok += 1;
        }
        Err(error) => {
            println!("test {NAME} ... FAILED\n{error:#}");
            tally.failed += 1;
        }
    }
}

fn nested_tests(arguments: &Arguments, tally: &mut Tally) -> Result<()> {
    println!("== tests with Linux guests in the x86-64 testbed");
    if ARCH != "x86_64" {
        println!("SKIP: only x86-64 machines build for it");
        return Ok(());
    }
    // Whatever is asked for by name may be run there, too.
    let mut libtest = libtest_arguments(arguments);
    if arguments.filters.is_empty() {
        libtest.push("linux".to_owned());
    }
    let kernel = Package::testbed(Series::V6_12, Arch::X86_64);
    in_testbed(kernel, arguments, libtest, tally)
}

fn in_testbed(
    kernel: Package,
    arguments: &Arguments,
    libtest: Vec<String>,
    tally: &mut Tally,
) -> Result<()> {
    let platform = Platform::of_testbed(kernel.arch)?;
    let mut testbed = Testbed::new(
        Kernel::find(kernel)?,
        &format!("test-{}", kernel.arch.rust()),
    )
    .programs(&artifacts::build(platform)?)
    .shared(&linux::prepare(kernel.arch)?, "linux")?
    .env(linux::VARIABLE, "/share/linux")
    .env("BLACKOUT_SLOW", slow(arguments));
    for (name, program) in artifacts::build_tests(platform)? {
        testbed = testbed.file(program, format!("/tests/{name}"));
    }
    if arguments.slow && kernel.arch == Arch::Aarch64 {
        match setup::ensure(&[Purpose::StockTools]) {
            Ok(()) => testbed = testbed.usr(&setup::stock_tools::folder()?),
            Err(error) => println!("{error:#}\nwithout them, tests that need them are skipped"),
        }
    }
    let every_program =
        r#"failed=0; for test in /tests/*; do "$test" "$@" || failed=1; done; exit $failed"#;
    let mut program = vec!["sh", "-c", every_program, "sh"];
    program.extend(libtest.iter().map(String::as_str));
    let before = tally.clone();
    let ended = testbed.run(&program, TIMEOUT, |line| {
        if line == STARTED_AGAIN {
            // What the run that hung has counted is counted again.
            *tally = before.clone();
        }
        tally.line(line);
    });
    match ended {
        Ok(finished) => tally.ended(finished.status == 0, "a test in the testbed"),
        Err(error) => {
            println!("{error:#}");
            tally.ended(false, "the testbed");
        }
    }
    Ok(())
}

/// One test at a time, since they measure time on few cores, and with their output shown, since
/// skipped tests say so there.
fn libtest_arguments(arguments: &Arguments) -> Vec<String> {
    let fixed = ["--test-threads=1", "--nocapture"].map(str::to_owned);
    fixed
        .into_iter()
        .chain(arguments.filters.iter().cloned())
        .collect()
}

fn slow(arguments: &Arguments) -> &'static str {
    if arguments.slow { "1" } else { "0" }
}

/// Counts what test programs report, while passing their output on.
#[derive(Clone, Debug, Default)]
struct Tally {
    /// Tests that libtest calls passed; those that returned early are among them.
    ok: u32,
    failed: u32,
    ignored: u32,
    /// Tests that returned early and said `SKIP: `.
    early: u32,
    /// Failures that the programs running now have reported themselves.
    reported: u32,
}

impl Tally {
    /// Runs a test program, or cargo running several.
    fn stream(&mut self, program: &mut Command) -> Result<()> {
        let ended = command::stream(program, TIMEOUT, |line| self.line(line))?;
        let name = program.get_program().to_string_lossy().into_owned();
        if ended.is_none() {
            println!("{name} did not end within {} s", TIMEOUT.as_secs());
        }
        self.ended(ended.is_some_and(|status| status.success()), &name);
        Ok(())
    }

    /// Passes a line of output on and counts what it says.
    fn line(&mut self, line: &str) {
        println!("{line}");
        self.count(line);
    }

    fn count(&mut self, line: &str) {
        if line.contains("SKIP: ") {
            self.early += 1;
        }
        let Some((_, result)) = line.split_once("test result: ") else {
            return;
        };
        let count = |what: &str| -> u32 {
            let words: Vec<_> = result
                .split([' ', ';'])
                .filter(|word| !word.is_empty())
                .collect();
            let place = words.iter().position(|word| *word == what);
            place
                .and_then(|place| words.get(place.checked_sub(1)?)?.parse().ok())
                .unwrap_or(0)
        };
        self.ok += count("passed");
        self.failed += count("failed");
        self.reported += count("failed");
        self.ignored += count("ignored");
    }

    /// Ends a part: one that failed without reporting a failed test (it crashed, it did not
    /// compile, it hung) counts as one failure.
    fn ended(&mut self, success: bool, name: &str) {
        if !success && self.reported == 0 {
            println!("{name} failed without saying which test did");
            self.failed += 1;
        }
        self.reported = 0;
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let passed = self.ok.saturating_sub(self.early);
        let skipped = self.ignored + self.early;
        write!(
            formatter,
            "{passed} passed, {} failed, {skipped} skipped",
            self.failed
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RESULT: &str = "test result: FAILED. 3 passed; 1 failed; 2 ignored; 0 measured; \
                          0 filtered out; finished in 0.01s";

    #[test]
    fn results_are_added_up_and_early_returns_are_skips() {
        let mut tally = Tally::default();
        for line in [
            RESULT,
            "unrelated 7 passed",
            "test a ... SKIP: a: no KVM",
            RESULT,
        ] {
            tally.count(line);
        }
        tally.ended(false, "both");
        assert_eq!(tally.to_string(), "5 passed, 2 failed, 5 skipped");
    }

    #[test]
    fn a_program_that_dies_without_a_result_is_a_failure() {
        let mut tally = Tally::default();
        tally.count(RESULT);
        tally.ended(false, "first");
        tally.ended(false, "second");
        assert_eq!(tally.to_string(), "3 passed, 2 failed, 2 skipped");
    }
}
