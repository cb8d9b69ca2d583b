//! The gate: verdicts on made-up sets, and the program as CI calls it.

mod cli;
mod formats;
mod sets;
mod textfile;
mod verdicts;

use blackout::analysis::Side;
use blackout::analysis::migration::View;
use blackout::report::schema::{Host, Migration, Span};

/// A host's name, kernel and backend do not matter to any verdict.
fn host(kernel: &str) -> Host {
    Host {
        hostname: "host".to_owned(),
        kernel: kernel.to_owned(),
        arch: "aarch64".to_owned(),
        backends: vec!["uprobe".to_owned()],
    }
}

/// A migration that completes: `handler` ns in a state handler, `load` ns at the destination.
fn migration(handler: u64, load: u64) -> Migration {
    let span = |side, name: &str, label: &str, start_ns, duration_ns, depth| Span {
        side,
        hop: 6,
        name: name.to_owned(),
        label: label.to_owned(),
        detail: String::new(),
        start_ns,
        duration_ns,
        depth,
        rc: Some(0),
        lossy: false,
    };
    let (source, destination) = (Side::Source, Side::Destination);
    let stop = 10_000 + handler;
    let downtime_ns = stop + load;
    let from = 1_000_000;
    let after = from + stop.cast_signed();
    Migration {
        view: View::Probes,
        id: Some(1),
        mode: "normal".to_owned(),
        status: "completed".to_owned(),
        error: None,
        downtime_ns: Some(downtime_ns),
        downtime_start_ns: Some(from),
        blackout_ns: Some(downtime_ns - 1_000),
        explained: Some(0.9),
        clock_error_ns: Some(0),
        clock: None,
        lost_events: 0,
        losses: Vec::new(),
        hosts: vec![host("6.12.1")],
        spans: vec![
            span(source, "migrate", "", 0, 2_000_000 + downtime_ns, 0),
            span(source, "ram_round", "", 10, 900_000, 1),
            span(source, "migration_stop_vm", "", from, stop, 1),
            span(
                source,
                "vm_state_handler",
                "vm_state_handler its main",
                from + 5_000,
                handler,
                2,
            ),
            span(
                source,
                "drain",
                "",
                from + 5_000 + handler.cast_signed(),
                2_000,
                2,
            ),
            // It began before the stop: only what is in the downtime counts.
            span(destination, "ram_load", "", from - 500, 600, 1),
            span(
                destination,
                "device_load",
                "device_load gic",
                after,
                load,
                1,
            ),
        ],
        ioctls: Vec::new(),
        its: Vec::new(),
        gaps: Vec::new(),
        vcpus: Vec::new(),
        doubts: Vec::new(),
    }
}

/// `n` migrations whose handler takes `handler` ns and a little more, never twice the same.
fn migrations(n: u64, handler: u64, seed: u64) -> Vec<Migration> {
    let mut rng = fastrand::Rng::with_seed(seed);
    (0..n)
        .map(|_| migration(handler + rng.u64(..4_000), 30_000 + rng.u64(..2_000)))
        .collect()
}
