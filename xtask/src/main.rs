//! Stands in until its first verb lands.
fn main() {}
