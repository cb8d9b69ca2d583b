//! Hands the linker the script of the architecture that the guest is built for.

use std::env;

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    // A check on the host builds for an operating system, whose own script is the right one.
    if env::var("CARGO_CFG_TARGET_OS").as_deref() != Ok("none") {
        return;
    }
    let root = env::var("CARGO_MANIFEST_DIR").expect("cargo sets CARGO_MANIFEST_DIR");
    let arch = env::var("CARGO_CFG_TARGET_ARCH").expect("cargo sets CARGO_CFG_TARGET_ARCH");
    let script = format!("{root}/src/{arch}/link.ld");
    println!("cargo::rerun-if-changed={script}");
    println!("cargo::rustc-link-arg-bins=-T{script}");
    // Nobody would relocate it: it runs where the script puts it.
    println!("cargo::rustc-link-arg-bins=--no-pie");
}
