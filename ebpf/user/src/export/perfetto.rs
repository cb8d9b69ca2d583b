//! Perfetto's native format: protobuf, to the nanosecond, a fifth of the size of JSON. What it
//! holds is in [`super::trace`]. Times are `CLOCK_MONOTONIC` of the first recording's host.
//!
//! The messages are those parts of `protos/perfetto/trace/` that the trace needs: `trace.proto`,
//! `trace_packet.proto` and `track_event/`.

use std::collections::HashSet;
use std::io::{self, Write};

use prost::Message;
use serde_json::Value;

use super::trace::event::{Event, Phase};
use super::trace::{self, Sink};
use crate::analysis::{Loaded, Migration};

/// Writes the trace of `recordings`, among which `migrations` were found.
///
/// # Errors
/// What `out` returns.
pub fn write(
    out: &mut impl Write,
    recordings: &[Loaded],
    migrations: &[Migration<'_>],
) -> io::Result<()> {
    let mut packets = Packets {
        out,
        origin_ns: 0,
        any: false,
        phases: HashSet::new(),
    };
    trace::write(&mut packets, recordings, migrations)
}

/// One packet of a trace; the whole trace is a list of them in field 1.
#[derive(Clone, PartialEq, Message)]
struct Packet {
    #[prost(uint64, optional, tag = "8")]
    timestamp: Option<u64>,
    #[prost(uint32, tag = "10")]
    trusted_packet_sequence_id: u32,
    #[prost(message, optional, tag = "11")]
    track_event: Option<TrackEvent>,
    #[prost(uint32, tag = "13")]
    sequence_flags: u32,
    #[prost(message, optional, tag = "60")]
    track_descriptor: Option<TrackDescriptor>,
}

#[derive(Clone, PartialEq, Message)]
struct TrackDescriptor {
    #[prost(uint64, tag = "1")]
    uuid: u64,
    #[prost(string, tag = "2")]
    name: String,
    #[prost(message, optional, tag = "3")]
    process: Option<ProcessDescriptor>,
    #[prost(message, optional, tag = "4")]
    thread: Option<ThreadDescriptor>,
    #[prost(uint64, tag = "5")]
    parent_uuid: u64,
}

#[derive(Clone, PartialEq, Message)]
struct ProcessDescriptor {
    #[prost(int32, tag = "1")]
    pid: i32,
    #[prost(string, tag = "6")]
    process_name: String,
}

#[derive(Clone, PartialEq, Message)]
struct ThreadDescriptor {
    #[prost(int32, tag = "1")]
    pid: i32,
    #[prost(int32, tag = "2")]
    tid: i32,
    #[prost(string, tag = "5")]
    thread_name: String,
}

#[derive(Clone, PartialEq, Message)]
struct TrackEvent {
    #[prost(message, repeated, tag = "4")]
    debug_annotations: Vec<DebugAnnotation>,
    #[prost(message, optional, tag = "6")]
    legacy_event: Option<LegacyEvent>,
    #[prost(enumeration = "Type", tag = "9")]
    r#type: i32,
    #[prost(uint64, tag = "11")]
    track_uuid: u64,
    #[prost(string, repeated, tag = "22")]
    categories: Vec<String>,
    #[prost(string, tag = "23")]
    name: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, prost::Enumeration)]
#[repr(i32)]
enum Type {
    Unspecified = 0,
    SliceBegin = 1,
    SliceEnd = 2,
    Instant = 3,
}

/// An arrow's end: only this old form binds it to the slice around it.
#[derive(Clone, PartialEq, Message)]
struct LegacyEvent {
    #[prost(int32, tag = "2")]
    phase: i32,
    #[prost(uint64, optional, tag = "6")]
    unscoped_id: Option<u64>,
    #[prost(bool, tag = "12")]
    bind_to_enclosing: bool,
}

#[derive(Clone, PartialEq, Message)]
struct DebugAnnotation {
    #[prost(bool, optional, tag = "2")]
    bool_value: Option<bool>,
    #[prost(uint64, optional, tag = "3")]
    uint_value: Option<u64>,
    #[prost(int64, optional, tag = "4")]
    int_value: Option<i64>,
    #[prost(double, optional, tag = "5")]
    double_value: Option<f64>,
    #[prost(string, optional, tag = "6")]
    string_value: Option<String>,
    #[prost(string, tag = "10")]
    name: String,
}

/// `SEQ_INCREMENTAL_STATE_CLEARED`: what came before on this sequence, nothing, is forgotten.
const CLEARED: u32 = 1;

/// `SEQ_NEEDS_INCREMENTAL_STATE`.
const NEEDS: u32 = 2;

/// The packets, as they are written.
struct Packets<'w, W> {
    out: &'w mut W,
    origin_ns: i64,
    any: bool,
    phases: HashSet<u64>,
}

impl<W: Write> Sink for Packets<'_, W> {
    fn begin(&mut self, origin_ns: i64, _: &Value) -> io::Result<()> {
        self.origin_ns = origin_ns;
        Ok(())
    }

    fn put(&mut self, event: &Event<'_>) -> io::Result<()> {
        match event.ph {
            Phase::Metadata => self.describe(event),
            Phase::Complete => {
                let start = event.ts.map_or(0, |ts| ts.0);
                let end = start.saturating_add(event.dur.map_or(0, |dur| dur.0));
                self.event(start, track_event(event, Type::SliceBegin))?;
                let end_of = TrackEvent {
                    r#type: Type::SliceEnd.into(),
                    track_uuid: uuid(event),
                    ..TrackEvent::default()
                };
                self.event(end, end_of)
            }
            Phase::Instant => self.at(event, track_event(event, Type::Instant)),
            Phase::AsyncBegin => {
                self.phase(event)?;
                self.at(event, track_event(event, Type::SliceBegin))
            }
            Phase::AsyncEnd => self.at(event, track_event(event, Type::SliceEnd)),
            Phase::FlowStart | Phase::FlowEnd => {
                let phase = if event.ph == Phase::FlowStart {
                    b's'
                } else {
                    b'f'
                };
                let legacy = LegacyEvent {
                    phase: phase.into(),
                    unscoped_id: event.id,
                    bind_to_enclosing: true,
                };
                let flow = TrackEvent {
                    legacy_event: Some(legacy),
                    ..track_event(event, Type::Unspecified)
                };
                self.at(event, flow)
            }
        }
    }

    fn end(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<W: Write> Packets<'_, W> {
    /// A process's or thread's row and its name. Rows are in the order of their descriptions.
    fn describe(&mut self, event: &Event<'_>) -> io::Result<()> {
        let Some(name) = event.args.get("name").and_then(Value::as_str) else {
            return Ok(());
        };
        let name = name.to_owned();
        let pid = number(event.pid);
        let mut descriptor = TrackDescriptor {
            uuid: uuid(event),
            ..TrackDescriptor::default()
        };
        match event.tid {
            None => {
                descriptor.process = Some(ProcessDescriptor {
                    pid,
                    process_name: name,
                });
            }
            Some(tid) => {
                descriptor.parent_uuid = of_process(event.pid);
                descriptor.thread = Some(ThreadDescriptor {
                    pid,
                    tid: number(tid),
                    thread_name: name,
                });
            }
        }
        self.packet(Packet {
            track_descriptor: Some(descriptor),
            ..Packet::default()
        })
    }

    /// A row for a phase that belongs to no thread.
    fn phase(&mut self, event: &Event<'_>) -> io::Result<()> {
        let uuid = uuid(event);
        if !self.phases.insert(uuid) {
            return Ok(());
        }
        let descriptor = TrackDescriptor {
            uuid,
            name: event.name.to_owned(),
            parent_uuid: of_process(event.pid),
            ..TrackDescriptor::default()
        };
        self.packet(Packet {
            track_descriptor: Some(descriptor),
            ..Packet::default()
        })
    }

    fn at(&mut self, event: &Event<'_>, what: TrackEvent) -> io::Result<()> {
        self.event(event.ts.map_or(0, |ts| ts.0), what)
    }

    fn event(&mut self, at: i64, what: TrackEvent) -> io::Result<()> {
        let timestamp = u64::try_from(at.saturating_add(self.origin_ns)).unwrap_or(0);
        self.packet(Packet {
            timestamp: Some(timestamp),
            track_event: Some(what),
            ..Packet::default()
        })
    }

    fn packet(&mut self, mut packet: Packet) -> io::Result<()> {
        packet.trusted_packet_sequence_id = 1;
        packet.sequence_flags = if self.any { NEEDS } else { CLEARED | NEEDS };
        self.any = true;
        let mut bytes = Vec::with_capacity(packet.encoded_len() + 8);
        prost::encoding::message::encode(1, &packet, &mut bytes);
        self.out.write_all(&bytes)
    }
}

fn track_event(event: &Event<'_>, r#type: Type) -> TrackEvent {
    let categories = Some(event.cat).filter(|cat| !cat.is_empty());
    TrackEvent {
        debug_annotations: event.args.iter().map(annotation).collect(),
        legacy_event: None,
        r#type: r#type.into(),
        track_uuid: uuid(event),
        categories: categories.map(str::to_owned).into_iter().collect(),
        name: event.name.to_owned(),
    }
}

fn annotation((name, value): (&String, &Value)) -> DebugAnnotation {
    let mut annotation = DebugAnnotation {
        name: name.clone(),
        ..DebugAnnotation::default()
    };
    match value {
        Value::Bool(value) => annotation.bool_value = Some(*value),
        Value::String(value) => annotation.string_value = Some(value.clone()),
        Value::Number(number) => {
            annotation.uint_value = number.as_u64();
            if annotation.uint_value.is_none() {
                annotation.int_value = number.as_i64();
            }
            if annotation
                .uint_value
                .or(annotation.int_value.map(|_| 0))
                .is_none()
            {
                annotation.double_value = number.as_f64();
            }
        }
        other => annotation.string_value = Some(other.to_string()),
    }
    annotation
}

/// The row that an event belongs to. No two rows share a number: pids in a trace are below 2³⁰, a
/// thread's number has its pid above it, and the top bits tell the kinds of rows apart.
fn uuid(event: &Event<'_>) -> u64 {
    match (event.ph, event.tid) {
        (Phase::AsyncBegin | Phase::AsyncEnd, _) => PHASE | event.id.unwrap_or(0),
        (_, Some(tid)) => of_thread(event.pid, tid),
        (_, None) => of_process(event.pid),
    }
}

const PROCESS: u64 = 1 << 63;
const PHASE: u64 = 1 << 62;

fn of_process(pid: u64) -> u64 {
    PROCESS | (pid & 0xffff_ffff)
}

fn of_thread(pid: u64, tid: u64) -> u64 {
    (pid & 0x3fff_ffff) << 32 | (tid & 0xffff_ffff)
}

fn number(id: u64) -> i32 {
    i32::try_from(id & 0x7fff_ffff).unwrap_or(0)
}
