//! A trace's events, in the words of Chrome's trace format, as the "Trace Event Format" document and Perfetto's
//! importer have them.

use serde::{Serialize, Serializer};
use serde_json::{Map, Value};

/// An event's arguments.
pub(in crate::export) type Args = Map<String, Value>;

/// A time or duration: nanoseconds that are written as microseconds with three decimals. Exact for
/// a trace of up to 104 days, since the trace's own begin is its zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(in crate::export) struct Time(pub(in crate::export) i64);

impl Serialize for Time {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_f64(self.0 as f64 / 1e3)
    }
}

/// A row in the viewer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::export) struct Track {
    pub(in crate::export) pid: u64,
    pub(in crate::export) tid: u64,
}

/// What an event is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub(in crate::export) enum Phase {
    /// A slice with its duration.
    #[serde(rename = "X")]
    Complete,
    /// A moment.
    #[serde(rename = "i")]
    Instant,
    /// A name or place of a process or thread.
    #[serde(rename = "M")]
    Metadata,
    /// An arrow's tail, in the slice around it.
    #[serde(rename = "s")]
    FlowStart,
    /// An arrow's head.
    #[serde(rename = "f")]
    FlowEnd,
    /// The begin of a phase that belongs to no thread.
    #[serde(rename = "b")]
    AsyncBegin,
    /// Its end.
    #[serde(rename = "e")]
    AsyncEnd,
}

/// One event.
#[derive(Debug, Serialize)]
pub(in crate::export) struct Event<'a> {
    pub(in crate::export) ph: Phase,
    pub(in crate::export) name: &'a str,
    #[serde(skip_serializing_if = "str::is_empty")]
    pub(in crate::export) cat: &'a str,
    pub(in crate::export) pid: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(in crate::export) tid: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(in crate::export) ts: Option<Time>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(in crate::export) dur: Option<Time>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(in crate::export) id: Option<u64>,
    /// An instant's scope: `t`, its thread.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(in crate::export) s: Option<&'a str>,
    /// Where an arrow's head binds: `e`, the slice around it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(in crate::export) bp: Option<&'a str>,
    #[serde(skip_serializing_if = "Map::is_empty")]
    pub(in crate::export) args: Args,
}

impl<'a> Event<'a> {
    fn new(ph: Phase, name: &'a str, cat: &'a str, pid: u64) -> Self {
        let (tid, ts, dur, id, s, bp) = (None, None, None, None, None, None);
        Self {
            ph,
            name,
            cat,
            pid,
            tid,
            ts,
            dur,
            id,
            s,
            bp,
            args: Args::new(),
        }
    }

    /// A slice of `track`.
    pub(in crate::export) fn slice(
        name: &'a str,
        cat: &'a str,
        track: Track,
        (start, end): (i64, i64),
        args: Args,
    ) -> Self {
        Self {
            tid: Some(track.tid),
            ts: Some(Time(start)),
            dur: Some(Time(end.saturating_sub(start).max(0))),
            args,
            ..Self::new(Phase::Complete, name, cat, track.pid)
        }
    }

    /// A moment of `track`.
    pub(in crate::export) fn instant(
        name: &'a str,
        cat: &'a str,
        track: Track,
        at: i64,
        args: Args,
    ) -> Self {
        Self {
            tid: Some(track.tid),
            ts: Some(Time(at)),
            s: Some("t"),
            args,
            ..Self::new(Phase::Instant, name, cat, track.pid)
        }
    }

    /// The tail of arrow `id`, in the slice of `track` that is open at `at`.
    pub(in crate::export) fn flow_start(
        name: &'a str,
        cat: &'a str,
        track: Track,
        at: i64,
        id: u64,
    ) -> Self {
        Self {
            tid: Some(track.tid),
            ts: Some(Time(at)),
            id: Some(id),
            ..Self::new(Phase::FlowStart, name, cat, track.pid)
        }
    }

    /// Its head.
    pub(in crate::export) fn flow_end(
        name: &'a str,
        cat: &'a str,
        track: Track,
        at: i64,
        id: u64,
    ) -> Self {
        Self {
            ph: Phase::FlowEnd,
            bp: Some("e"),
            ..Self::flow_start(name, cat, track, at, id)
        }
    }

    /// The begin of phase `id` of a process.
    pub(in crate::export) fn phase_begin(
        name: &'a str,
        pid: u64,
        at: i64,
        id: u64,
        args: Args,
    ) -> Self {
        Self {
            ts: Some(Time(at)),
            id: Some(id),
            args,
            ..Self::new(Phase::AsyncBegin, name, "migration", pid)
        }
    }

    /// Its end.
    pub(in crate::export) fn phase_end(name: &'a str, pid: u64, at: i64, id: u64) -> Self {
        Self {
            ph: Phase::AsyncEnd,
            ..Self::phase_begin(name, pid, at, id, Args::new())
        }
    }

    /// Metadata of a process: its `name` or `sort_index`.
    pub(in crate::export) fn process(
        what: &'a str,
        pid: u64,
        key: &str,
        value: impl Into<Value>,
    ) -> Self {
        let args = Args::from_iter([(key.to_owned(), value.into())]);
        Self {
            args,
            ..Self::new(Phase::Metadata, what, "", pid)
        }
    }

    /// The same of a thread.
    pub(in crate::export) fn thread(
        what: &'a str,
        track: Track,
        key: &str,
        value: impl Into<Value>,
    ) -> Self {
        Self {
            tid: Some(track.tid),
            ..Self::process(what, track.pid, key, value)
        }
    }
}
