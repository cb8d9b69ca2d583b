//! The processes of a recording, and what their threads did.

use std::collections::BTreeMap;
use std::iter::successors;

use super::spans::{Paired, Point, Problem, Span};
use crate::recording::{Ioctl, KernelFn, VcpuEdges, VcpuGap};

/// A process of a recording.
#[derive(Debug, Default)]
pub struct Process {
    /// Its name; empty when the recording does not say.
    pub comm: String,
    /// Its executable.
    pub exe: String,
    /// The threads that did something, by tid.
    pub threads: BTreeMap<u32, Thread>,
}

/// What a thread did, each list in order of time.
#[derive(Debug, Default)]
pub struct Thread {
    /// Its name; empty when the recording does not say.
    pub name: String,
    /// Its spans: a parent before its children.
    pub spans: Vec<Span>,
    /// Its moments.
    pub points: Vec<Point>,
    /// Where its probes do not pair.
    pub problems: Vec<Problem>,
    /// Whether the kernel was seen to do something for it.
    pub has_kernel: bool,
    /// Its KVM ioctls.
    pub ioctls: Vec<Ioctl>,
    /// Kernel functions it was seen in.
    pub functions: Vec<KernelFn>,
    /// The bounds of its KVM_RUN calls, if it is a vCPU.
    pub edges: Option<VcpuEdges>,
    /// Where it stayed out of KVM_RUN.
    pub gaps: Vec<VcpuGap>,
    /// When it left guest code before it stayed out, where the kernel tells.
    pub left: Vec<u64>,
    /// When it entered guest code after that, or first.
    pub entered: Vec<u64>,
    /// The first and the last time at which it did something, but for [`Thread::edges`].
    pub(super) seen: Option<(u64, u64)>,
}

impl Thread {
    /// The same, with what its probes say.
    pub(super) fn with(self, paired: Paired) -> Self {
        Self {
            spans: paired.spans,
            points: paired.points,
            problems: paired.problems,
            ..self
        }
    }

    pub(super) fn first_and_last(&self) -> Option<(u64, u64)> {
        let spans = self.spans.iter().map(|one| (one.start_ns, one.end_ns));
        let points = self.points.iter().map(|one| (one.ts_ns, one.ts_ns));
        let problems = self.problems.iter().map(|one| (one.ts_ns(), one.ts_ns()));
        let ioctls = self.ioctls.iter().map(|one| (one.enter_ns, one.exit_ns));
        let functions = self.functions.iter();
        let functions = functions.map(|one| (one.enter_ns, one.exit_ns));
        let gaps = self.gaps.iter().map(|one| (one.exit_ns, one.enter_ns));
        let all = spans.chain(points).chain(problems).chain(ioctls);
        let all = all.chain(functions).chain(gaps);
        all.reduce(|(first, last), (start, end)| (first.min(start), last.max(end)))
    }

    /// Its ioctls that lie between the two times, in order.
    pub(super) fn ioctls_within(&self, from_ns: u64, to_ns: u64) -> impl Iterator<Item = &Ioctl> {
        within(&self.ioctls, (from_ns, to_ns), |one| {
            (one.enter_ns, one.exit_ns)
        })
    }

    /// Its kernel functions that do.
    pub(super) fn functions_within(
        &self,
        from_ns: u64,
        to_ns: u64,
    ) -> impl Iterator<Item = &KernelFn> {
        within(&self.functions, (from_ns, to_ns), |one| {
            (one.enter_ns, one.exit_ns)
        })
    }

    /// The spans that are open at `ts_ns`, the innermost first.
    pub fn spans_at(&self, ts_ns: u64) -> impl Iterator<Item = &Span> {
        self.spans_before(ts_ns)
            .filter(move |span| ts_ns < span.end_ns)
    }

    /// The last span that began by `ts_ns`, and those around it, the innermost first. All that are
    /// open at `ts_ns` are among them, since spans nest.
    pub fn spans_before(&self, ts_ns: u64) -> impl Iterator<Item = &Span> {
        let spans = &self.spans;
        let last = spans
            .partition_point(|span| span.start_ns <= ts_ns)
            .checked_sub(1);
        let around = move |span: &&'_ Span| spans.get(span.parent?);
        successors(last.and_then(|index| spans.get(index)), around)
    }
}

/// What of `all`, which is in the order of its begins, lies between the two times.
fn within<T>(
    all: &[T],
    (from_ns, to_ns): (u64, u64),
    range: impl Fn(&T) -> (u64, u64),
) -> impl Iterator<Item = &T> {
    let first = all.partition_point(|one| range(one).0 < from_ns);
    let since = all.get(first..).unwrap_or_default().iter();
    let since = since.map(move |one| (range(one), one));
    let begun = since.take_while(move |((start_ns, _), _)| *start_ns <= to_ns);
    begun.filter_map(move |((_, end_ns), one)| (end_ns <= to_ns).then_some(one))
}
