//! What the page's script draws.

use std::io;

use blackout_abi::probes;
use serde::Serialize;

use crate::analysis::Side;
use crate::report::schema::Migration;

/// More spans or ioctls of one migration than this are not drawn.
const DRAWN: usize = 20_000;

#[derive(Serialize)]
struct Timeline<'a> {
    /// Begin and length of the downtime.
    downtime: Option<(i64, u64)>,
    /// The end of the last span.
    end: i64,
    spans: Vec<Piece<'a>>,
    ioctls: Vec<Piece<'a>>,
    vcpus: Vec<(u64, i64, u64)>,
    /// Begin and length of each loss of events.
    losses: Vec<(i64, u64)>,
    /// What of it is not drawn.
    left: usize,
}

#[derive(Serialize)]
struct Piece<'a> {
    side: Side,
    name: &'a str,
    detail: &'a str,
    kind: &'static str,
    at: i64,
    took: u64,
    depth: u64,
    rc: Option<i64>,
    /// Whether events were lost while it ran.
    lossy: bool,
}

/// The migrations as JSON that can stand in a script element.
pub(super) fn json(migrations: &[Migration]) -> io::Result<String> {
    let timelines: Vec<_> = migrations.iter().map(timeline).collect();
    // Nothing may end the element, which `<` alone could.
    Ok(serde_json::to_string(&timelines)?.replace('<', "\\u003c"))
}

fn timeline(migration: &Migration) -> Timeline<'_> {
    let spans = migration.spans.iter().map(|span| Piece {
        side: span.side,
        name: match (span.side, span.label.as_str()) {
            (Side::Wire, _) => &span.detail,
            (_, "") => &span.name,
            (_, label) => label,
        },
        detail: &span.detail,
        kind: kind(&span.name),
        at: span.start_ns,
        took: span.duration_ns,
        depth: span.depth,
        rc: span.rc,
        lossy: span.lossy,
    });
    let ioctls = migration.ioctls.iter().map(|ioctl| Piece {
        side: ioctl.side,
        name: ioctl.attr_name().unwrap_or(&ioctl.name),
        detail: ioctl.attr_name().map_or("", |_| &ioctl.name),
        kind: "kernel",
        at: ioctl.start_ns,
        took: ioctl.duration_ns,
        depth: 0,
        rc: Some(ioctl.rc),
        lossy: ioctl.lossy,
    });
    let all = migration.spans.iter();
    let end = all.map(|span| span.start_ns.saturating_add_unsigned(span.duration_ns));
    let left =
        migration.spans.len().saturating_sub(DRAWN) + migration.ioctls.len().saturating_sub(DRAWN);
    Timeline {
        downtime: migration.downtime_start_ns.zip(migration.downtime_ns),
        end: end.max().unwrap_or(0),
        spans: spans.take(DRAWN).collect(),
        ioctls: ioctls.take(DRAWN).collect(),
        vcpus: migration
            .vcpus
            .iter()
            .map(|vcpu| (vcpu.index, vcpu.start_ns, vcpu.blackout_ns))
            .collect(),
        losses: migration
            .losses
            .iter()
            .take(DRAWN)
            .map(|loss| (loss.start_ns, loss.duration_ns))
            .collect(),
        left,
    }
}

fn kind(row: &str) -> &'static str {
    if row == "channel" {
        return "wire";
    }
    match probes::span(row).map(|span| span.nature) {
        Some(probes::Nature::Layer) => "layer",
        Some(probes::Nature::Wait) => "wait",
        Some(probes::Nature::Work) | None => "work",
    }
}
