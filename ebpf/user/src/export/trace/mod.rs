//! A recording as a trace: what every trace format writes, one event at a time.
//!
//! One process is one group of rows: each of its threads has a row with its spans and moments, one
//! below it with what the kernel did for that thread, and a vCPU's thread a third with its stays in
//! KVM_RUN. Slices of one row nest. Arrows lead from a span to the ioctl that it made, and from
//! where a message was sent to where it was read. Pids and tids are real; the rows that stand for
//! no thread of their own are numbered from [`KERNEL_ROW`] and [`GUEST_ROW`] on.
//!
//! Time is the first recording's `CLOCK_MONOTONIC`, from the trace's first event on.

pub(super) mod event;
mod hosts;
mod rows;

use std::io;

use serde_json::{Value, json};

use self::event::{Args, Event, Track};
use self::hosts::Hosts;
use crate::analysis::{Loaded, Migration, describe};

/// Added to a thread's tid: the row of what the kernel did for it. Linux has no such tid.
pub const KERNEL_ROW: u64 = 1 << 30;

/// Added to a vCPU thread's tid: the row of its stays in KVM_RUN. Perfetto's tids have 31 bits.
pub const GUEST_ROW: u64 = 3 << 29;

/// The phases of a migration: itself, its downtime, its blackout.
const PHASES: u64 = 3;

/// A trace format.
pub(super) trait Sink {
    /// Begins a trace whose zero is `origin_ns` on the first recording's clock. `other` is what a
    /// reader has to know beside the events.
    fn begin(&mut self, origin_ns: i64, other: &Value) -> io::Result<()>;

    /// Writes an event. A row's slices come in order, a parent before its children, but for those
    /// that took longer than a [`Part`](crate::analysis::Part): these come after what is inside them.
    fn put(&mut self, event: &Event<'_>) -> io::Result<()>;

    /// Ends the trace.
    fn end(&mut self) -> io::Result<()>;
}

/// Hands `sink` the trace of `recordings`, among which `migrations` were found.
pub(super) fn write(
    sink: &mut impl Sink,
    recordings: &[Loaded],
    migrations: &[Migration<'_>],
) -> io::Result<()> {
    let hosts = Hosts::new(recordings, migrations);
    sink.begin(hosts.origin_ns(), &other_data(&hosts, recordings))?;
    let mut events = Events { sink, arrows: 0 };
    for (index, recording) in recordings.iter().enumerate() {
        rows::write(&mut events, &hosts, index, recording, migrations)?;
    }
    let mut number = 0;
    for migration in migrations {
        phases(&mut events, &hosts, migration, number)?;
        messages(&mut events, &hosts, migration)?;
        number += PHASES;
    }
    for (index, recording) in recordings.iter().enumerate() {
        losses(&mut events, &hosts, (index, recording), &mut number)?;
    }
    events.sink.end()
}

/// The events, as they are written.
struct Events<'s, S> {
    sink: &'s mut S,
    arrows: u64,
}

impl<S: Sink> Events<'_, S> {
    fn put(&mut self, event: &Event<'_>) -> io::Result<()> {
        self.sink.put(event)
    }

    /// An arrow from the slice that is open at `tail` to the one at `head`.
    fn arrow(
        &mut self,
        name: &str,
        cat: &str,
        tail: (Track, i64),
        head: (Track, i64),
    ) -> io::Result<()> {
        let id = self.arrows;
        self.arrows += 1;
        self.put(&Event::flow_start(name, cat, tail.0, tail.1, id))?;
        self.put(&Event::flow_end(name, cat, head.0, head.1, id))
    }
}

fn other_data(hosts: &Hosts, recordings: &[Loaded]) -> Value {
    let clocks = recordings.iter().enumerate().map(|(index, recording)| {
        let clock = hosts.clock(index);
        json!({
            "recording": recording.name,
            "hostname": recording.header.hostname,
            "kernel": recording.header.kernel,
            "arch": recording.header.arch,
            "backends": recording.header.backends,
            "offset_ns": clock.offset_ns,
            "error_ns": clock.error_ns,
            "basis": clock.basis,
            "lost_events": recording.lost.events(),
        })
    });
    let lost = recordings
        .iter()
        .fold(0u64, |sum, one| sum.saturating_add(one.lost.events()));
    json!({
        "tool": format!("blackout {}", env!("CARGO_PKG_VERSION")),
        "clock": "CLOCK_MONOTONIC of the first recording's host",
        "origin_ns": hosts.origin_ns(),
        "recordings": clocks.collect::<Vec<_>>(),
        "lost_events": lost,
    })
}

/// When events were lost, as phases of the recording's first process: slices that lack a part say so
/// by `lossy`.
fn losses<S: Sink>(
    events: &mut Events<'_, S>,
    hosts: &Hosts,
    (index, recording): (usize, &Loaded),
    number: &mut u64,
) -> io::Result<()> {
    let Some(pid) = recording.processes.keys().next() else {
        return Ok(());
    };
    let pid = hosts.pid(recording, *pid);
    for loss in recording.lost.iter() {
        let args = Args::from_iter([("events".to_owned(), loss.count.into())]);
        let start = hosts.at(index, loss.since_ns).max(0);
        let end = hosts.at(index, loss.until_ns).max(start);
        events.put(&Event::phase_begin(
            "events lost",
            pid,
            start,
            *number,
            args,
        ))?;
        events.put(&Event::phase_end("events lost", pid, end, *number))?;
        *number += 1;
    }
    Ok(())
}

/// The migration, its downtime and its blackout, as phases of the side that the axis follows.
fn phases<S: Sink>(
    events: &mut Events<'_, S>,
    hosts: &Hosts,
    migration: &Migration<'_>,
    number: u64,
) -> io::Result<()> {
    let Some(party) = migration.parties().next() else {
        return Ok(());
    };
    let pid = hosts.pid(party.recording, party.pid);
    let downtime = &migration.downtime;
    let bounds = downtime
        .bounds
        .map(|bounds| (bounds.start_ns, bounds.end_ns));
    let name = migration
        .id
        .map_or_else(|| "migration".into(), |id| format!("migration {id}"));
    let mut all = Args::from_iter([
        (
            "status".to_owned(),
            describe::printable(&migration.status).into(),
        ),
        ("explained".to_owned(), downtime.explained.into()),
        ("lost_events".to_owned(), migration.lost_events().into()),
    ]);
    let doubts = migration.doubts();
    if !doubts.is_empty() {
        let doubts = describe::printable(&doubts.join("; "));
        all.insert("doubts".to_owned(), doubts.into());
    }
    let phases = [
        (name.as_str(), Some((0, migration.end_ns)), all),
        ("downtime", bounds, Args::new()),
        ("blackout", downtime.blackout, Args::new()),
    ];
    for (index, (name, range, args)) in (0..).zip(phases) {
        let Some((start, end)) = range else { continue };
        let id = number + index;
        let at = |ns| hosts.on_axis(party, ns);
        events.put(&Event::phase_begin(name, pid, at(start), id, args))?;
        events.put(&Event::phase_end(name, pid, at(end.max(start)), id))?;
    }
    Ok(())
}

/// Arrows along the messages whose both ends lie in a span.
fn messages<S: Sink>(
    events: &mut Events<'_, S>,
    hosts: &Hosts,
    migration: &Migration<'_>,
) -> io::Result<()> {
    for segment in &migration.wire {
        let end = |is_sender: bool, tid: u32, ns: i64| {
            let party = migration
                .parties()
                .find(|party| (party.side == segment.from) == is_sender)?;
            let thread = party.process.threads.get(&tid)?;
            thread.spans_at(party.place.back(ns)).next()?;
            Some((
                hosts.track(party.recording, party.pid, tid),
                hosts.on_axis(party, ns),
            ))
        };
        let tail = end(true, segment.sender, segment.sent_ns);
        let head = end(false, segment.receiver, segment.received_ns);
        if let (Some(tail), Some(head)) = (tail, head) {
            events.arrow(
                &describe::printable(&segment.describe()),
                "wire",
                tail,
                head,
            )?;
        }
    }
    Ok(())
}
