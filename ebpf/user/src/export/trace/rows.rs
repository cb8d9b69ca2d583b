//! A recording's processes and threads as rows of slices.

use std::cmp::Reverse;
use std::collections::HashMap;
use std::io;
use std::ptr;

use serde_json::Value;

use super::event::{Args, Event, Track};
use super::hosts::{Hosts, runs_from};
use super::{Events, GUEST_ROW, KERNEL_ROW, Sink};
use crate::analysis::spans;
use crate::analysis::{Loaded, Migration, Part, Process, Span, Thread, describe, kvm};
use crate::recording::{Ioctl, KernelFn, Value as Arg, VcpuEdges, VcpuGap};

/// Slices within more others than this are left out, as Perfetto does: a damaged recording has them.
const DEEPEST: usize = 512;

/// Writes the rows of recording `index`, part by part: the first one has all their names.
pub(super) fn write<S: Sink>(
    events: &mut Events<'_, S>,
    hosts: &Hosts<'_>,
    index: usize,
    recording: &Loaded,
    migrations: &[Migration<'_>],
) -> io::Result<()> {
    let mut rows = Rows {
        events,
        hosts,
        index,
        recording,
        is_last: false,
        written: HashMap::new(),
    };
    // The source stands above the destination, and what took part above what did not.
    let mut places = HashMap::new();
    for (place, party) in (0..).zip(migrations.iter().flat_map(Migration::parties)) {
        if ptr::eq(party.recording, recording) {
            places.entry(party.pid).or_insert(place);
        }
    }
    let mut is_first = true;
    recording.parts(|part| {
        rows.is_last = part.is_last;
        if is_first || part.is_last {
            rows.all(part, is_first.then_some(&places))?;
        } else {
            rows.some(part)?;
        }
        is_first = false;
        Ok(())
    })
}

/// A recording's rows, as they are written.
struct Rows<'w, 's, 'h, S> {
    events: &'w mut Events<'s, S>,
    hosts: &'w Hosts<'h>,
    index: usize,
    recording: &'w Loaded,
    /// Whether this is the last part.
    is_last: bool,
    /// Where the parts before ended, by thread.
    written: HashMap<(u32, u32), Written>,
}

/// Where a thread's rows end by now.
#[derive(Default)]
struct Written {
    /// The ends of the open slices of its kernel's row, and the begin of the last one, ns.
    open: Vec<u64>,
    entered_ns: u64,
    /// Since when it is in KVM_RUN, ns.
    runs_ns: Option<u64>,
}

impl<S: Sink> Rows<'_, '_, '_, S> {
    /// A part of the processes that did something.
    fn some(&mut self, part: &Part<'_>) -> io::Result<()> {
        for (pid, process) in part.processes {
            for (tid, thread) in &process.threads {
                self.thread((*pid, *tid), thread)?;
            }
        }
        Ok(())
    }

    /// The same of all processes, and their names if they have `places`.
    fn all(&mut self, part: &Part<'_>, places: Option<&HashMap<u32, u64>>) -> io::Result<()> {
        let nothing = Thread::default();
        for (pid, process) in &self.recording.processes {
            if let Some(places) = places {
                self.name_process(*pid, process, places)?;
            }
            let did = part.processes.get(pid);
            for (order, (tid, thread)) in (0..).zip(&process.threads) {
                if places.is_some() {
                    self.name_thread((*pid, *tid), thread, order)?;
                }
                let did = did.and_then(|process| process.threads.get(tid));
                self.thread((*pid, *tid), did.unwrap_or(&nothing))?;
            }
        }
        Ok(())
    }

    fn name_process(
        &mut self,
        pid: u32,
        process: &Process,
        places: &HashMap<u32, u64>,
    ) -> io::Result<()> {
        let recording = self.recording;
        let group = self.hosts.pid(recording, pid);
        let name = format!("{} on {}", process.comm, recording.header.hostname);
        self.events.put(&Event::process(
            "process_name",
            group,
            "name",
            describe::printable(&name),
        ))?;
        let place = places.get(&pid).copied().unwrap_or(u64::from(u32::MAX));
        self.events.put(&Event::process(
            "process_sort_index",
            group,
            "sort_index",
            place,
        ))
    }

    fn name_thread(
        &mut self,
        (pid, tid): (u32, u32),
        thread: &Thread,
        order: u64,
    ) -> io::Result<()> {
        let track = self.hosts.track(self.recording, pid, tid);
        let name = match describe::printable(&thread.name) {
            name if name.is_empty() => format!("thread {tid}"),
            name => name,
        };
        let rows = [
            (track, name.clone(), true),
            (kernel(track), format!("{name}: kernel"), thread.has_kernel),
            (
                guest(track),
                format!("{name}: KVM_RUN"),
                thread.edges.is_some(),
            ),
        ];
        for (place, (track, name, _)) in (0u64..).zip(rows).filter(|(_, (.., used))| *used) {
            self.events
                .put(&Event::thread("thread_name", track, "name", name))?;
            self.events.put(&Event::thread(
                "thread_sort_index",
                track,
                "sort_index",
                order * 3 + place,
            ))?;
        }
        Ok(())
    }

    /// What a thread did next.
    fn thread(&mut self, (pid, tid): (u32, u32), thread: &Thread) -> io::Result<()> {
        let track = self.hosts.track(self.recording, pid, tid);
        let lost = &self.recording.lost;
        for span in thread.spans.iter().filter(|span| !span.open) {
            let range = (self.at(span.start_ns), self.at(span.end_ns));
            let name = describe::span(span);
            self.events.put(&Event::slice(
                &name,
                category(span.meaning.hop),
                track,
                range,
                span_args(span, lost.meet(span.start_ns, span.end_ns)),
            ))?;
        }
        for point in &thread.points {
            let (name, cat) = (point.name(), category(point.meaning.hop));
            let at = self.at(point.ts_ns);
            self.events
                .put(&Event::instant(name, cat, track, at, named(&point.args)))?;
        }
        let mut written = self.written.remove(&(pid, tid)).unwrap_or_default();
        self.kernel_row(thread, track, &mut written)?;
        let process = self.recording.processes.get(&pid);
        let edges = process.and_then(|process| process.threads.get(&tid)?.edges);
        if let Some(edges) = edges {
            self.guest_row(edges, &thread.gaps, guest(track), &mut written)?;
        }
        if !self.is_last {
            self.written.insert((pid, tid), written);
        }
        Ok(())
    }

    /// Where a time lies in the trace, ns.
    fn at(&self, ts_ns: u64) -> i64 {
        self.hosts.at(self.index, ts_ns)
    }

    /// Ioctls and kernel functions, with arrows from the spans that made them.
    fn kernel_row(
        &mut self,
        thread: &Thread,
        track: Track,
        written: &mut Written,
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
        for (enter, exit, what) in all {
            let Some(exit) = written.nest(enter, exit) else {
                continue;
            };
            let (name, mut args) = what.describe();
            mark(&mut args, self.recording.lost.meet(enter, exit));
            let (at, until) = (self.at(enter), self.at(exit));
            self.events.put(&Event::slice(
                &name,
                "kernel",
                kernel(track),
                (at, until),
                args,
            ))?;
            let caller = thread.spans_at(enter).next();
            if let (Kernel::Ioctl(_), Some(_), true) = (what, caller, exit > enter) {
                self.events
                    .arrow(&name, "ioctl", (track, at), (kernel(track), at))?;
            }
        }
        Ok(())
    }

    /// A vCPU's stays in KVM_RUN: between the gaps, from its first entry to its last exit.
    fn guest_row(
        &mut self,
        edges: VcpuEdges,
        gaps: &[VcpuGap],
        track: Track,
        written: &mut Written,
    ) -> io::Result<()> {
        let mut enter = written
            .runs_ns
            .unwrap_or_else(|| runs_from(self.recording, edges));
        // A vCPU that still ran when the recording ended is shown up to its last known entry.
        let end = edges.last_exit_ns.max(edges.last_enter_ns);
        let end = self.is_last.then_some((end, u64::MAX));
        let gaps = gaps.iter().map(|gap| (gap.exit_ns, gap.enter_ns));
        for (exit, next) in gaps.chain(end) {
            if exit > enter {
                let range = (self.at(enter), self.at(exit));
                self.events
                    .put(&Event::slice("KVM_RUN", "guest", track, range, Args::new()))?;
            }
            enter = enter.max(next);
        }
        written.runs_ns = Some(enter);
        Ok(())
    }
}

impl Written {
    /// Where a slice of the kernel's row ends. A function lies inside its ioctl; what does not,
    /// because a clock or an event went wrong, is cut at the end of what it is in, so that slices
    /// nest. `None` for one that is too deep.
    fn nest(&mut self, enter: u64, exit: u64) -> Option<u64> {
        // It took longer than a part: what is inside it was written before.
        if enter < self.entered_ns {
            return Some(exit);
        }
        self.entered_ns = enter;
        while self.open.pop_if(|end| *end <= enter).is_some() {}
        let exit = self.open.last().map_or(exit, |end| exit.min(*end));
        if self.open.len() >= DEEPEST {
            return None;
        }
        self.open.push(exit);
        Some(exit)
    }
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
