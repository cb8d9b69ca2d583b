//! What the compilers lack: targets, the library's source, and bpf-linker.

use std::env::consts::ARCH;
use std::fs;
use std::process::Command;

use anyhow::{Context, Result, bail};

use super::Need;
use super::debian::{self, Archive};
use crate::toolchain::{self, BPF_LINKER, CARGO_DEB, Choice, LLVM, TESTBED_TARGET};
use crate::{command, toolchain::Toolchain};

/// A compiler that can build eBPF programs.
pub(super) struct BpfCompiler;

/// A compiler that can build bare-metal guests for an architecture.
pub(super) struct GuestCompiler(pub(super) &'static str);

/// A compiler that can build the testbed's programs.
pub(super) struct TestbedCompiler;

/// A compiler that can build static programs for this machine.
pub(super) struct StaticCompiler;

/// What makes Debian packages.
pub(super) struct CargoDeb;

/// The linker of eBPF programs, built against Debian's LLVM.
pub(super) struct BpfLinker;

impl Need for BpfCompiler {
    fn name(&self) -> String {
        "compiler for eBPF programs".to_owned()
    }

    fn found(&self) -> Result<Option<String>> {
        Ok(Choice::for_bpf().map(|choice| choice.to_string()))
    }

    fn packages(&self) -> Vec<String> {
        debian_unless(|| rustup(&["component", "add", "rust-src"]))
    }

    fn install(&self) -> Result<()> {
        verify(Choice::for_bpf(), "eBPF programs")
    }
}

impl Need for GuestCompiler {
    fn name(&self) -> String {
        format!("compiler for bare-metal {} guests", self.0)
    }

    fn found(&self) -> Result<Option<String>> {
        Ok(Choice::for_guest(self.0).map(|choice| choice.to_string()))
    }

    fn packages(&self) -> Vec<String> {
        let target = format!("{}-unknown-none", self.0);
        let mut packages = debian_unless(|| rustup(&["target", "add", &target]));
        if !packages.is_empty() {
            packages.push(format!("lld-{LLVM}"));
        }
        packages
    }

    fn install(&self) -> Result<()> {
        verify(Choice::for_guest(self.0), "bare-metal guests")
    }
}

impl Need for TestbedCompiler {
    fn name(&self) -> String {
        "compiler for the testbed's static arm64 programs".to_owned()
    }

    fn found(&self) -> Result<Option<String>> {
        Ok(Choice::for_testbed().map(|choice| choice.to_string()))
    }

    fn packages(&self) -> Vec<String> {
        let mut packages = debian_unless(|| rustup(&["target", "add", TESTBED_TARGET]));
        if !packages.is_empty() {
            packages.extend(["gcc-aarch64-linux-gnu", "libc6-dev-arm64-cross"].map(str::to_owned));
        }
        packages
    }

    fn install(&self) -> Result<()> {
        if Choice::for_testbed().is_none() {
            let root = toolchain::debian_root()?;
            fs::create_dir_all(&root)
                .with_context(|| format!("cannot create {}", root.display()))?;
            // A library is of use to the very compiler that built it; rebuilds add a suffix.
            let version = debian::installed_version("rustc-web").unwrap_or_default();
            Archive::open("arm64")?.unpack(&format!("libstd-rust-web-dev={version}*"), &root)?;
        }
        verify(Choice::for_testbed(), "the testbed's programs")
    }
}

impl Need for StaticCompiler {
    fn name(&self) -> String {
        "compiler for static programs of this machine".to_owned()
    }

    fn found(&self) -> Result<Option<String>> {
        Ok(Choice::for_static(ARCH).map(|choice| choice.to_string()))
    }

    fn install(&self) -> Result<()> {
        rustup(&["target", "add", &format!("{ARCH}-unknown-linux-musl")]);
        verify(Choice::for_static(ARCH), "static programs")
    }
}

impl Need for CargoDeb {
    fn name(&self) -> String {
        format!("cargo-deb {CARGO_DEB}")
    }

    fn found(&self) -> Result<Option<String>> {
        let program = toolchain::cargo_deb()?;
        let version = command::probe(Command::new(&program).arg("--version"));
        Ok(version.map(|_| program.display().to_string()))
    }

    fn install(&self) -> Result<()> {
        let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
        command::run(
            Command::new(cargo)
                .args(["install", "--locked", "--root"])
                .arg(toolchain::cargo_deb_root()?)
                .arg(format!("cargo-deb@{CARGO_DEB}"))
                .current_dir("/"),
        )
    }
}

impl Need for BpfLinker {
    fn name(&self) -> String {
        format!("bpf-linker {BPF_LINKER} with LLVM {LLVM}")
    }

    fn found(&self) -> Result<Option<String>> {
        let linker = toolchain::bpf_linker()?;
        let version = command::probe(Command::new(&linker).arg("--version"));
        Ok(version.map(|_| linker.display().to_string()))
    }

    fn packages(&self) -> Vec<String> {
        let llvm = [format!("llvm-{LLVM}-dev"), format!("libpolly-{LLVM}-dev")];
        let libraries = ["zlib1g-dev", "libzstd-dev", "libxml2-dev"].map(str::to_owned);
        llvm.into_iter().chain(libraries).collect()
    }

    fn install(&self) -> Result<()> {
        let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
        command::run(
            Command::new(cargo)
                .args(["install", "--locked", "--no-default-features", "--features"])
                .args([format!("llvm-{LLVM}"), "--root".to_owned()])
                .arg(toolchain::bpf_linker_root()?)
                .arg(format!("bpf-linker@{BPF_LINKER}"))
                .env("LLVM_PREFIX", format!("/usr/lib/llvm-{LLVM}"))
                // The workspace's folder would bring its .cargo/config.toml into this build.
                .current_dir("/"),
        )
    }
}

/// Debian's compiler, unless `rustup` could add what is missing.
fn debian_unless(added: impl FnOnce() -> bool) -> Vec<String> {
    if added() {
        return Vec::new();
    }
    let library = format!("libstd-rust-web-dev:{}", debian_arch());
    vec!["rustc-web".to_owned(), "rust-web-src".to_owned(), library]
}

fn debian_arch() -> &'static str {
    if ARCH == "aarch64" { "arm64" } else { "amd64" }
}

/// Asks rustup for a part of the active toolchain.
fn rustup(arguments: &[&str]) -> bool {
    let Some(rustup) = command::find("rustup") else {
        return false;
    };
    // Its failure is no failure of setup, so its backtrace would only alarm.
    let added = command::run(
        Command::new(rustup)
            .args(arguments)
            .env("RUST_BACKTRACE", "0"),
    );
    if added.is_err() {
        println!("  rustup cannot; Debian's compiler will do");
    }
    added.is_ok()
}

fn verify(choice: Option<Choice>, what: &str) -> Result<()> {
    match choice {
        Some(_) => Ok(()),
        None => bail!(
            "no compiler for {what}: rustup could not add its parts to the active toolchain, and \
             Debian's rustc-web is not usable ({})",
            if Toolchain::Debian.exists() {
                "it lacks a part"
            } else {
                "it is not there"
            }
        ),
    }
}
