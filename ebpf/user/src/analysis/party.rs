//! One process's part in one migration, on the migration's own time axis: 0 is its start, on the
//! source's clock.

use super::load::{Loaded, Process, Thread};
use super::spans::{Point, Problem, Span};
use crate::recording::{Ioctl, KernelFn, VcpuGap};

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
    /// What process `pid` of `recording` did between `from` and `to` on the axis.
    pub fn new(
        side: Side,
        recording: &'a Loaded,
        (pid, process): (u32, &'a Process),
        place: Place,
        window: (i64, i64),
    ) -> Self {
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
        let mut threads: Vec<_> = process
            .threads
            .iter()
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

    fn thread_spans(
        &self,
        tid: u32,
        thread: &'a Thread,
        (from, to): (i64, i64),
    ) -> Vec<Placed<'a, Span>> {
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

    fn take(&mut self, tid: u32, thread: &'a Thread, (from, to): (i64, i64)) {
        let place = self.place;
        let range = |start: u64, end: u64| (place.at(start), place.at(end));
        let (points, ioctls, functions) = (&thread.points, &thread.ioctls, &thread.functions);
        let placed = |point: &'a Point| Placed::new(tid, range(point.ts_ns, point.ts_ns), point);
        self.points.extend(
            since(points, from, |point| place.at(point.ts_ns))
                .map(placed)
                .take_while(|point| point.start_ns <= to),
        );
        let placed =
            |ioctl: &'a Ioctl| Placed::new(tid, range(ioctl.enter_ns, ioctl.exit_ns), ioctl);
        self.ioctls.extend(
            since(ioctls, from, |ioctl| place.at(ioctl.exit_ns))
                .map(placed)
                .take_while(|ioctl| ioctl.start_ns <= to),
        );
        let placed = |one: &'a KernelFn| Placed::new(tid, range(one.enter_ns, one.exit_ns), one);
        self.functions.extend(
            since(functions, from, |one| place.at(one.exit_ns))
                .map(placed)
                .take_while(|one| one.start_ns <= to),
        );
        let problems = since(&thread.problems, from, |problem| place.at(problem.ts_ns()));
        self.problems
            .extend(problems.take_while(|problem| place.at(problem.ts_ns()) <= to));
        self.vcpus.extend(self.vcpu(tid, thread, (from, to)));
    }

    /// The thread's part as a vCPU; `None` if it is none.
    fn vcpu(&self, tid: u32, thread: &Thread, (from, to): (i64, i64)) -> Option<Vcpu> {
        let mut vcpu = Vcpu {
            tid,
            ..Vcpu::default()
        };
        let points = since(&thread.points, from, |point| self.place.at(point.ts_ns));
        for point in points {
            let at = self.place.at(point.ts_ns);
            if at > to.saturating_add(AFTERWARDS_NS) {
                break;
            }
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
            vcpu.first_enter = first_ns.map(|first| self.place.at(first));
            let stopped = edges.last_exit_ns > edges.last_enter_ns;
            vcpu.last_exit = stopped.then(|| self.place.at(edges.last_exit_ns));
        }
        let gap = |gap: &VcpuGap| (self.place.at(gap.exit_ns), self.place.at(gap.enter_ns));
        let gaps = since(&thread.gaps, from, |gap| self.place.at(gap.enter_ns));
        vcpu.left = thread
            .guest
            .iter()
            .filter_map(|guest| guest.left_ns)
            .map(|ns| self.place.at(ns))
            .collect();
        vcpu.entered = thread
            .guest
            .iter()
            .filter_map(|guest| guest.entered_ns)
            .map(|ns| self.place.at(ns))
            .collect();
        vcpu.gaps = gaps.map(gap).take_while(|(exit, _)| *exit <= to).collect();
        vcpu.index = vcpu
            .index
            .or(thread.gaps.iter().find_map(|gap| gap.vcpu.map(u64::from)));
        Some(vcpu)
    }
}

/// What of `events` ends at or after `from`. Those of one thread follow each other, or are inside
/// each other, so their ends are in order but for a few; a damaged recording shows too little.
fn since<T>(events: &[T], from: i64, end: impl Fn(&T) -> i64) -> impl Iterator<Item = &T> {
    let begin = events.partition_point(|event| end(event) < from);
    events.get(begin..).unwrap_or_default().iter()
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
