//! Puts the eBPF object that `cargo xtask build` made into the program.
//!
//! Building that object needs a compiler with `rust-src` and bpf-linker; a plain `cargo build` must
//! not. So that `cargo test` does not put a program without the object in the place of one with it, the
//! object is looked for where xtask left it, in `bpf/ARCH` of the target folder, unless
//! `BLACKOUT_BPF_OBJECT` names it. Where there is none, or its sources have changed since, the program
//! is built without it, and the verbs that need it say so.

use std::path::{Path, PathBuf};
use std::time::SystemTime;
use std::{env, fs};

/// What the object is made of.
const SOURCES: [&str; 2] = ["../kern/src", "../abi/src"];

fn main() {
    println!("cargo:rerun-if-env-changed=BLACKOUT_BPF_OBJECT");
    let out = env::var_os("OUT_DIR")
        .map(PathBuf::from)
        .expect("cargo sets OUT_DIR");
    let object = match env::var_os("BLACKOUT_BPF_OBJECT").map(PathBuf::from) {
        None => built(&out).unwrap_or_default(),
        Some(path) => {
            println!("cargo:rerun-if-changed={}", path.display());
            fs::read(&path).unwrap_or_else(|error| {
                panic!(
                    "BLACKOUT_BPF_OBJECT: cannot read {}: {error}",
                    path.display()
                )
            })
        }
    };
    fs::write(out.join("blackout.bpf.o"), object).expect("cargo's OUT_DIR can be written");
}

/// The object that xtask has built in the target folder around `out`.
fn built(out: &Path) -> Option<Vec<u8>> {
    println!("cargo:rerun-if-changed=build.rs");
    for sources in SOURCES.iter().filter(|sources| Path::new(sources).exists()) {
        println!("cargo:rerun-if-changed={sources}");
    }
    let arch = env::var("CARGO_CFG_TARGET_ARCH").ok()?;
    let mut folders = out.ancestors().map(|folder| folder.join("bpf").join(&arch));
    let folder = folders.find(|folder| folder.join("blackout-ebpf").is_file())?;
    let object = folder.join("blackout-ebpf");
    println!("cargo:rerun-if-changed={}", object.display());
    // The object stays as it is when it is built anew and does not change; this file tells.
    let built = fs::metadata(folder.join("built")).and_then(|built| built.modified());
    let changed = SOURCES
        .iter()
        .filter_map(|sources| newest(Path::new(sources)));
    if changed.max() > built.ok() {
        println!(
            "cargo:warning={} is older than its sources: `blackout` is built without eBPF programs \
             until `cargo xtask build` has made them anew",
            object.display()
        );
        return None;
    }
    fs::read(object).ok()
}

/// When the last file in `folder` was changed.
fn newest(folder: &Path) -> Option<SystemTime> {
    let entries = fs::read_dir(folder).ok()?.flatten();
    let times = entries.filter_map(|entry| match entry.path() {
        path if path.is_dir() => newest(&path),
        path => fs::metadata(path).ok()?.modified().ok(),
    });
    times.max()
}
