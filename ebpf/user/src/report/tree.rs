//! One side's spans as lines of a tree, in call order.

use std::collections::HashMap;

use blackout_abi::Nature;

use crate::analysis::downtime::Bounds;
use crate::analysis::{Party, Placed, Span, describe, its};
use crate::recording::{Ioctl, Value};

/// More equal spans in a row than this become one line.
const ALIKE: usize = 3;

/// One line.
#[derive(Clone, Debug)]
pub(super) struct Row {
    /// How far it is indented.
    pub(super) depth: usize,
    /// What it stands for.
    pub(super) text: String,
    /// How long it took, ns.
    pub(super) took_ns: u64,
    /// How much of the downtime that was, from 0 to 1; `None` outside of it.
    pub(super) share: Option<f64>,
    /// Where in the downtime it was: begin and end, from 0 to 1.
    pub(super) place: Option<(f64, f64)>,
    /// An errno's name, or why there is no result; `None` if all is well.
    pub(super) failure: Option<String>,
    /// How it is to be read.
    pub(super) tone: Tone,
    /// Whether events were lost meanwhile, so that it may lack a part.
    pub(super) lossy: bool,
}

/// How a line is to be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Tone {
    /// A span.
    Work,
    /// A span that waits for the other side.
    Wait,
    /// What the kernel did for the span above.
    Kernel,
    /// It failed, or its end was not seen.
    Bad,
}

/// The lines of `party`. The share is of the downtime `bounds`.
pub(super) fn rows(party: &Party<'_>, bounds: Option<Bounds>) -> Vec<Row> {
    let kernel = kernel_views(party);
    let mut rows = Vec::new();
    let mut index = 0;
    while let Some(rest) = party.spans.get(index..).filter(|rest| !rest.is_empty()) {
        let alike = alike(rest);
        let run = rest.get(..alike).unwrap_or_default();
        rows.extend(span_row(party, run, bounds));
        let ioctls: Vec<_> = (index..index + alike)
            .filter_map(|index| kernel.get(&index))
            .flatten()
            .copied()
            .collect();
        let depth = run.first().map_or(0, |span| span.what.depth + 1);
        rows.extend(kernel_row(party, &ioctls, depth, bounds));
        index += alike;
    }
    rows
}

/// The lines of a party without probes: what KVM did for it during the downtime `bounds`, in order.
pub(super) fn ioctl_rows(party: &Party<'_>, bounds: Option<Bounds>) -> Vec<Row> {
    let runs = runs(party, bounds, |_| true);
    runs.iter()
        .filter_map(|run| kernel_row(party, run, 0, bounds))
        .collect()
}

/// The ioctls of the threads that are wanted, in the downtime `bounds`; equal ones in a row, between
/// which no span begins or ends, are one run.
fn runs<'a>(
    party: &Party<'a>,
    bounds: Option<Bounds>,
    wanted: impl Fn(u32) -> bool,
) -> Vec<Vec<Placed<'a, Ioctl>>> {
    let inside = |ioctl: &&Placed<'_, Ioctl>| {
        let overlaps =
            |bounds: Bounds| ioctl.start_ns < bounds.end_ns && ioctl.end_ns > bounds.start_ns;
        wanted(ioctl.tid) && bounds.is_some_and(overlaps)
    };
    let ioctls: Vec<_> = party.ioctls.iter().filter(inside).copied().collect();
    // What has begun and ended by then on its thread.
    let edges = |ioctl: &Placed<'_, Ioctl>| {
        let spans = party.spans.iter().filter(|span| span.tid == ioctl.tid);
        let all = spans.flat_map(|span| [span.start_ns, span.end_ns]);
        all.filter(|edge_ns| *edge_ns <= ioctl.start_ns).count()
    };
    let same = |one: &Placed<'_, Ioctl>, next: &Placed<'_, Ioctl>| {
        one.tid == next.tid
            && one.what.ret == next.what.ret
            && describe::ioctl(one.what) == describe::ioctl(next.what)
            && edges(one) == edges(next)
    };
    ioctls.chunk_by(same).map(<[_]>::to_vec).collect()
}

/// The lines of a party with probes that are not ours: by thread its spans that reach into the
/// downtime `bounds`, and in them, or between them, what KVM did for it.
pub(super) fn foreign_rows(party: &Party<'_>, bounds: Option<Bounds>) -> Vec<Row> {
    let mut tids: Vec<_> = party.spans.iter().map(|span| span.tid).collect();
    tids.dedup();
    let mut rows = Vec::new();
    for tid in &tids {
        let spans = party.spans.iter().filter(|span| span.tid == *tid);
        let spans = spans.filter(|span| share(&[**span], bounds).is_some());
        let mut spans = spans.peekable();
        // Where the spans end that are open.
        let mut open: Vec<i64> = Vec::new();
        for run in runs(party, bounds, |one| one == *tid) {
            let Some(first) = run.first() else { continue };
            while let Some(span) = spans.next_if(|span| span.start_ns <= first.start_ns) {
                open.retain(|end_ns| *end_ns > span.start_ns);
                rows.extend(span_row(party, &[*span], bounds));
                open.push(span.end_ns);
            }
            open.retain(|end_ns| *end_ns > first.start_ns);
            rows.extend(kernel_row(party, &run, open.len(), bounds));
        }
        rows.extend(spans.filter_map(|span| span_row(party, &[*span], bounds)));
    }
    let others = runs(party, bounds, |one| !tids.contains(&one));
    rows.extend(
        others
            .iter()
            .filter_map(|run| kernel_row(party, run, 0, bounds)),
    );
    rows
}

/// How many spans at the head of `rest` go on one line.
fn alike(rest: &[Placed<'_, Span>]) -> usize {
    let Some(first) = rest.first() else { return 0 };
    let plain = |span: &Placed<'_, Span>| {
        let named = span
            .what
            .begin
            .iter()
            .any(|(_, value)| matches!(value, Value::Str(_)));
        span.what.leaf
            && !named
            && span.what.rc().is_none_or(|rc| rc >= 0)
            && span.what.end.is_some()
    };
    let same = |span: &&Placed<'_, Span>| {
        let equal = span.tid == first.tid && span.what.parent == first.what.parent;
        equal && span.what.name() == first.what.name() && plain(span)
    };
    match rest.iter().take_while(same).count() {
        count if count > ALIKE => count,
        _ => 1,
    }
}

fn span_row(party: &Party<'_>, run: &[Placed<'_, Span>], bounds: Option<Bounds>) -> Option<Row> {
    let (first, last) = (run.first()?.what, run.last()?.what);
    let failed = first.rc().is_some_and(|rc| rc < 0);
    let failure = match (&first.end, first.rc()) {
        (None, _) => Some("unfinished".to_owned()),
        (Some(_), rc) => rc.filter(|rc| *rc < 0).map(describe::errno),
    };
    let text = if run.len() > 1 {
        format!("{} × {}", last.name(), run.len())
    } else {
        format!("{} {}", first.name(), describe::detail(first))
            .trim_end()
            .to_owned()
    };
    let tone = match () {
        () if failed || first.end.is_none() => Tone::Bad,
        () if first.meaning.nature == Nature::Wait => Tone::Wait,
        () => Tone::Work,
    };
    let depth = first.depth;
    Some(Row {
        depth,
        text,
        took_ns: took(run),
        share: share(run, bounds),
        place: place(run, bounds),
        failure,
        tone,
        lossy: run
            .iter()
            .any(|span| party.lost_during(span.what.start_ns, span.what.end_ns)),
    })
}

fn kernel_row(
    party: &Party<'_>,
    ioctls: &[Placed<'_, Ioctl>],
    depth: usize,
    bounds: Option<Bounds>,
) -> Option<Row> {
    let first = ioctls.first()?.what;
    let name = describe::ioctl(first);
    let times = if ioctls.len() > 1 {
        format!(" × {}", ioctls.len())
    } else {
        String::new()
    };
    let worst = ioctls.iter().map(|ioctl| ioctl.what.ret).min()?;
    Some(Row {
        depth,
        text: format!("ioctl {name}{times}"),
        took_ns: took(ioctls),
        share: share(ioctls, bounds),
        place: place(ioctls, bounds),
        failure: (worst < 0).then(|| describe::errno(worst)),
        tone: if worst < 0 { Tone::Bad } else { Tone::Kernel },
        lossy: ioctls
            .iter()
            .any(|ioctl| party.lost_during(ioctl.what.enter_ns, ioctl.what.exit_ns)),
    })
}

fn took<T>(run: &[Placed<'_, T>]) -> u64 {
    run.iter()
        .fold(0, |sum, one| sum.saturating_add(one.duration_ns()))
}

fn share<T>(run: &[Placed<'_, T>], bounds: Option<Bounds>) -> Option<f64> {
    let bounds = bounds?;
    let inside =
        |one: &&Placed<'_, T>| one.start_ns < bounds.end_ns && one.end_ns > bounds.start_ns;
    let mut inside = run.iter().filter(inside).peekable();
    inside.peek()?;
    Some(
        inside
            .map(|one| bounds.share(one.start_ns, one.end_ns))
            .sum(),
    )
}

/// Where in the downtime the part of `run` lies that is in it.
fn place<T>(run: &[Placed<'_, T>], bounds: Option<Bounds>) -> Option<(f64, f64)> {
    let bounds = bounds?;
    let inside =
        |one: &&Placed<'_, T>| one.start_ns < bounds.end_ns && one.end_ns > bounds.start_ns;
    let inside = || run.iter().filter(inside);
    let at = |ns: i64| bounds.share(bounds.start_ns, ns);
    let start = inside().map(|one| one.start_ns).min()?;
    let end = inside().map(|one| one.end_ns).max()?;
    Some((at(start), at(end)))
}

/// The ioctls that are the kernel's view of a table operation, by the place of the innermost span
/// that made them.
fn kernel_views<'a>(party: &Party<'a>) -> HashMap<usize, Vec<Placed<'a, Ioctl>>> {
    let mut views: HashMap<usize, Vec<Placed<'a, Ioctl>>> = HashMap::new();
    for (index, operation) in party.spans.iter().enumerate() {
        for ioctl in party
            .ioctls
            .iter()
            .filter(|ioctl| its::is_kernel_view(operation, ioctl))
        {
            // What is inside the operation follows it; the last that holds the ioctl is innermost.
            let inside = party.spans.iter().enumerate().skip(index);
            let inside = inside.take_while(|(_, span)| operation.holds(span));
            let innermost = inside.filter(|(_, span)| span.holds(ioctl)).last();
            views
                .entry(innermost.map_or(index, |(index, _)| index))
                .or_default()
                .push(*ioctl);
        }
    }
    views
}
