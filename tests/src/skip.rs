//! Tests that can't run on a machine say so, and are counted; tests that take long ask first.

/// Whether the tests that take long are to run: `cargo xtask test --slow`.
pub fn slow() -> bool {
    std::env::var("BLACKOUT_SLOW").is_ok_and(|value| value == "1")
}

/// Whether this machine is emulated: `cargo xtask testbed`.
pub fn emulated() -> bool {
    std::env::var("BLACKOUT_EMULATED").is_ok_and(|value| value == "1")
}

/// Ends the calling test as skipped, with the reason in a form that `cargo xtask test` counts:
/// `SKIP: <test>: <why>`.
#[macro_export]
macro_rules! skip {
    ($($why:tt)*) => {{
        let test = std::thread::current().name().unwrap_or("?").to_owned();
        println!("SKIP: {test}: {}", format_args!($($why)*));
        return Ok(());
    }};
}
