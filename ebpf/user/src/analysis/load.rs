//! Reads a recording into one timeline a thread.

use std::collections::{BTreeMap, HashMap};
use std::io::Read;
use std::iter::successors;
use std::mem;
use std::path::Path;
use std::sync::Arc;

use blackout_abi::Edge;

use super::loss::{Loss, Losses};
use super::scan::{self, Windows};
use super::spans::{self, Event, Meaning, Point, Problem, Span};
use crate::recording::{
    Cost, Ending, Error, Frame, Header, Hit, Ioctl, KernelFn, Reader, Relation, VcpuEdges, VcpuGap,
    VcpuGuest,
};

/// A whole recording, by process and thread. Times are its host's `CLOCK_MONOTONIC`, ns.
#[derive(Debug)]
pub struct Loaded {
    /// The file's name, for messages.
    pub name: String,
    /// Where and how it was made.
    pub header: Header,
    /// Whether the recorder finished it.
    pub ending: Ending,
    /// When events were lost, and how many.
    pub lost: Losses,
    /// What recording cost, where the recorder said so.
    pub cost: Option<Cost>,
    /// Hits of probes that the recording does not define: they cannot be read.
    pub undefined_hits: u64,
    /// Events that were not kept, because there were more of them than a report can be about.
    pub left_out: u64,
    /// When its first event was, ns, be it kept or not.
    pub first_ns: Option<u64>,
    /// The recording that this one was joined to, by its header, and how this one's clock relates to
    /// that one's.
    pub joined: Option<(Header, Relation)>,
    /// The processes, by pid.
    pub processes: BTreeMap<u32, Process>,
}

/// At most so many events are kept of a recording: a third of a GiB.
const MOST: u64 = 2 << 20;

/// What of a recording is understood only when all of it was read.
struct Open {
    windows: Windows,
    meanings: HashMap<u32, Arc<Meaning>>,
    hits: HashMap<(u32, u32), Hits>,
    lost: Vec<Loss>,
    /// Events that are kept.
    kept: u64,
}

impl Open {
    fn new(windows: Windows) -> Self {
        Self {
            windows,
            meanings: HashMap::new(),
            hits: HashMap::new(),
            lost: Vec::new(),
            kept: 0,
        }
    }
}

/// The hits of a thread that are kept.
#[derive(Default)]
struct Hits {
    events: Vec<Event>,
    /// How many of the last ones are begins outside of all windows. With their ends they go away.
    open: usize,
}

impl Hits {
    /// Keeps a hit, unless it is outside of all windows and makes, or made, no span that reaches into
    /// one. Says how many more or fewer are kept.
    fn take(&mut self, event: Event, is_inside: bool) -> i64 {
        let closes = |last: &Event| {
            last.meaning.row == event.meaning.row && last.meaning.provider == event.meaning.provider
        };
        match (is_inside, event.meaning.edge) {
            (true, _) => self.open = 0,
            (false, Edge::Point) => return 0,
            (false, Edge::Begin) => self.open += 1,
            (false, Edge::End) if self.events.is_empty() => return 0,
            (false, Edge::End) => {
                if self.open > 0 && self.events.last().is_some_and(closes) {
                    self.open -= 1;
                    self.events.pop();
                    return -1;
                }
                self.open = 0;
            }
        }
        self.events.push(event);
        1
    }
}

/// A process of a recording.
#[derive(Debug, Default)]
pub struct Process {
    /// Its name; empty when the recording does not say.
    pub comm: String,
    /// Its executable.
    pub exe: String,
    /// The threads that did something, by tid.
    pub threads: BTreeMap<u32, Thread>,
}

/// What a thread did, each list in order of time.
#[derive(Debug, Default)]
pub struct Thread {
    /// Its name; empty when the recording does not say.
    pub name: String,
    /// Its spans: a parent before its children.
    pub spans: Vec<Span>,
    /// Its moments.
    pub points: Vec<Point>,
    /// Where its probes do not pair.
    pub problems: Vec<Problem>,
    /// Whether the kernel was seen to do something for it.
    pub has_kernel: bool,
    /// Its KVM ioctls.
    pub ioctls: Vec<Ioctl>,
    /// Kernel functions it was seen in.
    pub functions: Vec<KernelFn>,
    /// The bounds of its KVM_RUN calls, if it is a vCPU.
    pub edges: Option<VcpuEdges>,
    /// Where it stayed out of KVM_RUN.
    pub gaps: Vec<VcpuGap>,
    /// When it left guest code and entered it again, where the kernel tells.
    pub guest: Vec<VcpuGuest>,
}

impl Thread {
    /// The spans that are open at `ts_ns`, the innermost first.
    pub fn spans_at(&self, ts_ns: u64) -> impl Iterator<Item = &Span> {
        self.spans_before(ts_ns)
            .filter(move |span| ts_ns < span.end_ns)
    }

    /// The last span that began by `ts_ns`, and those around it, the innermost first. All that are
    /// open at `ts_ns` are among them, since spans nest.
    pub fn spans_before(&self, ts_ns: u64) -> impl Iterator<Item = &Span> {
        let spans = &self.spans;
        let last = spans
            .partition_point(|span| span.start_ns <= ts_ns)
            .checked_sub(1);
        let around = move |span: &&'_ Span| spans.get(span.parent?);
        successors(last.and_then(|index| spans.get(index)), around)
    }
}

impl Loaded {
    /// Reads all of `reader`, which is one recording, or two that were joined; `name` is what
    /// messages call it.
    ///
    /// # Errors
    /// What the reader returns; a cut recording is none.
    pub fn read<R: Read>(name: String, reader: Reader<R>) -> Result<Vec<Self>, Error> {
        Self::within(name, reader, Vec::new())
    }

    /// Reads of the file at `path` what migrations need of it, which takes memory for them and not for
    /// the recording. What can be read only once is read whole.
    ///
    /// # Errors
    /// As for [`Loaded::read`].
    pub fn read_migrations(path: &Path) -> Result<Vec<Self>, Error> {
        let windows = if path.is_file() {
            scan::windows(Reader::open(path)?)?
        } else {
            Vec::new()
        };
        Self::within(path.display().to_string(), Reader::open(path)?, windows)
    }

    /// Keeps of each recording what lies in its windows; of one that has none, all.
    fn within<R: Read>(
        name: String,
        mut reader: Reader<R>,
        windows: Vec<Windows>,
    ) -> Result<Vec<Self>, Error> {
        let mut windows = windows.into_iter();
        let mut next = || Open::new(windows.next().unwrap_or_else(Windows::all));
        let mut loaded = Vec::new();
        let mut one = Self::new(&name);
        let mut open = next();
        let mut before = reader.ending();
        while let Some(frame) = reader.next() {
            let frame = frame?;
            if let Frame::Joined(relation) = frame {
                let first = loaded.first().unwrap_or(&one).header.clone();
                one.finish(before, mem::replace(&mut open, next()));
                let next = Self::new(&name);
                loaded.push(mem::replace(&mut one, next));
                one.joined = Some((first, relation));
            } else {
                one.take(frame, &mut open);
            }
            before = reader.ending();
        }
        one.finish(reader.ending(), open);
        loaded.push(one);
        Ok(loaded)
    }

    fn new(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            header: Header::default(),
            ending: Ending::Finished,
            lost: Losses::default(),
            cost: None,
            undefined_hits: 0,
            left_out: 0,
            first_ns: None,
            joined: None,
            processes: BTreeMap::new(),
        }
    }

    fn finish(&mut self, ending: Ending, open: Open) {
        self.ending = ending;
        self.lost = Losses::new(open.lost);
        for ((pid, tid), hits) in open.hits {
            let paired = spans::pair(hits.events);
            let thread = self.thread(pid, tid);
            (thread.spans, thread.points) = (paired.spans, paired.points);
            thread.problems = paired.problems;
        }
        for thread in self
            .processes
            .values_mut()
            .flat_map(|process| process.threads.values_mut())
        {
            thread.ioctls.sort_by_key(|ioctl| ioctl.enter_ns);
            thread.functions.sort_by_key(|function| function.enter_ns);
            thread.gaps.sort_by_key(|gap| gap.exit_ns);
        }
    }

    fn take(&mut self, frame: Frame, open: &mut Open) {
        match frame {
            Frame::Header(header) => self.header = header,
            Frame::Process(process) => {
                let known = self.processes.entry(process.pid).or_default();
                (known.comm, known.exe) = (process.comm, process.exe);
            }
            Frame::Thread(thread) => self.thread(thread.pid, thread.tid).name = thread.name,
            Frame::Probe(def) => {
                open.meanings.insert(def.id, Arc::new(Meaning::of(&def)));
            }
            Frame::Hit(Hit {
                ts_ns,
                pid,
                tid,
                probe,
                args,
            }) => match open.meanings.get(&probe) {
                Some(meaning) => {
                    self.began(ts_ns);
                    let event = Event {
                        ts_ns,
                        meaning: Arc::clone(meaning),
                        values: args,
                    };
                    if open.kept >= MOST {
                        self.left_out += 1;
                        return;
                    }
                    let is_inside = open.windows.meet(ts_ns, ts_ns);
                    let hits = open.hits.entry((pid, tid)).or_default();
                    let more = hits.take(event, is_inside);
                    open.kept = open.kept.saturating_add_signed(more);
                }
                None => self.undefined_hits += 1,
            },
            Frame::Ioctl(ioctl) => {
                let thread = self.thread(ioctl.pid, ioctl.tid);
                thread.has_kernel = true;
                self.began(ioctl.enter_ns);
                if self.keeps(open, ioctl.enter_ns, ioctl.exit_ns) {
                    self.thread(ioctl.pid, ioctl.tid).ioctls.push(ioctl);
                }
            }
            Frame::KernelFn(function) => {
                let thread = self.thread(function.pid, function.tid);
                thread.has_kernel = true;
                self.began(function.enter_ns);
                if self.keeps(open, function.enter_ns, function.exit_ns) {
                    let thread = self.thread(function.pid, function.tid);
                    thread.functions.push(function);
                }
            }
            Frame::VcpuEdges(edges) => self.thread(edges.pid, edges.tid).edges = Some(edges),
            Frame::VcpuGap(gap) => {
                self.began(gap.exit_ns);
                if self.keeps(open, gap.exit_ns, gap.enter_ns) {
                    self.thread(gap.pid, gap.tid).gaps.push(gap);
                }
            }
            Frame::VcpuGuest(guest) => {
                // One that stays out left long before, maybe.
                let until_ns = guest.entered_ns.unwrap_or(u64::MAX);
                if self.keeps(open, guest.left_ns.unwrap_or(until_ns), until_ns) {
                    self.thread(guest.pid, guest.tid).guest.push(guest);
                }
            }
            Frame::Lost {
                since_ns,
                at_ns,
                count,
            } => open.lost.push(Loss {
                since_ns,
                until_ns: at_ns,
                count,
            }),
            Frame::Cost(cost) => self.cost = Some(cost),
            Frame::Clock(_) | Frame::End { .. } | Frame::Joined(_) => {}
        }
    }

    /// Whether what lies between the two times is kept, which counts it.
    fn keeps(&mut self, open: &mut Open, start_ns: u64, end_ns: u64) -> bool {
        if !open.windows.meet(start_ns, end_ns) {
            return false;
        }
        if open.kept >= MOST {
            self.left_out += 1;
            return false;
        }
        open.kept += 1;
        true
    }

    fn began(&mut self, at_ns: u64) {
        self.first_ns = Some(self.first_ns.map_or(at_ns, |before| before.min(at_ns)));
    }

    fn thread(&mut self, pid: u32, tid: u32) -> &mut Thread {
        self.processes
            .entry(pid)
            .or_default()
            .threads
            .entry(tid)
            .or_default()
    }
}
