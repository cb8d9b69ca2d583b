//! The x86-64 part.
