//! Puts the eBPF object that `cargo xtask build` made into the program.
//!
//! Building that object needs a compiler with `rust-src` and bpf-linker; a plain `cargo build` must
//! not. Without `BLACKOUT_BPF_OBJECT` in the environment the program is built without the object,
//! and the verbs that need it say so.

use std::path::PathBuf;
use std::{env, fs};

fn main() {
    println!("cargo:rerun-if-env-changed=BLACKOUT_BPF_OBJECT");
    let object = match env::var_os("BLACKOUT_BPF_OBJECT").map(PathBuf::from) {
        None => Vec::new(),
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
    let out = env::var_os("OUT_DIR")
        .map(PathBuf::from)
        .expect("cargo sets OUT_DIR");
    fs::write(out.join("blackout.bpf.o"), object).expect("cargo's OUT_DIR can be written");
}
