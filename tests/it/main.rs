//! Integration tests: real monitors, real guests, the real tool. `cargo xtask test` runs them on
//! this machine and, cross-built, in the arm64 testbed.

mod attach;
mod backends;
mod bench;
mod capture;
mod dirty_ring;
mod doctor;
mod endurance;
mod fault_campaign;
mod interrupts;
mod its;
mod latency;
mod linux;
mod linux_devices;
mod linux_load;
mod migrate;
mod migrate_control;
mod migrate_faults;
mod migrate_network;
mod migrate_oneway;
mod migrate_shared;
mod migrate_tls;
mod peers;
mod peers_its;
#[path = "../perfetto/query.rs"]
mod perfetto;
mod probes;
mod qmp;
mod recorded;
mod reset;
mod rights;
mod scripts;
mod shutdown;
mod state;
mod stock;
mod trace;
mod usdt;
mod watch;
