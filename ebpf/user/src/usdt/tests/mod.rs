//! What needs neither root nor a kernel: operands, and files good and bad.

mod files;
mod operands;
