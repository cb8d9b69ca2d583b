//! What other programs read: one format a file.

pub mod chrome;
