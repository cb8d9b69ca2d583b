//! The monitor, as a library.
