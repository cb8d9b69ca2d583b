//! Recordings out of what `perf script` prints of `blackout-vmm`'s probes.
//!
//! perf has the arguments as numbers, so a string is an address. Those of string literals lie in the
//! program's file, which [`Strings`] reads; others, such as a migration's URI, are unreadable. perf sees
//! no KVM_RUN: a vCPU's first is taken to be where `vcpu_first_run` fires, right before it, and its last
//! to end where `vcpu_paused` does.

use std::collections::BTreeMap;
use std::io::{BufRead, Write};
use std::path::{Path, PathBuf};

use blackout_abi::probes::{ArgKind, PROBES, PROVIDER, Probe};
use object::{Object, ObjectSection};
use thiserror::Error;

use crate::recording::{
    self, ArgDef, ClockAnchor, Frame, Header, Hit, ProbeDef, Process, Thread, Value, ValueKind,
    VcpuEdges, Writer,
};
use crate::usdt::{self, Binary};

/// Longer than any string literal that a probe names.
const STRING_MAX: usize = 64;

/// What perf puts before a provider's name.
const GROUP: &str = "sdt_";

/// Why there is no recording.
#[derive(Debug, Error)]
pub enum Error {
    /// The text could not be read.
    #[error("cannot read what perf printed")]
    Read(#[source] std::io::Error),
    /// A line of a probe is not as `perf script` prints it.
    #[error(
        "line {line}: {what}; use `perf script --ns -F comm,pid,tid,time,event,trace`, \
         of `perf record -k CLOCK_MONOTONIC -e 'sdt_vmm:*'`"
    )]
    Line {
        /// Which, from 1.
        line: usize,
        /// What is wrong with it.
        what: &'static str,
    },
    /// No line is of a probe.
    #[error("no line is of one of blackout-vmm's probes, {GROUP}{PROVIDER}:*")]
    Nothing,
    /// The program could not be read.
    #[error("cannot read {}", .0.display())]
    Program(PathBuf, #[source] std::io::Error),
    /// It has no literals.
    #[error("{}: no section .rodata", .0.display())]
    Literals(PathBuf, #[source] Option<object::Error>),
    /// Its probes could not be read.
    #[error(transparent)]
    Probes(#[from] usdt::Error),
    /// The recording could not be written.
    #[error(transparent)]
    Write(#[from] recording::Error),
}

/// String literals of the program whose probes fired.
#[derive(Debug, Default)]
pub struct Strings {
    /// The section of the literals, and where it is in the file. What lies behind the program in
    /// memory, such as its heap, is something else in the file.
    literals: Vec<u8>,
    start: u64,
    /// Where each probe is in the file; one that has several places tells nothing.
    sites: BTreeMap<String, u64>,
}

impl Strings {
    /// Those of the program at `path`, whose segments have to lie in memory as they do in the file, as
    /// `blackout-vmm`'s do.
    ///
    /// # Errors
    /// [`Error::Program`], [`Error::Literals`] and [`Error::Probes`].
    pub fn of(path: &Path) -> Result<Self, Error> {
        let binary = Binary::open(path)?;
        let file = std::fs::read(path).map_err(|source| Error::Program(path.to_owned(), source))?;
        let none = |source| Error::Literals(path.to_owned(), source);
        let parsed = object::File::parse(file.as_slice()).map_err(|error| none(Some(error)))?;
        let section = parsed.section_by_name(".rodata");
        let section = section.ok_or_else(|| none(None))?;
        let (start, _) = section.file_range().ok_or_else(|| none(None))?;
        let literals = section.data().map_err(|error| none(Some(error)))?;
        let mut sites = BTreeMap::new();
        let mut several = Vec::new();
        for site in binary.sites {
            if sites.insert(site.name.clone(), site.offset).is_some() {
                several.push(site.name);
            }
        }
        sites.retain(|name, _| !several.contains(name));
        Ok(Self {
            literals: literals.to_vec(),
            start,
            sites,
        })
    }

    /// The string at `address` of the process in which the probe was at `site`.
    fn at(&self, probe: &str, site: u64, address: u64) -> Option<String> {
        let moved = site.checked_sub(*self.sites.get(probe)?)?;
        let offset = address.checked_sub(moved)?.checked_sub(self.start)?;
        let bytes = self.literals.get(usize::try_from(offset).ok()?..)?;
        let length = bytes.iter().take(STRING_MAX).position(|byte| *byte == 0)?;
        let text = std::str::from_utf8(bytes.get(..length)?).ok()?;
        let is_text = !text.is_empty() && !text.chars().any(char::is_control);
        is_text.then(|| text.to_owned())
    }
}

/// One line of a probe.
struct Line<'a> {
    comm: &'a str,
    pid: u32,
    tid: u32,
    ns: u64,
    id: usize,
    probe: &'static Probe,
    site: u64,
    args: Vec<i128>,
}

/// Writes a recording of what `perf script` printed; how many probes fired.
///
/// # Errors
/// See [`enum@Error`].
pub fn perf(
    text: impl BufRead,
    strings: &Strings,
    out: impl Write,
    name: String,
) -> Result<usize, Error> {
    let mut frames = Vec::new();
    let mut tasks = BTreeMap::new();
    for (index, line) in text.lines().enumerate() {
        let line = line.map_err(Error::Read)?;
        let parsed = parse(&line).map_err(|what| Error::Line {
            line: index + 1,
            what,
        })?;
        let Some(line) = parsed else { continue };
        tasks.insert((line.pid, line.tid), line.comm.to_owned());
        if line.probe.name == "vcpu_first_run" {
            frames.push((line.ns, Frame::VcpuEdges(first_run(&line))));
        }
        frames.push((line.ns, Frame::Hit(hit(&line, strings))));
    }
    frames.sort_by_key(|(ns, _)| *ns);
    let (Some(first), Some(last)) = (frames.first(), frames.last()) else {
        return Err(Error::Nothing);
    };
    let (first, last) = (first.0, last.0);
    let mut writer = Writer::new(name, out, header(first))?;
    for (pid, tid) in tasks.keys() {
        // perf names threads only; the main one's name is the program's.
        if pid == tid || !tasks.contains_key(&(*pid, *pid)) {
            writer.write(&Frame::Process(Process {
                pid: *pid,
                comm: "blackout-vmm".to_owned(),
                exe: String::new(),
            }))?;
        }
    }
    for ((pid, tid), name) in tasks {
        writer.write(&Frame::Thread(Thread { pid, tid, name }))?;
    }
    for probe in definitions() {
        writer.write(&Frame::Probe(probe))?;
    }
    let hits = frames
        .iter()
        .filter(|(_, frame)| matches!(frame, Frame::Hit(_)));
    let hits = hits.count();
    for (_, frame) in frames {
        writer.write(&frame)?;
    }
    writer.finish(last)?.flush().map_err(Error::Read)?;
    Ok(hits)
}

/// `COMM PID/TID SECONDS: sdt_vmm:PROBE: (SITE) arg1=N …`; `None` of other events.
fn parse(line: &str) -> Result<Option<Line<'_>>, &'static str> {
    let group = format!(" {GROUP}{PROVIDER}:");
    let Some((task, event)) = line.split_once(&group) else {
        return Ok(None);
    };
    let task = task.trim().strip_suffix(':').ok_or("no time")?;
    let (task, time) = task.rsplit_once(' ').ok_or("no time")?;
    let (comm, ids) = task
        .trim()
        .rsplit_once(' ')
        .ok_or("no process and thread")?;
    let (pid, tid) = ids.split_once('/').ok_or("no process and thread")?;
    let number = |text: &str| text.parse().map_err(|_| "no process and thread");
    let (name, rest) = event.split_once(": (").ok_or("no probe")?;
    let (site, args) = rest.split_once(')').ok_or("no address")?;
    // A probe of several places has events with numbers at their ends.
    let place = |name: &str| PROBES.iter().position(|probe| probe.name == name);
    let whole = name.rsplit_once('_').map_or(name, |(name, _)| name);
    let id = place(name).or_else(|| place(whole));
    let id = id.ok_or("a probe that this tool does not know")?;
    let probe = PROBES.get(id).ok_or("no probe")?;
    let values = args.split_whitespace().map(|arg| {
        let (_, value) = arg.split_once('=').ok_or("an argument without a value")?;
        let hex = value
            .strip_prefix("0x")
            .map(|hex| i128::from_str_radix(hex, 16));
        hex.unwrap_or_else(|| value.parse())
            .map_err(|_| "an argument that is no number")
    });
    Ok(Some(Line {
        comm: comm.trim(),
        pid: number(pid)?,
        tid: number(tid)?,
        ns: nanoseconds(time).ok_or("no time")?,
        id,
        probe,
        site: u64::from_str_radix(site, 16).map_err(|_| "no address")?,
        args: values.collect::<Result<_, _>>()?,
    }))
}

/// Seconds with a fraction, as nanoseconds.
fn nanoseconds(text: &str) -> Option<u64> {
    let (seconds, fraction) = text.split_once('.')?;
    let digits = u32::try_from(fraction.len()).ok()?;
    let fraction: u64 = fraction.parse().ok()?;
    let fraction = fraction.checked_mul(10_u64.checked_pow(9_u32.checked_sub(digits)?)?)?;
    let seconds: u64 = seconds.parse().ok()?;
    seconds.checked_mul(1_000_000_000)?.checked_add(fraction)
}

fn hit(line: &Line<'_>, strings: &Strings) -> Hit {
    let args = line.probe.args.iter().enumerate().map(|(place, arg)| {
        let Some(value) = line.args.get(place) else {
            return Value::Unreadable;
        };
        // perf prints 64 bits, with or without a sign.
        let bits = *value as u64;
        match arg.kind {
            ArgKind::U64 => Value::U64(bits),
            ArgKind::I64 => Value::I64(bits.cast_signed()),
            ArgKind::Str => strings
                .at(line.probe.name, line.site, bits)
                .map_or(Value::Unreadable, Value::Str),
        }
    });
    Hit {
        ts_ns: line.ns,
        pid: line.pid,
        tid: line.tid,
        probe: line.id as u32,
        args: args.collect(),
    }
}

fn first_run(line: &Line<'_>) -> VcpuEdges {
    VcpuEdges {
        pid: line.pid,
        tid: line.tid,
        vcpu: line.args.first().and_then(|i| u32::try_from(*i).ok()),
        first_enter_ns: line.ns,
        last_enter_ns: line.ns,
        last_exit_ns: 0,
        runs: 1,
    }
}

/// How a recording defines the monitor's own probes. Their ids are their places in the table.
pub fn definitions() -> impl Iterator<Item = ProbeDef> {
    (0..).zip(PROBES).map(|(id, probe)| definition(id, probe))
}

fn definition(id: u32, probe: &Probe) -> ProbeDef {
    let args = probe.args.iter().map(|arg| ArgDef {
        name: arg.name.to_owned(),
        kind: match arg.kind {
            ArgKind::U64 => ValueKind::U64,
            ArgKind::I64 => ValueKind::I64,
            ArgKind::Str => ValueKind::Str,
        },
    });
    ProbeDef {
        id,
        provider: PROVIDER.to_owned(),
        name: probe.name.to_owned(),
        args: args.collect(),
    }
}

/// perf's text does not say where it is from.
fn header(at_ns: u64) -> Header {
    Header {
        tool: env!("CARGO_PKG_VERSION").to_owned(),
        kernel: "unknown".to_owned(),
        arch: "unknown".to_owned(),
        hostname: "unknown".to_owned(),
        boot_id: "unknown".to_owned(),
        backends: vec!["perf".to_owned()],
        clock: ClockAnchor {
            monotonic_ns: at_ns,
            ..ClockAnchor::default()
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::recording::Reader;

    const TEXT: &str = "\
       migration 152/154 42076.608909771:          sdt_vmm:migration_stop_vm_begin: (7f64dcb43500) arg1=4096
           vcpu 0 152/153 42076.609:          sdt_vmm:vcpu_paused: (7f64dcb43520) arg1=0
       migration 152/154 42076.611116678:            sdt_vmm:migration_stop_vm_end: (7f64dcb434f0) arg1=-5
            perf 9/9 42076.7:   sched:sched_switch: prev_comm=perf
";

    fn frames(text: &str) -> Vec<Frame> {
        let mut out = Vec::new();
        perf(
            text.as_bytes(),
            &Strings::default(),
            &mut out,
            "test".into(),
        )
        .unwrap();
        let reader = Reader::new("test".into(), out.as_slice()).unwrap();
        reader.map(|frame| frame.unwrap()).collect()
    }

    #[test]
    fn lines_become_hits() {
        let frames = frames(TEXT);
        let hits = frames.iter().filter_map(|frame| match frame {
            Frame::Hit(hit) => Some(hit),
            _ => None,
        });
        let hits: Vec<_> = hits.collect();
        assert_eq!(hits.len(), 3);
        assert_eq!(hits[0].ts_ns, 42_076_608_909_771);
        assert_eq!(hits[0].args, [Value::Unreadable]);
        assert_eq!(
            (hits[1].pid, hits[1].tid, hits[1].ts_ns),
            (152, 153, 42_076_609_000_000)
        );
        assert_eq!(hits[2].args, [Value::I64(-5)]);
        let named = |name: &str| {
            frames
                .iter()
                .any(|frame| matches!(frame, Frame::Thread(thread) if thread.name == name))
        };
        assert!(named("vcpu 0") && named("migration"));
    }

    #[test]
    fn what_is_no_line_of_perfs_is_told() {
        let fails = |text: &str| {
            let result = perf(
                text.as_bytes(),
                &Strings::default(),
                Vec::new(),
                "test".into(),
            );
            result.unwrap_err().to_string()
        };
        assert!(fails("").contains("no line"));
        let bad = TEXT.replace("42076.609:", "x:");
        assert!(
            fails(&bad).starts_with("line 2: no time"),
            "{}",
            fails(&bad)
        );
        let bad = TEXT.replace("vcpu_paused", "vcpu_paws");
        assert!(
            fails(&bad).starts_with("line 2: a probe"),
            "{}",
            fails(&bad)
        );
    }
}
