//! One process's part in one migration, on the migration's own time axis: 0 is its start, on the
//! source's clock.

use super::load::Loaded;
use super::spans::{Point, Problem, Span};
use super::thread::{Process, Thread};
use crate::recording::{Ioctl, KernelFn};

/// Which end of a migration.
#[derive(
    Clone,
    Copy,
    Debug,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    Hash,
    serde::Serialize,
    serde::Deserialize,
    schemars::JsonSchema,
)]
#[serde(rename_all = "lowercase")]
pub enum Side {
    /// Where the guest came from.
    Source,
    /// Where it went.
    Destination,
    /// Between the two: a message that was under way.
    Wire,
}

impl std::fmt::Display for Side {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Source => "source",
            Self::Destination => "destination",
            Self::Wire => "wire",
        })
    }
}

/// Turns a host's clock into time on a migration's axis.
#[derive(Clone, Copy, Debug, Default)]
pub struct Place {
    /// The axis' zero, on the source's clock, ns.
    pub origin_ns: i64,
    /// What this host's clock shows more than the source's, ns.
    pub offset_ns: i64,
}

impl Place {
    /// Where `ts_ns` lies, ns. Saturates: a hostile time is far away, not an overflow.
    pub fn at(self, ts_ns: u64) -> i64 {
        i64::try_from(ts_ns)
            .unwrap_or(i64::MAX)
            .saturating_sub(self.offset_ns)
            .saturating_sub(self.origin_ns)
    }

    /// The host's own time of `ns`, ns.
    pub fn back(self, ns: i64) -> u64 {
        let local = ns
            .saturating_add(self.origin_ns)
            .saturating_add(self.offset_ns);
        u64::try_from(local).unwrap_or(0)
    }
}

/// Something that took time on a thread, placed on the axis.
#[derive(Debug)]
pub struct Placed<'a, T> {
    /// The thread.
    pub tid: u32,
    /// Its begin, ns.
    pub start_ns: i64,
    /// Its end, ns; the same for a moment.
    pub end_ns: i64,
    /// What it is.
    pub what: &'a T,
}

impl<T> Clone for Placed<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Placed<'_, T> {}

impl<'a, T> Placed<'a, T> {
    /// `what`, on the thread `tid` in the range from start to end.
    pub fn new(tid: u32, (start_ns, end_ns): (i64, i64), what: &'a T) -> Self {
        Self {
            tid,
            start_ns,
            end_ns,
            what,
        }
    }

    /// How long it took, ns.
    pub fn duration_ns(&self) -> u64 {
        u64::try_from(self.end_ns.saturating_sub(self.start_ns)).unwrap_or(0)
    }

    /// Whether `other` is on the same thread and within it.
    pub fn holds<U>(&self, other: &Placed<'_, U>) -> bool {
        self.tid == other.tid && self.start_ns <= other.start_ns && other.end_ns <= self.end_ns
    }
}

/// How long after a migration's last span a vCPU's run still belongs to it: the threads that close
/// the spans and those that run the guest are not the same, and a host may be busy. 1 s, in ns.
const AFTERWARDS_NS: i64 = 1_000_000_000;

/// What of a process's time belongs to a migration, on its axis, ns.
#[derive(Clone, Copy, Debug)]
pub struct Window {
    /// From here on.
    pub from_ns: i64,
    /// Up to here.
    pub to_ns: i64,
    /// Whatever comes, after this it belongs to the process's next migration.
    pub next_ns: i64,
}

/// Looked at before what is in a window, for what reaches into it: a thread's events follow each
/// other, or are inside each other, so more than this are those of a damaged recording.
const BEFORE: usize = 64;

/// A vCPU's runs near the migration, as far as they were seen. All lists are in order.
#[derive(Clone, Debug, Default)]
pub struct Vcpu {
    /// Its thread.
    pub tid: u32,
    /// Its index, where the kernel or a probe told it.
    pub index: Option<u64>,
    /// `vcpu_paused`, ns.
    pub paused: Vec<i64>,
    /// `vcpu_first_run`, ns.
    pub first_runs: Vec<i64>,
    /// Entry of its thread's very first KVM_RUN, ns.
    pub first_enter: Option<i64>,
    /// Exit of its last KVM_RUN, if it has not run since, ns.
    pub last_exit: Option<i64>,
    /// Stays outside of KVM_RUN, from exit to entry, ns.
    pub gaps: Vec<(i64, i64)>,
    /// Where it left guest code before it stayed out, ns; empty where the kernel does not tell.
    pub left: Vec<i64>,
    /// Where it entered guest code after it came back or started, ns.
    pub entered: Vec<i64>,
}

/// One process's part in one migration.
#[derive(Debug)]
pub struct Party<'a> {
    /// Which end it is.
    pub side: Side,
    /// The recording it is from.
    pub recording: &'a Loaded,
    /// Its pid.
    pub pid: u32,
    /// The process.
    pub process: &'a Process,
    /// How its clock maps to the axis.
    pub place: Place,
    /// Its spans that overlap the migration: by thread, on each a parent before its children.
    pub spans: Vec<Placed<'a, Span>>,
    /// Its moments, in order.
    pub points: Vec<Placed<'a, Point>>,
    /// Its KVM ioctls, in order.
    pub ioctls: Vec<Placed<'a, Ioctl>>,
    /// Its kernel functions, in order.
    pub functions: Vec<Placed<'a, KernelFn>>,
    /// Its vCPUs.
    pub vcpus: Vec<Vcpu>,
    /// Where its probes do not pair.
    pub problems: Vec<&'a Problem>,
}

impl<'a> Party<'a> {
    /// What process `pid` of `recording` did in `window`.
    pub fn new(
        side: Side,
        recording: &'a Loaded,
        (pid, process): (u32, &'a Process),
        place: Place,
        window: Window,
    ) -> Self {
        let window = Window {
            to_ns: window.to_ns.min(window.next_ns),
            ..window
        };
        let mut party = Self {
            side,
            recording,
            pid,
            process,
            place,
            spans: Vec::new(),
            points: Vec::new(),
            ioctls: Vec::new(),
            functions: Vec::new(),
            vcpus: Vec::new(),
            problems: Vec::new(),
        };
        let afterwards = window.to_ns.saturating_add(AFTERWARDS_NS);
        let times = (place.back(window.from_ns), place.back(afterwards));
        // A vCPU may have stopped before, or start later.
        let takes_part = |thread: &Thread| {
            let inside = |(first, last)| first <= times.1 && times.0 <= last;
            thread.edges.is_some() || thread.seen.is_some_and(inside)
        };
        let mut threads: Vec<_> = process
            .threads
            .iter()
            .filter(|(_, thread)| takes_part(thread))
            .map(|(tid, thread)| (party.thread_spans(*tid, thread, window), *tid, thread))
            .collect();
        // The thread that acted first comes first: that is the call order of a reader.
        threads.sort_by_key(|(spans, tid, _)| (spans.first().map(|span| span.start_ns), *tid));
        for (spans, tid, thread) in threads {
            party.spans.extend(spans);
            party.take(tid, thread, window);
        }
        party.points.sort_by_key(|point| point.start_ns);
        party.ioctls.sort_by_key(|ioctl| ioctl.start_ns);
        party.functions.sort_by_key(|function| function.start_ns);
        party.vcpus.sort_by_key(|vcpu| (vcpu.index, vcpu.tid));
        party
    }

    /// Its spans of that name.
    pub fn spans_of(&self, name: &str) -> impl Iterator<Item = &Placed<'a, Span>> {
        self.spans
            .iter()
            .filter(move |span| span.what.name() == name)
    }

    /// Its moments of that name.
    pub fn points_of(&self, name: &str) -> impl Iterator<Item = &Placed<'a, Point>> {
        self.points
            .iter()
            .filter(move |point| point.what.name() == name)
    }

    /// Whether events were lost between the two times of its own clock, so that what ran then may
    /// lack a part.
    pub fn lost_during(&self, start_ns: u64, end_ns: u64) -> bool {
        self.recording.lost.meet(start_ns, end_ns)
    }

    fn thread_spans(&self, tid: u32, thread: &'a Thread, window: Window) -> Vec<Placed<'a, Span>> {
        let (from, to) = (window.from_ns, window.to_ns);
        let spans = &thread.spans;
        let placed = |span: &'a Span| Placed {
            tid,
            start_ns: self.place.at(span.start_ns),
            end_ns: self.place.at(span.end_ns),
            what: span,
        };
        let begin = spans.partition_point(|span| self.place.at(span.start_ns) < from);
        let end = spans.partition_point(|span| self.place.at(span.start_ns) <= to);
        // What began before the window and reaches into it is around the last span before it.
        let mut before = Vec::new();
        let mut next = begin.checked_sub(1);
        while let Some(span) = next.and_then(|index| spans.get(index)) {
            if self.place.at(span.end_ns) >= from {
                before.push(placed(span));
            }
            next = span.parent;
        }
        before.reverse();
        before.extend(spans.get(begin..end).unwrap_or_default().iter().map(placed));
        before.retain(|span| !is_other_command(span.what));
        before
    }

    fn take(&mut self, tid: u32, thread: &'a Thread, window: Window) {
        let place = self.place;
        let range = |start: u64, end: u64| (place.at(start), place.at(end));
        let inside = (window.from_ns, window.to_ns);
        let points = reaching(&thread.points, inside, |one| range(one.ts_ns, one.ts_ns));
        self.points
            .extend(points.map(|(range, point)| Placed::new(tid, range, point)));
        let ioctls = reaching(&thread.ioctls, inside, |one| {
            range(one.enter_ns, one.exit_ns)
        });
        self.ioctls
            .extend(ioctls.map(|(range, ioctl)| Placed::new(tid, range, ioctl)));
        let functions = reaching(&thread.functions, inside, |one| {
            range(one.enter_ns, one.exit_ns)
        });
        self.functions
            .extend(functions.map(|(range, one)| Placed::new(tid, range, one)));
        let problems = reaching(&thread.problems, inside, |one| {
            range(one.ts_ns(), one.ts_ns())
        });
        self.problems.extend(problems.map(|(_, problem)| problem));
        self.vcpus.extend(self.vcpu(tid, thread, window));
    }

    /// The thread's part as a vCPU; `None` if it is none.
    fn vcpu(&self, tid: u32, thread: &Thread, window: Window) -> Option<Vcpu> {
        let place = self.place;
        let mut vcpu = Vcpu {
            tid,
            ..Vcpu::default()
        };
        let afterwards = window.to_ns.saturating_add(AFTERWARDS_NS);
        let afterwards = (window.from_ns, afterwards.min(window.next_ns));
        let points = reaching(&thread.points, afterwards, |point| {
            (place.at(point.ts_ns), place.at(point.ts_ns))
        });
        for ((at, _), point) in points {
            let list = match point.name() {
                "vcpu_paused" => &mut vcpu.paused,
                "vcpu_first_run" => &mut vcpu.first_runs,
                _ => continue,
            };
            list.push(at);
            vcpu.index = vcpu.index.or(point.args.u64("i"));
        }
        let seen = !vcpu.paused.is_empty() || !vcpu.first_runs.is_empty();
        if !seen && thread.edges.is_none() && thread.gaps.is_empty() {
            return None;
        }
        if let Some(edges) = &thread.edges {
            vcpu.index = edges.vcpu.map(u64::from).or(vcpu.index);
            let first_ns = Some(edges.first_enter_ns).filter(|first| *first != 0);
            vcpu.first_enter = first_ns.map(|first| place.at(first));
            let stopped = edges.last_exit_ns > edges.last_enter_ns;
            vcpu.last_exit = stopped.then(|| place.at(edges.last_exit_ns));
        }
        let gaps = reaching(&thread.gaps, (window.from_ns, window.to_ns), |gap| {
            (place.at(gap.exit_ns), place.at(gap.enter_ns))
        });
        vcpu.gaps = gaps.map(|(range, _)| range).collect();
        vcpu.left = around(&thread.left, window, place);
        vcpu.entered = around(&thread.entered, window, place);
        vcpu.index = vcpu.index.or_else(|| {
            thread
                .gaps
                .iter()
                .take(BEFORE)
                .find_map(|gap| gap.vcpu.map(u64::from))
        });
        Some(vcpu)
    }
}

/// What of `events`, which are in order, reaches into the time from `from` to `to`, with where each
/// one lies.
fn reaching<T>(
    events: &[T],
    (from, to): (i64, i64),
    range: impl Fn(&T) -> (i64, i64),
) -> impl Iterator<Item = ((i64, i64), &T)> {
    let inside = events.partition_point(|event| range(event).0 < from);
    let first = inside.saturating_sub(BEFORE);
    let rest = events.get(first..).unwrap_or_default().iter();
    rest.map(move |event| (range(event), event))
        .take_while(move |((start, _), _)| *start <= to)
        .filter(move |((_, end), _)| *end >= from)
}

/// The times in `window`, and some on either side: those next to it are what counts where none are
/// in it.
fn around(times: &[u64], window: Window, place: Place) -> Vec<i64> {
    let first = times.partition_point(|ns| place.at(*ns) < window.from_ns);
    let last = times.partition_point(|ns| place.at(*ns) <= window.to_ns);
    let range = first.saturating_sub(BEFORE)..last.saturating_add(BEFORE).min(times.len());
    let times = times.get(range).unwrap_or_default().iter();
    times.map(|ns| place.at(*ns)).collect()
}

/// A QMP command that has nothing to do with the migration and did nothing that was seen, such as
/// a client's `query-migrate`.
fn is_other_command(span: &Span) -> bool {
    span.leaf
        && span.name() == "qmp_command"
        && span
            .begin
            .str("name")
            .is_some_and(|name| !name.starts_with("migrate"))
}
