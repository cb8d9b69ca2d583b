//! A recording that anybody may have written: it is refused with a reason or read, and nothing that is
//! made of it panics, overflows, runs away or takes more memory than the file can stand for.
#![no_main]

use blackout_fuzz::{all, recording};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let _ = all(&recording(data));
});
