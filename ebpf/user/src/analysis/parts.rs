//! A recording's threads, a part at a time: for what shows all of a recording, in memory that does not
//! grow with it.

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::mem;
use std::sync::Arc;

use super::load::{self, Again, Loaded};
use super::spans::{Event, Meaning, Pairing};
use super::thread::{Process, Thread};
use crate::recording::{Error, Frame, Ioctl, KernelFn, VcpuGap};

/// So much is held of a recording while its parts are made, each unit being an event of [`UNIT`] bytes.
/// What comes later in the file than this, but was earlier, stands in too late a part. A fuzzer's files
/// are short, and are to have parts.
const HELD: usize = if cfg!(fuzzing) { 1 << 4 } else { 1 << 17 };

/// The bytes of an event's own strings that count as one more event.
const UNIT: usize = 128;

/// What of a recording's threads is known next.
pub struct Part<'p> {
    /// Their processes. Of a thread it has what it did, after what the part before has; no names,
    /// and nothing that is told once a recording, such as a vCPU's edges.
    ///
    /// A span stands in the part in which it ended; those that have not are in it as well, marked
    /// [`open`](super::Span::open).
    pub processes: &'p BTreeMap<u32, Process>,
    /// Whether none follows.
    pub is_last: bool,
}

impl Loaded {
    /// Hands `each` the whole recording, part by part: at once if it is held, or else from its file.
    ///
    /// # Errors
    /// What `each` returns, or why the file can't be read again.
    pub fn parts(&self, mut each: impl FnMut(&Part<'_>) -> io::Result<()>) -> io::Result<()> {
        match &self.again {
            Some(again) => from_file(self, again, each),
            None => each(&Part {
                processes: &self.processes,
                is_last: true,
            }),
        }
    }
}

fn from_file(
    loaded: &Loaded,
    again: &Again,
    mut each: impl FnMut(&Part<'_>) -> io::Result<()>,
) -> io::Result<()> {
    let mut held = Held::new(loaded);
    let mut index = 0;
    for frame in again.file.reader().map_err(other)? {
        match frame.map_err(other)? {
            Frame::Joined(_) => index += 1,
            frame if index == again.index => held.take(frame),
            _ => {}
        }
        if index > again.index {
            break;
        }
        if held.weight >= HELD {
            each(&Part {
                processes: &held.earlier(),
                is_last: false,
            })?;
        }
    }
    each(&Part {
        processes: &held.rest(),
        is_last: true,
    })
}

fn other(error: Error) -> io::Error {
    io::Error::other(error)
}

/// What was read and not handed out yet.
struct Held<'l> {
    loaded: &'l Loaded,
    meanings: HashMap<u32, Arc<Meaning>>,
    threads: BTreeMap<(u32, u32), Pending>,
    /// When each of what is held was.
    times: Vec<u64>,
    weight: usize,
}

/// The same of one thread.
#[derive(Default)]
struct Pending {
    pairing: Pairing,
    hits: Vec<Event>,
    ioctls: Vec<Ioctl>,
    functions: Vec<KernelFn>,
    gaps: Vec<VcpuGap>,
}

impl<'l> Held<'l> {
    fn new(loaded: &'l Loaded) -> Self {
        Self {
            loaded,
            meanings: HashMap::new(),
            threads: BTreeMap::new(),
            times: Vec::new(),
            weight: 0,
        }
    }

    fn take(&mut self, frame: Frame) {
        match frame {
            Frame::Probe(def) => load::define(&mut self.meanings, &def),
            Frame::Hit(hit) => {
                let Some(meaning) = self.meanings.get(&hit.probe).map(Arc::clone) else {
                    return;
                };
                let bytes = load::bytes_of(&hit.args);
                if let Some(thread) = self.thread((hit.pid, hit.tid), hit.ts_ns, bytes) {
                    thread.hits.push(Event {
                        ts_ns: hit.ts_ns,
                        meaning,
                        values: hit.args,
                    });
                }
            }
            Frame::Ioctl(ioctl) => {
                let task = (ioctl.pid, ioctl.tid);
                if let Some(thread) = self.thread(task, ioctl.enter_ns, 0) {
                    thread.ioctls.push(ioctl);
                }
            }
            Frame::KernelFn(function) => {
                let task = (function.pid, function.tid);
                if let Some(thread) = self.thread(task, function.enter_ns, function.function.len())
                {
                    thread.functions.push(function);
                }
            }
            Frame::VcpuGap(gap) => {
                if let Some(thread) = self.thread((gap.pid, gap.tid), gap.exit_ns, 0) {
                    thread.gaps.push(gap);
                }
            }
            _ => {}
        }
    }

    /// The thread that something happened on; `None` for one that the recording has no room for.
    fn thread(&mut self, task: (u32, u32), at_ns: u64, bytes: usize) -> Option<&mut Pending> {
        let process = self.loaded.processes.get(&task.0)?;
        process.threads.get(&task.1)?;
        self.times.push(at_ns);
        self.weight += 1 + bytes / UNIT;
        Some(self.threads.entry(task).or_default())
    }

    /// The earlier half of what is held. The later one stays: more of that time may come.
    fn earlier(&mut self) -> BTreeMap<u32, Process> {
        let middle = self.times.len() / 2;
        let until_ns = if middle < self.times.len() {
            *self.times.select_nth_unstable(middle).1
        } else {
            u64::MAX
        };
        self.times.retain(|at_ns| *at_ns > until_ns);
        self.weight = self.times.len();
        let threads = self.threads.iter_mut().filter_map(|(task, pending)| {
            let thread = pending.until(until_ns)?;
            let paired = pending.pairing.part();
            Some((*task, thread.with(paired)))
        });
        by_process(threads)
    }

    fn rest(self) -> BTreeMap<u32, Process> {
        let threads = self.threads.into_iter().map(|(task, mut pending)| {
            let thread = pending.until(u64::MAX).unwrap_or_default();
            (task, thread.with(pending.pairing.finish()))
        });
        by_process(threads)
    }
}

impl Pending {
    /// What of it was by then, but for its spans and moments; `None` for nothing.
    fn until(&mut self, until_ns: u64) -> Option<Thread> {
        let hits = first(&mut self.hits, until_ns, |hit| hit.ts_ns);
        let thread = Thread {
            ioctls: first(&mut self.ioctls, until_ns, |ioctl| ioctl.enter_ns),
            functions: first(&mut self.functions, until_ns, |one| one.enter_ns),
            gaps: first(&mut self.gaps, until_ns, |gap| gap.exit_ns),
            ..Thread::default()
        };
        let nothing = hits.is_empty()
            && thread.ioctls.is_empty()
            && thread.functions.is_empty()
            && thread.gaps.is_empty();
        self.pairing.push(hits);
        (!nothing).then_some(thread)
    }
}

/// Takes what of `all` was by then, in order.
fn first<T>(all: &mut Vec<T>, until_ns: u64, at: impl Fn(&T) -> u64) -> Vec<T> {
    all.sort_by_key(&at);
    let until = all.partition_point(|one| at(one) <= until_ns);
    let later = all.split_off(until);
    mem::replace(all, later)
}

fn by_process(threads: impl Iterator<Item = ((u32, u32), Thread)>) -> BTreeMap<u32, Process> {
    let mut processes = BTreeMap::<u32, Process>::new();
    for ((pid, tid), thread) in threads {
        let process = processes.entry(pid).or_default();
        process.threads.insert(tid, thread);
    }
    processes
}
