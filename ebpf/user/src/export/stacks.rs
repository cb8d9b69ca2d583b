//! A thread's spans, ioctls and kernel functions as one tree: what flame graphs are drawn of.

use std::cmp::Reverse;
use std::collections::BTreeMap;

use blackout_abi::Nature;

use crate::analysis::describe::{self, printable};
use crate::analysis::{Migration, Party, kvm};

/// Something on a thread's stack.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Frame {
    /// Its name.
    pub(super) name: String,
    /// Its begin on the migration's axis, ns.
    pub(super) start_ns: i64,
    /// Its end. Frames nest: what reaches beyond the one around it is cut.
    pub(super) end_ns: i64,
    /// How many frames are around it.
    pub(super) depth: usize,
}

/// Frames deeper than this are left out; only damaged recordings have them.
const DEPTH_MAX: usize = 200;

/// The threads of a migration that did something between `from` and `to`, with a name for each and
/// its frames in call order, cut to that range.
pub(super) fn threads(
    migration: &Migration<'_>,
    (from, to): (i64, i64),
) -> Vec<(String, Vec<Frame>)> {
    let mut threads = Vec::new();
    for party in migration.parties() {
        let mut pieces: BTreeMap<u32, Vec<Piece>> = BTreeMap::new();
        for (tid, (start, end), name) in pieces_of(party) {
            let (start, end) = (start.max(from), end.min(to));
            if start < end {
                pieces.entry(tid).or_default().push((start, end, name));
            }
        }
        for (tid, pieces) in pieces {
            let name = match party.process.threads.get(&tid) {
                Some(thread) if !thread.name.is_empty() => printable(&thread.name),
                _ => format!("thread {tid}"),
            };
            threads.push((format!("{} {name}", party.side), nest(pieces)));
        }
    }
    threads
}

/// A begin, an end and a name.
type Piece = (i64, i64, String);

/// What `party` was seen to do, with the threads that did it.
fn pieces_of<'a>(party: &'a Party<'a>) -> impl Iterator<Item = (u32, (i64, i64), String)> {
    let spans = party.spans.iter().map(|span| {
        let waits = span.what.meaning.nature == Nature::Wait;
        let wait = if waits { " (waits)" } else { "" };
        let name = format!("{}{wait}", describe::span(span.what));
        (span.tid, (span.start_ns, span.end_ns), name)
    });
    let ioctls = party.ioctls.iter().map(|ioctl| {
        let attr = ioctl.what.attr;
        let attr = attr.and_then(|attr| kvm::attr_name(ioctl.what.fd_kind, attr));
        let name = kvm::ioctl_name(ioctl.what);
        let name = attr.map_or_else(|| name.clone(), |attr| format!("{name} {attr}"));
        let range = (ioctl.start_ns, ioctl.end_ns);
        (ioctl.tid, range, format!("ioctl {name}"))
    });
    let functions = party.functions.iter().map(|one| {
        let range = (one.start_ns, one.end_ns);
        (one.tid, range, one.what.function.clone())
    });
    spans.chain(ioctls).chain(functions)
}

fn nest(mut pieces: Vec<Piece>) -> Vec<Frame> {
    // Spans come first among equals, since what the kernel did is inside of them.
    pieces.sort_by_key(|(start, end, _)| (*start, Reverse(*end)));
    let mut open: Vec<i64> = Vec::new();
    let mut frames = Vec::new();
    for (start_ns, end_ns, name) in pieces {
        while open.pop_if(|end| *end <= start_ns).is_some() {}
        if open.len() >= DEPTH_MAX {
            continue;
        }
        let end_ns = open.last().map_or(end_ns, |around| end_ns.min(*around));
        frames.push(Frame {
            name: printable(&name),
            start_ns,
            end_ns,
            depth: open.len(),
        });
        open.push(end_ns);
    }
    frames
}
