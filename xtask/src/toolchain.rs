//! Which compiler builds what: rustup's where it can, Debian's where rustup cannot.
//!
//! Three things need more than the compiler that runs this program: eBPF programs need `core` built
//! from source, the testbed's programs need an arm64 standard library, and bare-metal guests need
//! `core` for a target without an operating system. On a machine where rustup can add these, the
//! active toolchain does all of it. Where it cannot, Debian's `rustc-web` packages do.

use std::env;
use std::fmt;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Result, bail};

use crate::{command, paths};

/// LLVM's major version in bpf-linker. It reads the bitcode of this LLVM and of older ones.
pub(crate) const LLVM: u32 = 22;

/// bpf-linker's version, built by `cargo xtask setup`.
pub(crate) const BPF_LINKER: &str = "0.13.0";

/// cargo-deb's version, built by `cargo xtask setup --for dist`.
pub(crate) const CARGO_DEB: &str = "3.8.0";

/// The eBPF target. All machines that the project runs on are little-endian.
pub(crate) const BPF_TARGET: &str = "bpfel-unknown-none";

/// A compiler with its standard library.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Toolchain {
    /// The one that runs this program.
    Active,
    /// rustup's nightly.
    Nightly,
    /// Debian's `rustc-web`, in /usr, driven by the active cargo.
    Debian,
}

/// A compiler chosen for a target, and how cargo is to be called for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Choice {
    /// The compiler.
    pub(crate) toolchain: Toolchain,
    /// The target's name, as `cargo build --target` takes it.
    pub(crate) target: String,
    /// Whether `core` has to be built from source because the target comes without a library.
    pub(crate) build_core: bool,
}

impl Toolchain {
    const ALL: [Self; 3] = [Self::Active, Self::Nightly, Self::Debian];

    /// Cargo with this compiler, in the workspace, without the caller's compiler flags.
    fn cargo(self) -> Command {
        let mut cargo = match self {
            Self::Active | Self::Debian => {
                Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
            }
            Self::Nightly => {
                let mut rustup = Command::new("rustup");
                rustup.args(["run", "nightly", "cargo"]);
                // Both name the active toolchain and would win over `rustup run`.
                rustup.env_remove("RUSTUP_TOOLCHAIN").env_remove("CARGO");
                rustup
            }
        };
        if self == Self::Debian {
            cargo.env("RUSTC", "/usr/bin/rustc");
        }
        cargo
            .current_dir(paths::workspace())
            .env_remove("RUSTFLAGS")
            .env_remove("CARGO_ENCODED_RUSTFLAGS");
        cargo
    }

    fn rustc(self) -> Command {
        match self {
            Self::Active => Command::new(env::var_os("RUSTC").unwrap_or_else(|| "rustc".into())),
            Self::Nightly => {
                let mut rustup = Command::new("rustup");
                rustup
                    .args(["run", "nightly", "rustc"])
                    .env_remove("RUSTUP_TOOLCHAIN");
                rustup
            }
            Self::Debian => Command::new("/usr/bin/rustc"),
        }
    }

    /// Whether the compiler can be run at all.
    pub(crate) fn exists(self) -> bool {
        self.sysroot().is_some()
    }

    fn sysroot(self) -> Option<PathBuf> {
        let path = command::probe(self.rustc().args(["--print", "sysroot"]))?;
        Some(PathBuf::from(path.trim()))
    }

    /// The major version of the compiler's LLVM.
    fn llvm(self) -> Option<u32> {
        let text = command::probe(self.rustc().arg("-vV"))?;
        let version = text
            .lines()
            .find_map(|line| line.strip_prefix("LLVM version: "))?;
        version.split('.').next()?.parse().ok()
    }

    fn has_library(self, target: &str) -> bool {
        self.sysroot()
            .is_some_and(|root| root.join("lib/rustlib").join(target).join("lib").is_dir())
    }

    fn has_source(self) -> bool {
        self.sysroot().is_some_and(|root| {
            root.join("lib/rustlib/src/rust/library/core/Cargo.toml")
                .is_file()
        })
    }
}

impl Choice {
    /// The compiler for eBPF programs, if there is one.
    pub(crate) fn for_bpf() -> Option<Self> {
        let toolchain = Toolchain::ALL.into_iter().find(|toolchain| {
            toolchain.has_source() && toolchain.llvm().is_some_and(|llvm| llvm <= LLVM)
        })?;
        Some(Self {
            toolchain,
            target: BPF_TARGET.to_owned(),
            build_core: true,
        })
    }

    /// The compiler for bare-metal guests of `arch`, if there is one.
    pub(crate) fn for_guest(arch: &str) -> Option<Self> {
        let target = format!("{arch}-unknown-none");
        if Toolchain::Active.has_library(&target) {
            return Some(Self {
                toolchain: Toolchain::Active,
                target,
                build_core: false,
            });
        }
        let toolchain = Toolchain::ALL
            .into_iter()
            .find(|toolchain| toolchain.has_source())?;
        Some(Self {
            toolchain,
            target,
            build_core: true,
        })
    }

    /// The compiler for the testbed's programs, if there is one.
    pub(crate) fn for_testbed() -> Option<Self> {
        let choice = |toolchain, target: &str| Self {
            toolchain,
            target: target.to_owned(),
            build_core: false,
        };
        if Toolchain::Active.has_library(TESTBED_TARGET) {
            return Some(choice(Toolchain::Active, TESTBED_TARGET));
        }
        let debian = debian_library().ok()?.is_dir() && Toolchain::Debian.exists();
        debian.then(|| choice(Toolchain::Debian, DEBIAN_TARGET))
    }

    /// The compiler for static programs of `arch`, if there is one.
    pub(crate) fn for_static(arch: &str) -> Option<Self> {
        if arch == "aarch64" {
            return Self::for_testbed();
        }
        let target = format!("{arch}-unknown-linux-musl");
        let toolchain = Toolchain::Active;
        toolchain.has_library(&target).then_some(Self {
            toolchain,
            target,
            build_core: false,
        })
    }

    /// Whether the active toolchain was chosen.
    pub(crate) fn is_active(&self) -> bool {
        self.toolchain == Toolchain::Active
    }

    /// A cargo command that builds for this choice; the caller adds what to build.
    pub(crate) fn cargo(&self, subcommand: &str) -> Result<Command> {
        let mut cargo = self.toolchain.cargo();
        cargo.args([subcommand, "--release", "--target", &self.target]);
        if self.build_core {
            // Building the library from source is unstable; the compilers are the stable ones.
            cargo
                .env("RUSTC_BOOTSTRAP", "1")
                .args(["-Z", "build-std=core"]);
        }
        if self.toolchain == Toolchain::Debian && self.target.ends_with("-unknown-none") {
            // rustup's compilers bring a linker of their own for these targets; Debian's does not.
            let variable = self.target.replace('-', "_").to_uppercase();
            cargo.env(
                format!("CARGO_TARGET_{variable}_LINKER"),
                format!("ld.lld-{LLVM}"),
            );
        }
        if self.target == DEBIAN_TARGET {
            let library = debian_library()?;
            cargo
                .env(
                    "CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER",
                    "aarch64-linux-gnu-gcc",
                )
                .env(
                    "CARGO_ENCODED_RUSTFLAGS",
                    format!(
                        "-Ctarget-feature=+crt-static,+crc\x1f-L{}",
                        library.display()
                    ),
                );
        }
        if self.target == BPF_TARGET {
            let linker = bpf_linker()?;
            if !linker.is_file() {
                bail!("bpf-linker is not there: run `cargo xtask setup`");
            }
            cargo.env("CARGO_TARGET_BPFEL_UNKNOWN_NONE_LINKER", linker);
        }
        Ok(cargo)
    }
}

impl fmt::Display for Choice {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let toolchain = match self.toolchain {
            Toolchain::Active => "the active toolchain",
            Toolchain::Nightly => "rustup's nightly",
            Toolchain::Debian => "Debian's rustc-web",
        };
        write!(formatter, "{toolchain}, target {}", self.target)
    }
}

/// rustup's target for static arm64 programs; `.cargo/config.toml` says how it is linked.
pub(crate) const TESTBED_TARGET: &str = "aarch64-unknown-linux-musl";

/// Debian's target for the same, linked with Debian's cross compiler and C library.
pub(crate) const DEBIAN_TARGET: &str = "aarch64-unknown-linux-gnu";

/// Where setup unpacks Debian's arm64 standard library.
pub(crate) fn debian_root() -> Result<PathBuf> {
    Ok(paths::cache()?.join("rust-web-arm64"))
}

fn debian_library() -> Result<PathBuf> {
    Ok(debian_root()?
        .join("usr/lib/rustlib")
        .join(DEBIAN_TARGET)
        .join("lib"))
}

/// Where setup installs bpf-linker: a folder by version, so that another version is another file.
pub(crate) fn bpf_linker() -> Result<PathBuf> {
    Ok(bpf_linker_root()?.join("bin/bpf-linker"))
}

/// The folder that holds bpf-linker's `bin`.
pub(crate) fn bpf_linker_root() -> Result<PathBuf> {
    Ok(paths::cache()?.join(format!("bpf-linker-{BPF_LINKER}-llvm-{LLVM}")))
}

/// Where setup installs cargo-deb.
pub(crate) fn cargo_deb() -> Result<PathBuf> {
    Ok(cargo_deb_root()?.join("bin/cargo-deb"))
}

/// The folder that holds cargo-deb's `bin`.
pub(crate) fn cargo_deb_root() -> Result<PathBuf> {
    Ok(paths::cache()?.join(format!("cargo-deb-{CARGO_DEB}")))
}
