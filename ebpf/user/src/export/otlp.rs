//! A migration as a trace of OpenTelemetry's: its two sides' spans, and what KVM did in its downtime.
//!
//! The trace's and the spans' ids follow from the migration's own, so that what two hosts send of one
//! migration meets in one trace.

use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::ptr;
use std::time::{Duration, SystemTime};

use opentelemetry::trace::{SpanContext, SpanId, SpanKind, Status, TraceFlags, TraceId};
use opentelemetry::{InstrumentationScope, KeyValue};
use opentelemetry_sdk::trace::{SpanData, SpanEvents, SpanLinks};

use crate::analysis::{Migration, Party, Placed, Side, Span, describe};
use crate::recording::{Ioctl, Value};

/// More spans of a migration than this are not sent; the root says how many.
const MOST: usize = 10_000;

/// The spans of `migration`. The first one is the whole, if its source was recorded; else the side.
pub fn spans(migration: &Migration<'_>) -> Vec<SpanData> {
    let trace = Trace::new(migration.id);
    let mut spans: Vec<_> = migration
        .parties()
        .map(|party| trace.side(migration, party))
        .collect();
    spans.extend(trace.phases(migration));
    let mut left = 0;
    for party in migration.parties() {
        let mut ids = HashMap::new();
        for span in &party.spans {
            if spans.len() < MOST {
                spans.push(trace.span(party, span, &mut ids));
            } else {
                left += 1;
            }
        }
        let dark = migration.downtime.bounds;
        let inside = |ioctl: &&Placed<'_, Ioctl>| {
            dark.is_some_and(|dark| ioctl.start_ns < dark.end_ns && ioctl.end_ns > dark.start_ns)
        };
        for (number, ioctl) in (0u64..).zip(party.ioctls.iter().filter(inside)) {
            if spans.len() < MOST {
                spans.push(trace.ioctl(party, ioctl, number, &ids));
            } else {
                left += 1;
            }
        }
    }
    if let Some(root) = spans.first_mut().filter(|_| left > 0) {
        root.attributes
            .push(KeyValue::new("blackout.spans_left_out", left));
    }
    spans
}

/// What all spans of a migration share.
struct Trace {
    id: TraceId,
    seed: u64,
    scope: InstrumentationScope,
}

impl Trace {
    /// A monitor without probes tells no id; what is sent of its migrations meets nowhere.
    fn new(id: Option<u64>) -> Self {
        let seed = id.unwrap_or_else(|| fastrand::u64(..));
        let half = |which: &str| u128::from(hash(&(seed, id.is_some(), which)));
        Self {
            id: TraceId::from((half("high") << 64 | half("low")).max(1)),
            seed,
            scope: InstrumentationScope::builder("blackout")
                .with_version(env!("CARGO_PKG_VERSION"))
                .build(),
        }
    }

    fn context(&self, what: impl Hash) -> SpanContext {
        let id = SpanId::from(hash(&(self.seed, what)).max(1));
        SpanContext::new(self.id, id, TraceFlags::SAMPLED, false, Default::default())
    }

    fn side_of(&self, side: Side) -> SpanContext {
        self.context(("side", side))
    }

    fn data(
        &self,
        context: SpanContext,
        parent: SpanId,
        name: String,
        (start_time, end_time): (SystemTime, SystemTime),
        attributes: Vec<KeyValue>,
    ) -> SpanData {
        SpanData {
            span_context: context,
            parent_span_id: parent,
            parent_span_is_remote: false,
            span_kind: SpanKind::Internal,
            name: name.into(),
            start_time,
            end_time: end_time.max(start_time),
            attributes,
            dropped_attributes_count: 0,
            events: SpanEvents::default(),
            links: SpanLinks::default(),
            status: Status::Unset,
            instrumentation_scope: self.scope.clone(),
        }
    }

    /// One side as a whole. The destination's is the source's child, on whatever host that is.
    fn side(&self, migration: &Migration<'_>, party: &Party<'_>) -> SpanData {
        let downtime = &migration.downtime;
        let ns = |ns: u64| i64::try_from(ns).unwrap_or(i64::MAX);
        let mut attributes = vec![
            KeyValue::new("blackout.side", party.side.to_string()),
            KeyValue::new("blackout.status", describe::printable(&migration.status)),
            KeyValue::new("process.pid", i64::from(party.pid)),
            KeyValue::new(
                "process.executable.name",
                describe::printable(&party.process.comm),
            ),
            KeyValue::new(
                "host.name",
                describe::printable(&party.recording.header.hostname),
            ),
            KeyValue::new("blackout.lost_events", ns(migration.lost_events())),
        ];
        if let Some(id) = migration.id {
            attributes.push(KeyValue::new("blackout.migration_id", ns(id)));
        }
        if let Some(bounds) = downtime.bounds {
            attributes.push(KeyValue::new(
                "blackout.downtime_ns",
                ns(bounds.duration_ns()),
            ));
        }
        if let Some((start, end)) = downtime.blackout {
            attributes.push(KeyValue::new(
                "blackout.blackout_ns",
                end.saturating_sub(start),
            ));
        }
        if let Some(explained) = downtime.explained {
            attributes.push(KeyValue::new("blackout.explained", explained));
        }
        let doubts = migration.doubts().join("; ");
        if !doubts.is_empty() {
            attributes.push(KeyValue::new(
                "blackout.doubts",
                describe::printable(&doubts),
            ));
        }
        let parent = match party.side {
            Side::Destination => self.side_of(Side::Source).span_id(),
            _ => SpanId::INVALID,
        };
        let name = format!("migration {}", party.side);
        let range = (wall(party, 0), wall(party, migration.end_ns));
        let mut span = self.data(self.side_of(party.side), parent, name, range, attributes);
        span.parent_span_is_remote = party.side == Side::Destination && migration.source.is_none();
        if let Some(error) = &migration.error {
            span.status = Status::error(describe::printable(error));
        }
        span
    }

    /// Downtime and blackout, on the clock of the side that the axis follows.
    fn phases(&self, migration: &Migration<'_>) -> Vec<SpanData> {
        let Some(party) = migration.parties().next() else {
            return Vec::new();
        };
        let downtime = &migration.downtime;
        let bounds = downtime
            .bounds
            .map(|bounds| (bounds.start_ns, bounds.end_ns));
        let phases = [("downtime", bounds), ("blackout", downtime.blackout)];
        let seen = phases
            .into_iter()
            .filter_map(|(name, range)| Some((name, range?)));
        seen.map(|(name, (start, end))| {
            let range = (wall(party, start), wall(party, end));
            let parent = self.side_of(party.side).span_id();
            self.data(
                self.context(name),
                parent,
                name.to_owned(),
                range,
                Vec::new(),
            )
        })
        .collect()
    }

    fn span<'a>(
        &self,
        party: &Party<'a>,
        span: &Placed<'a, Span>,
        ids: &mut HashMap<*const Span, SpanId>,
    ) -> SpanData {
        let what = span.what;
        let context = self.context((party.side, span.tid, what.start_ns, what.depth));
        ids.insert(ptr::from_ref(what), context.span_id());
        let around = party.process.threads.get(&span.tid);
        let around = around.and_then(|thread| thread.spans.get(what.parent?));
        let parent = around.and_then(|around| ids.get(&ptr::from_ref(around)));
        let parent = parent.copied();
        let range = (wall(party, span.start_ns), wall(party, span.end_ns));
        let mut attributes = vec![KeyValue::new("thread.id", i64::from(span.tid))];
        if what.meaning.hop > 0 {
            attributes.push(KeyValue::new("blackout.hop", i64::from(what.meaning.hop)));
        }
        let end = what.end.iter().flat_map(|end| end.iter());
        for (name, value) in what.begin.iter().chain(end) {
            attributes.extend(attribute(name, value));
        }
        if party.lost_during(what.start_ns, what.end_ns) {
            attributes.push(KeyValue::new("blackout.lossy", true));
        }
        let parent = parent.unwrap_or_else(|| self.side_of(party.side).span_id());
        let mut data = self.data(context, parent, describe::span(what), range, attributes);
        data.status = match (what.rc(), &what.end) {
            (Some(rc @ ..0), _) => Status::error(describe::errno(rc)),
            (_, None) => Status::error("its end was not seen"),
            _ => Status::Unset,
        };
        data
    }

    fn ioctl(
        &self,
        party: &Party<'_>,
        ioctl: &Placed<'_, Ioctl>,
        number: u64,
        ids: &HashMap<*const Span, SpanId>,
    ) -> SpanData {
        let thread = party.process.threads.get(&ioctl.tid);
        let around = thread.and_then(|thread| thread.spans_at(ioctl.what.enter_ns).next());
        let parent = around.and_then(|span| ids.get(&ptr::from_ref(span)).copied());
        let parent = parent.unwrap_or_else(|| self.side_of(party.side).span_id());
        let attributes = vec![
            KeyValue::new("thread.id", i64::from(ioctl.tid)),
            KeyValue::new("rc", ioctl.what.ret),
        ];
        let context = self.context(("ioctl", party.side, number));
        let name = format!("ioctl {}", describe::ioctl(ioctl.what));
        let range = (wall(party, ioctl.start_ns), wall(party, ioctl.end_ns));
        let mut data = self.data(context, parent, name, range, attributes);
        if ioctl.what.ret < 0 {
            data.status = Status::error(describe::errno(ioctl.what.ret));
        }
        data
    }
}

fn attribute(name: &str, value: &Value) -> Option<KeyValue> {
    let key = format!("blackout.{}", describe::printable(name));
    Some(match value {
        Value::U64(value) => match i64::try_from(*value) {
            Ok(value) => KeyValue::new(key, value),
            Err(_) => KeyValue::new(key, value.to_string()),
        },
        Value::I64(value) => KeyValue::new(key, *value),
        Value::Str(value) => KeyValue::new(key, describe::printable(value)),
        Value::Unreadable => return None,
    })
}

/// The wall clock of `party`'s host at `ns` on the axis.
fn wall(party: &Party<'_>, ns: i64) -> SystemTime {
    let clock = party.recording.header.clock;
    let since = i128::from(party.place.back(ns)) - i128::from(clock.monotonic_ns);
    let ns = (i128::from(clock.realtime_ns) + since).max(0);
    let at = Duration::from_nanos(u64::try_from(ns).unwrap_or(u64::MAX));
    SystemTime::UNIX_EPOCH
        .checked_add(at)
        .unwrap_or(SystemTime::UNIX_EPOCH)
}

/// The same on every host: the hasher has no key of its own.
fn hash(what: &impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    what.hash(&mut hasher);
    hasher.finish()
}
