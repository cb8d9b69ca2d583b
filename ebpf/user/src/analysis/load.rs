//! Reads a recording into one timeline a thread.

use std::collections::{BTreeMap, HashMap};
use std::io::Read;
use std::mem;
use std::path::Path;
use std::sync::Arc;

use blackout_abi::Edge;

use super::loss::{self, Loss, Losses};
use super::migration::WHOLES;
use super::scan::{self, Windows};
use super::spans::{self, Event, Meaning};
use super::thread::{Process, Thread};
use crate::recording::{
    Cost, Ending, Error, Frame, Header, Hit, ProbeDef, Reader, Relation, Stored, Value,
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
    /// Where the rest of it is, if not all of it is here.
    pub(super) again: Option<Again>,
}

/// A recording in a file.
#[derive(Debug)]
pub(super) struct Again {
    pub(super) file: Arc<Stored>,
    /// How many recordings precede it there.
    pub(super) index: usize,
}

/// At most so many events are kept of a recording, of [`UNIT`] bytes each: a third of a GiB.
const MOST: u64 = 2 << 20;

/// The bytes of an event's strings that count as one more event.
const UNIT: usize = 128;

/// At most so many processes, and threads, and kinds of probes: above what any host has.
const MOST_TASKS: usize = 1 << 16;
const MOST_PROBES: usize = 1 << 12;

/// At most so many migrations are kept, and fewer where there are many threads: each migration is
/// looked for on each thread.
const MOST_MIGRATIONS: usize = 1 << 14;
const MOST_LOOKS: usize = 1 << 24;

/// What of a recording is understood only when all of it was read.
struct Open {
    windows: Windows,
    meanings: HashMap<u32, Arc<Meaning>>,
    hits: HashMap<(u32, u32), Hits>,
    lost: Vec<Loss>,
    /// Events that are kept.
    kept: u64,
    /// Processes and threads that are kept.
    tasks: usize,
    /// Migrations that are kept.
    migrations: usize,
}

impl Open {
    fn new(windows: Windows) -> Self {
        Self {
            windows,
            meanings: HashMap::new(),
            hits: HashMap::new(),
            lost: Vec::new(),
            kept: 0,
            tasks: 0,
            migrations: 0,
        }
    }

    /// Whether there is room for another process or thread, which is then taken.
    fn has_task(&mut self) -> bool {
        let has_task = self.tasks < MOST_TASKS && self.tasks * self.migrations < MOST_LOOKS;
        self.tasks += usize::from(has_task);
        has_task
    }

    /// Whether there is room for a hit of a probe, as far as it says that a migration begins.
    fn has_migration(&mut self, meaning: &Meaning) -> bool {
        if !WHOLES.contains(&meaning.row.as_str()) {
            return true;
        }
        let has_migration =
            self.migrations < MOST_MIGRATIONS && self.tasks * self.migrations < MOST_LOOKS;
        self.migrations += usize::from(has_migration && meaning.edge == Edge::Begin);
        has_migration
    }

    /// Whether there is room for an event with so many bytes of strings, which is then taken.
    fn has_room(&mut self, bytes: usize) -> bool {
        let has_room = self.kept < MOST;
        if has_room {
            self.kept += 1 + (bytes / UNIT) as u64;
        }
        has_room
    }
}

/// Adds what a probe means, if there is room.
pub(super) fn define(meanings: &mut HashMap<u32, Arc<Meaning>>, def: &ProbeDef) {
    if meanings.len() < MOST_PROBES || meanings.contains_key(&def.id) {
        meanings.insert(def.id, Arc::new(Meaning::of(def)));
    }
}

/// How many bytes the strings among a probe's arguments have.
pub(super) fn bytes_of(args: &[Value]) -> usize {
    let strings = args.iter().map(|arg| match arg {
        Value::Str(value) => value.len(),
        _ => 0,
    });
    strings.sum()
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
    /// one. Says how much more or less is kept.
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
                    return self.events.pop().map_or(0, |begin| -weight(&begin));
                }
                self.open = 0;
            }
        }
        let more = weight(&event);
        self.events.push(event);
        more
    }
}

/// What a hit takes of a recording's room.
fn weight(event: &Event) -> i64 {
    1 + (bytes_of(&event.values) / UNIT) as i64
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
    /// the recording. [`Loaded::parts`] has the rest.
    ///
    /// # Errors
    /// As for [`Loaded::read`].
    pub fn read_migrations(path: &Path) -> Result<Vec<Self>, Error> {
        let file = Arc::new(Stored::open(path)?);
        let windows = scan::windows(file.reader()?)?;
        let mut loaded = Self::within(file.name().to_owned(), file.reader()?, windows)?;
        for (index, one) in loaded.iter_mut().enumerate() {
            let file = Arc::clone(&file);
            one.again = Some(Again { file, index });
        }
        Ok(loaded)
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
            again: None,
        }
    }

    fn finish(&mut self, ending: Ending, open: Open) {
        self.ending = ending;
        self.lost = Losses::new(open.lost);
        for ((pid, tid), hits) in open.hits {
            let process = self.processes.get_mut(&pid);
            if let Some(thread) = process.and_then(|process| process.threads.get_mut(&tid)) {
                *thread = mem::take(thread).with(spans::pair(hits.events));
            }
        }
        for thread in self
            .processes
            .values_mut()
            .flat_map(|process| process.threads.values_mut())
        {
            thread.ioctls.sort_by_key(|ioctl| ioctl.enter_ns);
            thread.functions.sort_by_key(|function| function.enter_ns);
            thread.gaps.sort_by_key(|gap| gap.exit_ns);
            thread.left.sort_unstable();
            thread.entered.sort_unstable();
            thread.seen = thread.first_and_last();
        }
    }

    fn take(&mut self, frame: Frame, open: &mut Open) {
        match frame {
            Frame::Header(header) => self.header = header,
            Frame::Process(process) => {
                if let Some(known) = self.process(open, process.pid) {
                    (known.comm, known.exe) = (process.comm, process.exe);
                }
            }
            Frame::Thread(told) => {
                if let Some(thread) = self.thread(open, told.pid, told.tid) {
                    thread.name = told.name;
                }
            }
            Frame::Probe(def) => define(&mut open.meanings, &def),
            Frame::Hit(hit) => self.hit(hit, open),
            Frame::Ioctl(ioctl) => {
                self.began(ioctl.enter_ns);
                let keeps = open.windows.meet(ioctl.enter_ns, ioctl.exit_ns);
                if let Some(thread) = self.kernel(open, ioctl.pid, ioctl.tid, keeps.then_some(0)) {
                    thread.ioctls.push(ioctl);
                }
            }
            Frame::KernelFn(one) => {
                self.began(one.enter_ns);
                let keeps = open.windows.meet(one.enter_ns, one.exit_ns);
                let bytes = one.function.len();
                if let Some(thread) = self.kernel(open, one.pid, one.tid, keeps.then_some(bytes)) {
                    thread.functions.push(one);
                }
            }
            Frame::VcpuEdges(edges) => {
                if let Some(thread) = self.thread(open, edges.pid, edges.tid) {
                    thread.edges = Some(edges);
                }
            }
            Frame::VcpuGap(gap) => {
                self.began(gap.exit_ns);
                let keeps = open.windows.meet(gap.exit_ns, gap.enter_ns);
                if let Some(thread) = self.keep(open, gap.pid, gap.tid, keeps.then_some(0)) {
                    thread.gaps.push(gap);
                }
            }
            Frame::VcpuGuest(guest) => {
                // One that stays out left long before, maybe.
                let until_ns = guest.entered_ns.unwrap_or(u64::MAX);
                let keeps = open
                    .windows
                    .meet(guest.left_ns.unwrap_or(until_ns), until_ns);
                if let Some(thread) = self.keep(open, guest.pid, guest.tid, keeps.then_some(0)) {
                    thread.left.extend(guest.left_ns);
                    thread.entered.extend(guest.entered_ns);
                }
            }
            Frame::Lost {
                since_ns,
                at_ns,
                count,
            } => {
                let until_ns = at_ns;
                let loss = Loss {
                    since_ns,
                    until_ns,
                    count,
                };
                loss::add(&mut open.lost, loss, loss::MOST);
            }
            Frame::Cost(cost) => self.cost = Some(cost),
            Frame::Clock(_) | Frame::End { .. } | Frame::Joined(_) => {}
        }
    }

    fn hit(&mut self, hit: Hit, open: &mut Open) {
        let Some(meaning) = open.meanings.get(&hit.probe).map(Arc::clone) else {
            self.undefined_hits += 1;
            return;
        };
        let (task, ts_ns) = ((hit.pid, hit.tid), hit.ts_ns);
        self.began(ts_ns);
        if self.thread(open, hit.pid, hit.tid).is_none() {
            return;
        }
        if open.kept >= MOST || !open.has_migration(&meaning) {
            self.left_out += 1;
            return;
        }
        let event = Event {
            ts_ns,
            meaning,
            values: hit.args,
        };
        let is_inside = open.windows.meet(ts_ns, ts_ns);
        let more = open.hits.entry(task).or_default().take(event, is_inside);
        open.kept = open.kept.saturating_add_signed(more);
    }

    /// The thread that the kernel did something for, which is kept if its bytes of strings are given.
    fn kernel(
        &mut self,
        open: &mut Open,
        pid: u32,
        tid: u32,
        bytes: Option<usize>,
    ) -> Option<&mut Thread> {
        self.thread(open, pid, tid)?.has_kernel = true;
        self.keep(open, pid, tid, bytes)
    }

    /// The thread, if what happened on it is to be kept, and can be.
    fn keep(
        &mut self,
        open: &mut Open,
        pid: u32,
        tid: u32,
        bytes: Option<usize>,
    ) -> Option<&mut Thread> {
        if !open.has_room(bytes?) {
            self.left_out += 1;
            return None;
        }
        self.thread(open, pid, tid)
    }

    fn began(&mut self, at_ns: u64) {
        self.first_ns = Some(self.first_ns.map_or(at_ns, |before| before.min(at_ns)));
    }

    fn process(&mut self, open: &mut Open, pid: u32) -> Option<&mut Process> {
        if !self.processes.contains_key(&pid) && !open.has_task() {
            self.left_out += 1;
            return None;
        }
        Some(self.processes.entry(pid).or_default())
    }

    /// The thread that a frame is about; `None`, which is counted, for one too many.
    fn thread(&mut self, open: &mut Open, pid: u32, tid: u32) -> Option<&mut Thread> {
        let known = self.processes.get(&pid);
        if !known.is_some_and(|process| process.threads.contains_key(&tid)) && !open.has_task() {
            self.left_out += 1;
            return None;
        }
        let threads = &mut self.processes.entry(pid).or_default().threads;
        Some(threads.entry(tid).or_default())
    }
}
