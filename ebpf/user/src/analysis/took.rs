//! Spans that only their ends tell of: how long they took, or what they were.

use std::sync::Arc;

use super::spans::{Args, DEEPEST, Meaning, Paired, Span};
use crate::foreign::Tells;
use crate::recording::Value;

/// A duration in whole microseconds, read on another clock than the probe, is off by this much: what
/// began within it belongs inside. 5 µs, in ns.
const SLACK_NS: u64 = 5_000;

/// So many spans are looked at, at most, for what was inside one that has just ended.
const LOOKED_AT: usize = 1024;

/// What such a span is before it is placed.
pub(super) struct Told {
    pub(super) meaning: Arc<Meaning>,
    pub(super) args: Args,
    pub(super) end_ns: u64,
}

impl Paired {
    /// Puts in a span that has just ended, inside the `open` ones and around those that began after
    /// it did. `stage` is where the last stage of this thread ended, and is where this one ends.
    pub(super) fn ended(&mut self, open: &mut [usize], told: Told, stage: &mut Option<u64>) {
        let end_ns = told.end_ns;
        match told.meaning.tells {
            Tells::Edge(..) => {}
            Tells::Took(_, took) => {
                let took_ns = told.args.u64(took).map(|us| us.saturating_mul(1_000));
                if let Some(took_ns) = took_ns {
                    self.enclose(open, told, end_ns.saturating_sub(took_ns), SLACK_NS);
                }
            }
            Tells::Stage(name) => {
                let before = stage.replace(end_ns);
                let Some(Value::Str(name)) = told.args.get(name) else {
                    return;
                };
                // One that says that it starts has nothing behind it.
                let (Some(begin_ns), false) = (before, name.ends_with("-start")) else {
                    return;
                };
                let meaning = Arc::new(told.meaning.called(name));
                self.enclose(open, Told { meaning, ..told }, begin_ns, 0);
            }
        }
    }

    fn enclose(&mut self, open: &mut [usize], told: Told, begin_ns: u64, slack_ns: u64) {
        let (depth, parent) = (open.len(), open.last().copied());
        let first = parent.map_or(0, |parent| parent + 1);
        // The closed spans on this level that began with it or later, and where the one before ends.
        let mut at = self.spans.len();
        let mut floor_ns = parent.and_then(|index| Some(self.spans.get(index)?.start_ns));
        let mut last_ns = None;
        let (mut deepest, mut looked_at) = (depth, 0);
        for (index, span) in self.spans.iter().enumerate().skip(first).rev() {
            looked_at += 1;
            deepest = deepest.max(span.depth);
            last_ns = last_ns.max(Some(span.end_ns));
            if looked_at > LOOKED_AT || deepest > DEEPEST {
                // So many, or so deep ones, are not put inside: it comes behind them.
                at = self.spans.len();
                floor_ns = floor_ns.max(last_ns);
                break;
            }
            if span.depth > depth {
                continue;
            }
            if span.start_ns.saturating_add(slack_ns) < begin_ns {
                floor_ns = floor_ns.max(Some(span.end_ns));
                break;
            }
            at = index;
        }
        let begin_ns = floor_ns.map_or(begin_ns, |floor_ns| begin_ns.max(floor_ns));
        let inside = self.spans.get(at).map(|span| span.start_ns);
        let start_ns = inside.map_or(begin_ns, |start_ns| start_ns.min(begin_ns));
        for span in self.spans.iter_mut().skip(at) {
            span.parent = if span.depth == depth {
                Some(at)
            } else {
                span.parent.map(|parent| parent + 1)
            };
            span.depth += 1;
        }
        if let Some(parent) = parent.and_then(|index| self.spans.get_mut(index)) {
            parent.leaf = false;
        }
        let Told {
            meaning,
            args,
            end_ns,
        } = told;
        let span = Span {
            meaning,
            start_ns,
            end_ns,
            depth,
            parent,
            leaf: at == self.spans.len(),
            begin: args.clone(),
            end: Some(args.without_values()),
            open: false,
        };
        self.spans.insert(at, span);
    }
}
