//! `cargo xtask setup`: installs what is missing and says what was there already.

mod debian;
mod kernel;
mod python;
mod root_disk;
mod rust;
pub(crate) mod speedscope;
pub(crate) mod stock_tools;

use std::env::consts::ARCH;
use std::path::Path;

use anyhow::{Result, bail};
use clap::ValueEnum;

pub(crate) use self::python::interpreter as python;
use crate::command;
use crate::kernel::{Arch, Package, Series};

/// Arguments of `cargo xtask setup`.
#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// What to set up for (repeatable); by default, building and the testbed.
    #[arg(long = "for", value_enum, value_name = "PURPOSE")]
    purposes: Vec<Purpose>,
    /// Also fetch Linux 6.1 for the testbed.
    #[arg(long)]
    old_kernel: bool,
}

/// What a person wants to do; each purpose has its own list of needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Purpose {
    /// Building for this machine.
    Build,
    /// Counting instructions in the arm64 testbed: no more than `cargo xtask gate` needs.
    Gate,
    /// Building for the testbeds, and booting them.
    Testbed,
    /// Running every test: the tools that the tests hold the project against.
    Test,
    /// Running the tests that take long.
    SlowTest,
    /// Having bpftrace, perf, gdb, QEMU and tc in the arm64 testbed.
    StockTools,
    /// Looking at the HTML report in a real browser, as its tests then do.
    Browser,
    /// Making what others install.
    Dist,
}

/// Something that has to be on this machine.
pub(crate) trait Need {
    /// What it is, for a person.
    fn name(&self) -> String;

    /// What is there, if it is complete.
    fn found(&self) -> Result<Option<String>>;

    /// Debian packages that have to be installed before `install`. Called only when it is missing;
    /// may try a way that needs no packages first.
    fn packages(&self) -> Vec<String> {
        Vec::new()
    }

    /// Does what packages alone do not.
    fn install(&self) -> Result<()> {
        Ok(())
    }
}

/// Runs the verb.
pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    let purposes = match arguments.purposes.as_slice() {
        [] => &[Purpose::Build, Purpose::Testbed],
        given => given,
    };
    let mut needs = needs(purposes);
    if arguments.old_kernel {
        needs.push(Box::new(Package::testbed(Series::V6_1, Arch::Aarch64)));
    }
    install(&needs, true)
}

/// Installs what is missing for `purposes`, silent about what is there: for verbs that build on it.
pub(crate) fn ensure(purposes: &[Purpose]) -> Result<()> {
    install(&needs(purposes), false)
}

fn needs(purposes: &[Purpose]) -> Vec<Box<dyn Need>> {
    let mut needs: Vec<Box<dyn Need>> = Vec::new();
    if purposes.iter().any(|purpose| *purpose != Purpose::Gate) {
        needs.push(Box::new(rust::BpfCompiler));
        needs.push(Box::new(rust::BpfLinker));
        needs.push(Box::new(rust::GuestCompiler(ARCH)));
    }
    let arm64 = [Purpose::Gate, Purpose::Testbed];
    if purposes.iter().any(|purpose| arm64.contains(purpose)) {
        if ARCH != "aarch64" || needs.is_empty() {
            needs.push(Box::new(rust::GuestCompiler("aarch64")));
        }
        needs.push(Box::new(rust::TestbedCompiler));
        needs.push(Box::new(Program {
            name: "qemu-system-aarch64",
            package: "qemu-system-arm",
        }));
        needs.push(Box::new(Program {
            name: "setpriv",
            package: "util-linux",
        }));
        needs.push(Box::new(Program {
            name: "xz",
            package: "xz-utils",
        }));
        needs.push(Box::new(Package::testbed(Series::V6_12, Arch::Aarch64)));
    }
    if purposes.contains(&Purpose::Testbed) {
        needs.push(Box::new(Program {
            name: "qemu-system-x86_64",
            package: "qemu-system-x86",
        }));
        needs.push(Box::new(Program {
            name: "zstd",
            package: "zstd",
        }));
        needs.push(Box::new(Package::testbed(Series::V6_12, Arch::X86_64)));
        for arch in [Arch::Aarch64, Arch::X86_64] {
            for series in Series::ALL {
                needs.push(Box::new(Package::guest(series, arch)));
            }
        }
    }
    if purposes.contains(&Purpose::Test) {
        needs.push(Box::new(Program {
            name: "bpftrace",
            package: "bpftrace",
        }));
        needs.push(Box::new(Program {
            name: "gdb",
            package: "gdb",
        }));
        needs.push(Box::new(Program {
            name: "perf",
            package: "linux-perf",
        }));
        needs.push(Box::new(Program {
            name: "socat",
            package: "socat",
        }));
        needs.push(Box::new(Program {
            name: "tc",
            package: "iproute2",
        }));
        needs.push(Box::new(Program {
            name: "node",
            package: "nodejs",
        }));
        // C programs with probes, by compilers that place their arguments differently.
        for (name, package) in [
            ("clang", "clang"),
            ("gcc", "gcc"),
            ("aarch64-linux-gnu-gcc", "gcc-aarch64-linux-gnu"),
            ("dtrace", "systemtap-sdt-dev"),
            ("prometheus", "prometheus"),
            ("prometheus-node-exporter", "prometheus-node-exporter"),
            ("xmllint", "libxml2-utils"),
        ] {
            needs.push(Box::new(Program { name, package }));
        }
        // Debian's cross compiler only recommends the C library's headers, and what is recommended is
        // not installed.
        if ARCH != "aarch64" {
            needs.push(Box::new(File {
                path: "/usr/aarch64-linux-gnu/include/stdio.h",
                package: "libc6-dev-arm64-cross",
            }));
        }
        needs.push(Box::new(python::Environment));
    }
    if purposes.contains(&Purpose::SlowTest) {
        needs.push(Box::new(root_disk::RootDisk));
    }
    if purposes.contains(&Purpose::StockTools) {
        needs.push(Box::new(stock_tools::StockTools));
    }
    if purposes.contains(&Purpose::Browser) {
        needs.push(Box::new(Program {
            name: "chromium",
            package: "chromium",
        }));
        needs.push(Box::new(speedscope::Speedscope));
    }
    if purposes.contains(&Purpose::Dist) {
        needs.push(Box::new(rust::StaticCompiler));
        needs.push(Box::new(rust::CargoDeb));
        needs.push(Box::new(Program {
            name: "readelf",
            package: "binutils",
        }));
    }
    needs
}

fn install(needs: &[Box<dyn Need>], verbose: bool) -> Result<()> {
    let mut missing = Vec::new();
    for need in needs {
        match need.found()? {
            Some(what) if verbose => println!("  there    {}: {what}", need.name()),
            Some(_) => {}
            None => {
                println!("  missing  {}", need.name());
                missing.push(need);
            }
        }
    }
    if missing.is_empty() {
        return Ok(());
    }

    let mut packages: Vec<String> = Vec::new();
    for package in missing.iter().flat_map(|need| need.packages()) {
        if !packages.contains(&package) {
            packages.push(package);
        }
    }
    packages.retain(|package| debian::installed_version(package).is_none());
    if !packages.is_empty() {
        if command::find("apt-get").is_none() || !debian::is_root() {
            bail!(
                "only root on a Debian system can install these; please run\n    \
                 sudo apt-get update && sudo apt-get install --no-install-recommends {}\n\
                 and then this command again",
                packages.join(" ")
            );
        }
        println!("  install  {}", packages.join(" "));
        debian::install(&packages)?;
    }
    for need in missing {
        println!("  set up   {}", need.name());
        need.install()?;
        if need.found()?.is_none() {
            bail!("{} is still missing after its installation", need.name());
        }
    }
    Ok(())
}

/// A program of a Debian package.
struct Program {
    name: &'static str,
    package: &'static str,
}

impl Need for Program {
    fn name(&self) -> String {
        self.name.to_owned()
    }

    fn found(&self) -> Result<Option<String>> {
        Ok(command::find(self.name).map(|file| file.display().to_string()))
    }

    fn packages(&self) -> Vec<String> {
        vec![self.package.to_owned()]
    }
}

/// A file of a Debian package that has no program of its own.
struct File {
    path: &'static str,
    package: &'static str,
}

impl Need for File {
    fn name(&self) -> String {
        self.path.to_owned()
    }

    fn found(&self) -> Result<Option<String>> {
        Ok(Path::new(self.path)
            .exists()
            .then(|| self.package.to_owned()))
    }

    fn packages(&self) -> Vec<String> {
        vec![self.package.to_owned()]
    }
}
