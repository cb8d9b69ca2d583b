//! Pairs the begin and end probes of one thread into trees.
//!
//! A thread's spans nest: an end closes the innermost open span of its name. What breaks the rule
//! (a lost event, a killed process, a probe without its twin) is kept and said, never hidden.
//! No thread has more than `DEEPEST` spans open, so that what is around one is found soon.

#[cfg(test)]
mod tests;

use std::mem;
use std::sync::Arc;

use blackout_abi::probes::{self, Edge, Nature};

use super::took::Told;
use crate::foreign::{self, Tells};
use crate::recording::{ProbeDef, Value};

/// At most so many spans are open on a thread, far more than any monitor's code nests. Where another
/// one begins, as with a probe that never says its end, the innermost has lost its own.
pub(super) const DEEPEST: usize = 64;

/// What a probe means: its row and edge. Built once a [`ProbeDef`], shared by all its hits.
#[derive(Clone, Debug)]
pub struct Meaning {
    /// The note's provider.
    pub provider: String,
    /// The row's name: the probe's, without `_begin` and `_end`.
    pub row: String,
    /// Its edge.
    pub edge: Edge,
    /// The row's hop in the probe table; 0 for a foreign probe.
    pub hop: u8,
    /// What the row's time is spent on; a foreign probe's on work.
    pub nature: Nature,
    /// What it tells of time.
    pub tells: Tells,
    /// The arguments' names.
    pub args: Vec<String>,
}

impl Meaning {
    /// What `def` means: by the probe table for our provider, by its name's ending for others.
    pub fn of(def: &ProbeDef) -> Self {
        let table = probes::PROBES
            .iter()
            .find(|probe| def.provider == probes::PROVIDER && probe.name == def.name);
        let foreign = foreign::probe(&def.provider, &def.name, def.args.len());
        let (row, edge, hop) = match (table, foreign.map(|foreign| foreign.tells)) {
            (Some(probe), _) => (probe.row, probe.edge, probe.hop),
            (None, Some(Tells::Edge(row, edge))) => (row, edge, 0),
            (None, Some(Tells::Took(row, _))) => (row, Edge::Point, 0),
            (None, _) => {
                let endings = [
                    ("_begin", Edge::Begin),
                    ("_start", Edge::Begin),
                    ("_end", Edge::End),
                ];
                endings
                    .into_iter()
                    .find_map(|(ending, edge)| Some((def.name.strip_suffix(ending)?, edge, 0)))
                    .unwrap_or((&def.name, Edge::Point, 0))
            }
        };
        let tells = foreign.map_or(Tells::Edge("", edge), |foreign| foreign.tells);
        Self {
            provider: def.provider.clone(),
            row: row.to_owned(),
            edge,
            hop,
            nature: table
                .and_then(|probe| probes::span(probe.row))
                .map_or(tells.nature(), |span| span.nature),
            tells,
            args: def.args.iter().map(|arg| arg.name.clone()).collect(),
        }
    }

    /// The same under another name.
    pub(super) fn called(&self, row: &str) -> Self {
        Self {
            row: row.to_owned(),
            ..self.clone()
        }
    }
}

/// One hit of a probe on a known thread.
#[derive(Clone, Debug)]
pub struct Event {
    /// When, ns.
    pub ts_ns: u64,
    /// What it means.
    pub meaning: Arc<Meaning>,
    /// The arguments' values.
    pub values: Vec<Value>,
}

/// The arguments of a probe, by name.
#[derive(Clone, Debug)]
pub struct Args {
    meaning: Arc<Meaning>,
    values: Vec<Value>,
}

impl Args {
    /// Names and values in order.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Value)> {
        self.meaning
            .args
            .iter()
            .map(String::as_str)
            .zip(&self.values)
    }

    /// The value of the argument called `name`.
    pub fn get(&self, name: &str) -> Option<&Value> {
        self.iter()
            .find(|(other, _)| *other == name)
            .map(|(_, value)| value)
    }

    /// The same probe's, without any.
    pub(super) fn without_values(&self) -> Self {
        Self {
            meaning: Arc::clone(&self.meaning),
            values: Vec::new(),
        }
    }

    /// The unsigned number called `name`.
    pub fn u64(&self, name: &str) -> Option<u64> {
        match self.get(name)? {
            Value::U64(value) => Some(*value),
            Value::I64(value) => u64::try_from(*value).ok(),
            _ => None,
        }
    }

    /// The signed number called `name`.
    pub fn i64(&self, name: &str) -> Option<i64> {
        match self.get(name)? {
            Value::I64(value) => Some(*value),
            Value::U64(value) => Some(value.cast_signed()),
            _ => None,
        }
    }

    /// The string called `name`.
    pub fn str(&self, name: &str) -> Option<&str> {
        match self.get(name)? {
            Value::Str(value) => Some(value),
            _ => None,
        }
    }
}

/// One span of a thread.
#[derive(Clone, Debug)]
pub struct Span {
    /// What opened it.
    pub meaning: Arc<Meaning>,
    /// When it began, ns.
    pub start_ns: u64,
    /// When it ended, ns. For an unfinished span: when its parent ended, or the thread's last event.
    pub end_ns: u64,
    /// How many spans are around it on its thread.
    pub depth: usize,
    /// The innermost of those, as an index into the thread's spans.
    pub parent: Option<usize>,
    /// Whether no span is inside it.
    pub leaf: bool,
    /// The begin probe's arguments.
    pub begin: Args,
    /// The end probe's; `None` for a span whose end was not seen.
    pub end: Option<Args>,
    /// Whether it goes on beyond what was read so far, and its end is not known yet. Never so in a
    /// recording that was read to its end.
    pub open: bool,
}

impl Span {
    /// The row's name.
    pub fn name(&self) -> &str {
        &self.meaning.row
    }

    /// The result that the end probe carried.
    pub fn rc(&self) -> Option<i64> {
        self.end.as_ref()?.i64("rc")
    }
}

/// A moment of a thread.
#[derive(Clone, Debug)]
pub struct Point {
    /// What fired.
    pub meaning: Arc<Meaning>,
    /// When, ns.
    pub ts_ns: u64,
    /// Its arguments.
    pub args: Args,
}

impl Point {
    /// The row's name.
    pub fn name(&self) -> &str {
        &self.meaning.row
    }
}

/// Where a thread's probes broke the rule of nesting.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Problem {
    /// A span began and its end was not seen.
    Unfinished {
        /// The row.
        name: String,
        /// When it began, ns.
        ts_ns: u64,
    },
    /// A span ended and its begin was not seen.
    EndWithoutBegin {
        /// The row.
        name: String,
        /// When it ended, ns.
        ts_ns: u64,
    },
}

impl Problem {
    /// When the probe that stands alone fired, ns.
    pub fn ts_ns(&self) -> u64 {
        match self {
            Self::Unfinished { ts_ns, .. } | Self::EndWithoutBegin { ts_ns, .. } => *ts_ns,
        }
    }
}

/// What a thread's probes say.
#[derive(Clone, Debug, Default)]
pub struct Paired {
    /// The spans, ordered by their begin: a parent before its children.
    pub spans: Vec<Span>,
    /// The moments, in order.
    pub points: Vec<Point>,
    /// What did not fit, in order.
    pub problems: Vec<Problem>,
}

/// Pairs the events of one thread, in any order.
pub fn pair(events: Vec<Event>) -> Paired {
    let mut pairing = Pairing::default();
    pairing.push(events);
    pairing.finish()
}

/// The pairing of one thread's events, a part of them at a time.
#[derive(Debug, Default)]
pub(super) struct Pairing {
    paired: Paired,
    /// The open spans, as places in `paired`, the outermost first.
    open: Vec<usize>,
    /// Where the last stage ended.
    stage: Option<u64>,
    last_ns: u64,
}

impl Pairing {
    /// Takes events that come after those before, among themselves in any order.
    pub(super) fn push(&mut self, mut events: Vec<Event>) {
        // A ring buffer keeps a thread's order; two of them, or a merge, may not. Ties keep theirs.
        events.sort_by_key(|event| event.ts_ns);
        for event in events {
            self.one(event);
        }
    }

    /// What is known by now. Open spans are in it, so that what is inside them finds them, and stay:
    /// they come again, with all around them, until they have ended.
    pub(super) fn part(&mut self) -> Paired {
        let mut stay = Vec::with_capacity(self.open.len());
        for (depth, index) in self.open.iter_mut().enumerate() {
            if let Some(span) = self.paired.spans.get_mut(*index) {
                (span.open, span.end_ns) = (true, u64::MAX);
                stay.push(Span {
                    parent: depth.checked_sub(1),
                    open: false,
                    ..span.clone()
                });
            }
            *index = depth;
        }
        let paired = Paired {
            spans: stay,
            ..Paired::default()
        };
        mem::replace(&mut self.paired, paired)
    }

    /// The rest, once all events are in.
    pub(super) fn finish(mut self) -> Paired {
        while let Some(index) = self.open.pop() {
            self.paired.abandon(index, self.last_ns);
        }
        self.paired.problems.sort_by_key(Problem::ts_ns);
        self.paired
    }

    fn one(&mut self, event: Event) {
        let Event {
            ts_ns,
            meaning,
            values,
        } = event;
        let args = Args {
            meaning: Arc::clone(&meaning),
            values,
        };
        self.last_ns = self.last_ns.max(ts_ns);
        let (paired, open) = (&mut self.paired, &mut self.open);
        match meaning.edge {
            Edge::Point => {
                let told = Told {
                    meaning: Arc::clone(&meaning),
                    args: args.clone(),
                    end_ns: ts_ns,
                };
                paired.ended(open, told, &mut self.stage);
                paired.points.push(Point {
                    meaning,
                    ts_ns,
                    args,
                });
            }
            Edge::Begin => paired.begin(open, meaning, ts_ns, args),
            Edge::End => paired.end(open, &meaning, ts_ns, args),
        }
    }
}

impl Paired {
    fn begin(&mut self, open: &mut Vec<usize>, meaning: Arc<Meaning>, ts_ns: u64, args: Args) {
        if open.len() >= DEEPEST
            && let Some(index) = open.pop()
        {
            self.abandon(index, ts_ns);
        }
        let parent = open.last().copied();
        if let Some(parent) = parent.and_then(|index| self.spans.get_mut(index)) {
            parent.leaf = false;
        }
        let depth = open.len();
        open.push(self.spans.len());
        self.spans.push(Span {
            meaning,
            start_ns: ts_ns,
            end_ns: ts_ns,
            depth,
            parent,
            leaf: true,
            begin: args,
            end: None,
            open: false,
        });
    }

    fn end(&mut self, open: &mut Vec<usize>, meaning: &Meaning, ts_ns: u64, args: Args) {
        let same = |index: &usize| {
            self.spans.get(*index).is_some_and(|span| {
                span.meaning.row == meaning.row && span.meaning.provider == meaning.provider
            })
        };
        let Some(place) = open.iter().rposition(same) else {
            self.problems.push(Problem::EndWithoutBegin {
                name: meaning.row.clone(),
                ts_ns,
            });
            return;
        };
        // Whatever is still open inside has lost its end.
        while open.len() > place + 1 {
            if let Some(index) = open.pop() {
                self.abandon(index, ts_ns);
            }
        }
        if let Some(span) = open.pop().and_then(|index| self.spans.get_mut(index)) {
            span.end_ns = ts_ns;
            span.end = Some(args);
        }
    }

    fn abandon(&mut self, index: usize, end_ns: u64) {
        if let Some(span) = self.spans.get_mut(index) {
            span.end_ns = end_ns;
            let name = span.meaning.row.clone();
            self.problems.push(Problem::Unfinished {
                name,
                ts_ns: span.start_ns,
            });
        }
    }
}
