//! Has the linker make a monitor that perf can probe.
//!
//! perf knows programs by their build IDs, which lld does not give them by itself. And perf (6.1 at
//! least) puts a probe at its address as if that were its offset in the file: lld packs segments so
//! tightly that the two differ, and perf's probes would lie in the middle of something else. The other
//! tools read the segments, and need none of this.

use std::env;

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    // The linker itself, or a compiler that hands arguments on to it.
    let direct = env::var("RUSTC_LINKER").is_ok_and(|linker| linker.ends_with("lld"));
    let arguments = if direct {
        ["-zseparate-loadable-segments", "--build-id"]
    } else {
        ["-Wl,-z,separate-loadable-segments", "-Wl,--build-id"]
    };
    for argument in arguments {
        println!("cargo:rustc-link-arg-bins={argument}");
    }
}
