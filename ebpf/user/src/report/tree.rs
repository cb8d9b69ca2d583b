//! One side's spans as lines of a tree, in call order.

use std::collections::HashMap;
use std::ptr;

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
    let runs = runs(inside(party, bounds), &[]);
    let runs = runs.iter();
    runs.filter_map(|run| kernel_row(party, run, 0, bounds))
        .collect()
}

/// Its ioctls in the downtime `bounds`.
fn inside<'a>(
    party: &Party<'a>,
    bounds: Option<Bounds>,
) -> impl Iterator<Item = Placed<'a, Ioctl>> {
    let inside = move |ioctl: &&Placed<'_, Ioctl>| {
        bounds
            .is_some_and(|bounds| ioctl.start_ns < bounds.end_ns && ioctl.end_ns > bounds.start_ns)
    };
    party.ioctls.iter().filter(inside).copied()
}

/// Equal ones among `ioctls` in a row are one run, if they are one thread's and none of `edges`, which
/// are in order, is between their begins.
fn runs<'a>(
    ioctls: impl Iterator<Item = Placed<'a, Ioctl>>,
    edges: &[i64],
) -> Vec<Vec<Placed<'a, Ioctl>>> {
    let ioctls: Vec<_> = ioctls.collect();
    let before = |one: &Placed<'_, Ioctl>| edges.partition_point(|ns| *ns <= one.start_ns);
    let same = |one: &Placed<'_, Ioctl>, next: &Placed<'_, Ioctl>| {
        one.tid == next.tid
            && one.what.ret == next.what.ret
            && describe::ioctl(one.what) == describe::ioctl(next.what)
            && before(one) == before(next)
    };
    ioctls.chunk_by(same).map(<[_]>::to_vec).collect()
}

/// The lines of a party with probes that are not ours: by thread its spans that reach into the
/// downtime `bounds`, and in them, or between them, what KVM did for it.
pub(super) fn foreign_rows(party: &Party<'_>, bounds: Option<Bounds>) -> Vec<Row> {
    let mut ioctls: HashMap<u32, Vec<Placed<'_, Ioctl>>> = HashMap::new();
    for ioctl in inside(party, bounds) {
        ioctls.entry(ioctl.tid).or_default().push(ioctl);
    }
    let mut rows = Vec::new();
    for spans in party.spans.chunk_by(|one, next| one.tid == next.tid) {
        let tid = spans.first().map_or(0, |span| span.tid);
        // What has begun and ended on the thread.
        let edges = spans.iter().flat_map(|span| [span.start_ns, span.end_ns]);
        let mut edges: Vec<_> = edges.collect();
        edges.sort_unstable();
        let spans = spans.iter();
        let spans = spans.filter(|span| share(&[**span], bounds).is_some());
        let mut spans = spans.peekable();
        // Where the spans end that are open.
        let mut open: Vec<i64> = Vec::new();
        let its = ioctls.remove(&tid).unwrap_or_default();
        for run in runs(its.into_iter(), &edges) {
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
    let others = inside(party, bounds).filter(|ioctl| ioctls.contains_key(&ioctl.tid));
    let others = runs(others, &[]);
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
    let places = party.spans.iter().enumerate();
    let places: HashMap<_, _> = places
        .map(|(index, span)| (ptr::from_ref(span.what), index))
        .collect();
    let mut views: HashMap<usize, Vec<Placed<'a, Ioctl>>> = HashMap::new();
    for (index, operation) in party.spans.iter().enumerate() {
        for ioctl in its::kernel_view(party, operation) {
            let thread = party.process.threads.get(&operation.tid);
            let mut around = thread
                .into_iter()
                .flat_map(|thread| thread.spans_before(ioctl.enter_ns));
            let innermost = around.find(|span| ioctl.exit_ns <= span.end_ns);
            let innermost = innermost.and_then(|span| places.get(&ptr::from_ref(span)));
            let at = |ns| party.place.at(ns);
            views
                .entry(innermost.copied().unwrap_or(index))
                .or_default()
                .push(Placed::new(
                    operation.tid,
                    (at(ioctl.enter_ns), at(ioctl.exit_ns)),
                    ioctl,
                ));
        }
    }
    views
}
