//! A recording's processes and threads as rows of slices.

use std::cmp::Reverse;
use std::io;

use serde_json::Value;

use super::event::{Args, Event, Track};
use super::hosts::{Hosts, runs_from};
use super::{Events, GUEST_ROW, KERNEL_ROW, Sink};
use crate::analysis::spans;
use crate::analysis::{Loaded, Migration, Placed, Process, Span, Thread, describe, kvm};
use crate::recording::{Ioctl, KernelFn, Value as Arg};

/// Whether `span` is open at `ns` on thread `tid`, so that an arrow can bind to it.
pub(super) fn is_open(span: &Placed<'_, Span>, tid: u32, ns: i64) -> bool {
    span.tid == tid && span.start_ns <= ns && ns < span.end_ns
}

/// Writes the rows of recording `index`.
pub(super) fn write<S: Sink>(
    events: &mut Events<'_, S>,
    hosts: &Hosts<'_>,
    index: usize,
    recording: &Loaded,
    migrations: &[Migration<'_>],
) -> io::Result<()> {
    for (pid, process) in &recording.processes {
        let group = hosts.pid(recording, *pid);
        let name = format!("{} on {}", process.comm, recording.header.hostname);
        events.put(&Event::process(
            "process_name",
            group,
            "name",
            describe::printable(&name),
        ))?;
        // The source stands above the destination, and what took part above what did not.
        let parties = migrations.iter().flat_map(Migration::parties);
        let part = |party: &crate::analysis::Party<'_>| {
            std::ptr::eq(party.recording, recording) && party.pid == *pid
        };
        let place = (0u64..).zip(parties).find(|(_, party)| part(party));
        let place = place.map_or(u64::from(u32::MAX), |(place, _)| place);
        events.put(&Event::process(
            "process_sort_index",
            group,
            "sort_index",
            place,
        ))?;
        threads(events, hosts, (index, recording), (*pid, process))?;
    }
    Ok(())
}

fn threads<S: Sink>(
    events: &mut Events<'_, S>,
    hosts: &Hosts<'_>,
    (index, recording): (usize, &Loaded),
    (pid, process): (u32, &Process),
) -> io::Result<()> {
    for (order, (tid, thread)) in (0u64..).zip(&process.threads) {
        let track = hosts.track(recording, pid, *tid);
        let at = |ts_ns| hosts.at(index, ts_ns);
        let name = match describe::printable(&thread.name) {
            name if name.is_empty() => format!("thread {tid}"),
            name => name,
        };
        let rows = [
            (track, name.clone(), true),
            (kernel(track), format!("{name}: kernel"), has_kernel(thread)),
            (guest(track), format!("{name}: KVM_RUN"), has_runs(thread)),
        ];
        for (place, (track, name, _)) in (0u64..).zip(rows).filter(|(_, (.., used))| *used) {
            events.put(&Event::thread("thread_name", track, "name", name))?;
            events.put(&Event::thread(
                "thread_sort_index",
                track,
                "sort_index",
                order * 3 + place,
            ))?;
        }
        for span in &thread.spans {
            let range = (at(span.start_ns), at(span.end_ns));
            let name = describe::span(span);
            events.put(&Event::slice(
                &name,
                category(span.meaning.hop),
                track,
                range,
                span_args(span, recording.lost.meet(span.start_ns, span.end_ns)),
            ))?;
        }
        for point in &thread.points {
            let (name, cat) = (point.name(), category(point.meaning.hop));
            events.put(&Event::instant(
                name,
                cat,
                track,
                at(point.ts_ns),
                named(&point.args),
            ))?;
        }
        kernel_row(events, (recording, thread), track, at)?;
        guest_row(events, (recording, thread), guest(track), at)?;
    }
    Ok(())
}

fn kernel(track: Track) -> Track {
    Track {
        tid: track.tid + KERNEL_ROW,
        ..track
    }
}

fn guest(track: Track) -> Track {
    Track {
        tid: track.tid + GUEST_ROW,
        ..track
    }
}

fn has_kernel(thread: &Thread) -> bool {
    !thread.ioctls.is_empty() || !thread.functions.is_empty()
}

fn has_runs(thread: &Thread) -> bool {
    thread.edges.is_some() || !thread.gaps.is_empty()
}

/// Ioctls and kernel functions. A function lies inside its ioctl; what does not, because a clock
/// or an event went wrong, is cut at the end of what it is in, so that slices nest.
fn kernel_row<S: Sink>(
    events: &mut Events<'_, S>,
    (recording, thread): (&Loaded, &Thread),
    track: Track,
    at: impl Fn(u64) -> i64,
) -> io::Result<()> {
    let ioctls = thread
        .ioctls
        .iter()
        .map(|ioctl| (ioctl.enter_ns, ioctl.exit_ns, Kernel::Ioctl(ioctl)));
    let functions = thread
        .functions
        .iter()
        .map(|one| (one.enter_ns, one.exit_ns, Kernel::Function(one)));
    let mut all: Vec<_> = ioctls.chain(functions).collect();
    all.sort_by_key(|(enter, exit, _)| (*enter, Reverse(*exit)));
    let mut open: Vec<u64> = Vec::new();
    for (enter, exit, what) in all {
        while open.pop_if(|end| *end <= enter).is_some() {}
        let exit = open.last().map_or(exit, |end| exit.min(*end));
        open.push(exit);
        let (name, mut args) = what.describe();
        mark(&mut args, recording.lost.meet(enter, exit));
        events.put(&Event::slice(
            &name,
            "kernel",
            kernel(track),
            (at(enter), at(exit)),
            args,
        ))?;
        let caller = thread.spans_at(enter).next();
        if let (Kernel::Ioctl(_), Some(_), true) = (what, caller, exit > enter) {
            events.arrow(
                &name,
                "ioctl",
                (track, at(enter)),
                (kernel(track), at(enter)),
            )?;
        }
    }
    Ok(())
}

/// A slice of a kernel row.
#[derive(Clone, Copy)]
enum Kernel<'a> {
    Ioctl(&'a Ioctl),
    Function(&'a KernelFn),
}

impl Kernel<'_> {
    fn describe(self) -> (String, Args) {
        let mut args = Args::new();
        let mut say = |key: &str, value: Value| drop(args.insert(key.to_owned(), value));
        let name = match self {
            Self::Ioctl(ioctl) => {
                say("fd", ioctl.fd.into());
                say(
                    "fd_kind",
                    serde_json::to_value(ioctl.fd_kind).unwrap_or_default(),
                );
                say("rc", ioctl.ret.into());
                let name = kvm::ioctl_name(ioctl);
                match ioctl.attr {
                    Some(attr) => {
                        say("group", attr.group.into());
                        say("attr", attr.attr.into());
                        let attr = kvm::attr_name(ioctl.fd_kind, attr);
                        attr.map_or(name.clone(), |attr| format!("{name} {attr}"))
                    }
                    None => name,
                }
            }
            Self::Function(function) => {
                say("rc", function.ret.into());
                for calls in &function.calls {
                    say(&format!("calls of {}", calls.function), calls.count.into());
                }
                function.function.clone()
            }
        };
        (describe::printable(&name), args)
    }
}

/// A vCPU's stays in KVM_RUN: between the gaps, from its first entry to its last exit.
fn guest_row<S: Sink>(
    events: &mut Events<'_, S>,
    (recording, thread): (&Loaded, &Thread),
    track: Track,
    at: impl Fn(u64) -> i64,
) -> io::Result<()> {
    let Some(edges) = thread.edges else {
        return Ok(());
    };
    let mut enter = runs_from(recording, edges);
    // A vCPU that still ran when the recording ended is shown up to its last known entry.
    let end = edges.last_exit_ns.max(edges.last_enter_ns);
    let gaps = thread.gaps.iter().map(|gap| (gap.exit_ns, gap.enter_ns));
    for (exit, next) in gaps.chain([(end, u64::MAX)]) {
        if exit > enter {
            events.put(&Event::slice(
                "KVM_RUN",
                "guest",
                track,
                (at(enter), at(exit)),
                Args::new(),
            ))?;
        }
        enter = enter.max(next);
    }
    Ok(())
}

fn category(hop: u8) -> &'static str {
    match hop {
        0 => "probe",
        1 => "hop 1",
        2 => "hop 2",
        3 => "hop 3",
        4 => "hop 4",
        5 => "hop 5",
        6 => "hop 6",
        7 => "hop 7",
        _ => "after the stop",
    }
}

fn span_args(span: &Span, lossy: bool) -> Args {
    let mut args = named(&span.begin);
    mark(&mut args, lossy);
    match &span.end {
        Some(end) => args.extend(named(end)),
        None => drop(args.insert("unfinished".to_owned(), true.into())),
    }
    if let Some(rc) = span.rc().filter(|rc| *rc < 0) {
        args.insert("errno".to_owned(), describe::errno(rc).into());
    }
    args
}

/// Says of a slice that events were lost while it was open.
fn mark(args: &mut Args, lossy: bool) {
    if lossy {
        args.insert("lossy".to_owned(), true.into());
    }
}

fn named(args: &spans::Args) -> Args {
    args.iter()
        .map(|(name, value)| {
            let value = match value {
                Arg::U64(value) => (*value).into(),
                Arg::I64(value) => (*value).into(),
                Arg::Str(value) => value.as_str().into(),
                Arg::Unreadable => Value::Null,
            };
            (name.to_owned(), value)
        })
        .collect()
}
