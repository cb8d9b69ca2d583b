//! The records that cross from the eBPF programs to the tool.
