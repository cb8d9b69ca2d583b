//! The recorder: programs, processes and the file, brought together.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io;
use std::mem;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::{Duration, Instant};

use aya::sys::{Stats, enable_stats};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

use super::attach::UsdtProgram;
use super::process::Process;
use super::rights::{self, Later};
use super::sites::Pattern;
use super::translate::{self, Translator};
use super::{Coverage, Error, Options, Programs, clock, process};
use crate::recording::{Cost, Frame, Header, VcpuEdges, Writer};
use crate::usdt::{self, Attachment, Uprobes};

/// The ring buffer is looked at this often, as nobody is woken for single records.
const TICK: Duration = Duration::from_millis(50);
/// A killed recorder loses at most this much; see the recording's format.
const FLUSH: Duration = Duration::from_secs(1);
/// vCPUs that stay out of `KVM_RUN` are looked for this often.
const LOOK: Duration = Duration::from_millis(250);

/// Records processes into a file.
pub struct Recorder {
    programs: Programs,
    coverage: Vec<Coverage>,
    uprobes: Uprobes,
    /// By process, with the number of sites; a process that turned into another program has one of
    /// each.
    attached: Vec<(u32, usize, Attachment)>,
    processes: Vec<Process>,
    wanted: Vec<Pattern>,
    translator: Translator,
    /// The exit of each thread that was reported as out of `KVM_RUN`.
    out: HashMap<u32, u64>,
    gap_ns: u64,
    /// Whether processes join that were not named.
    all: bool,
    /// Those that did.
    joined: HashSet<u32>,
    writer: Writer<File>,
    frames: Vec<Frame>,
    events: u64,
    lost: u64,
    /// Until when nothing more than that was lost, ns.
    whole_ns: u64,
    flushed: Instant,
    looked: Instant,
    /// While it is open the kernel counts the runs of programs and their time.
    stats: Option<OwnedFd>,
}

/// What a recording came to.
#[derive(Clone, Copy, Debug)]
pub struct Summary {
    /// What it cost.
    pub cost: Cost,
    /// Events that found no room in the ring buffer.
    pub lost: u64,
}

/// What a recorder has done since it began.
#[derive(Clone, Copy, Debug, Default)]
pub struct Totals {
    /// Events that came out of the ring buffer.
    pub events: u64,
    /// Events that found no room in it.
    pub lost: u64,
    /// CPU time of this process, ns.
    pub cpu_ns: u64,
}

impl Recorder {
    /// Loads and attaches the programs and begins the file at `output`.
    ///
    /// # Errors
    /// Those of [`Programs::load`]; [`Error::Refused`] when an essential source has no way;
    /// [`Error::Usdt`] without uprobes; [`Error::Recording`].
    pub fn start(
        object: &[u8],
        options: Options,
        wanted: Vec<Pattern>,
        output: &Path,
    ) -> Result<Self, Error> {
        let uprobes = Uprobes::discover()?;
        let mut programs = Programs::load(object, options)?;
        let coverage = programs.attach()?;
        for covered in coverage
            .iter()
            .filter(|covered| covered.source.is_essential())
        {
            if covered.way.is_none() {
                return Err(Error::Refused {
                    what: covered.source.name(),
                    why: covered
                        .refused
                        .last()
                        .map_or_else(String::new, |last| last.why.clone()),
                });
            }
        }
        let now = Instant::now();
        Ok(Self {
            writer: Writer::create(output, header(&coverage))?,
            programs,
            coverage,
            uprobes,
            attached: Vec::new(),
            processes: Vec::new(),
            wanted,
            translator: Translator::default(),
            out: HashMap::new(),
            gap_ns: options.gap_ns,
            all: options.all,
            joined: HashSet::new(),
            frames: Vec::new(),
            events: 0,
            lost: 0,
            whole_ns: clock::monotonic(),
            flushed: now,
            looked: now,
            // Not granted in a container, for one; the recording then does without the figure.
            stats: enable_stats(Stats::RunTime).ok(),
        })
    }

    /// How each source of events is covered.
    pub fn coverage(&self) -> &[Coverage] {
        &self.coverage
    }

    /// Attaches to a process; what it does from here on is recorded. Gives the number of probe
    /// sites.
    ///
    /// # Errors
    /// [`Error::System`] without such a process, [`Error::Usdt`] and [`Error::TooManySites`].
    pub fn add(&mut self, pid: u32) -> Result<usize, Error> {
        let process = Process::open(pid)?;
        let sites = self.attach(&process)?;
        self.programs.add_target(pid)?;
        self.processes.push(process);
        Ok(sites)
    }

    /// Attaches to the probes of the program that the process runs now; gives their number.
    fn attach(&mut self, process: &Process) -> Result<usize, Error> {
        let pid = process.pid;
        let sites = self.translator.sites.add(&process.exe(), &self.wanted);
        let added = sites.map_err(|error| name_right(error, &process.exe()))?;
        for (cookie, spec) in &added.specs {
            self.programs.set_site(*cookie, spec)?;
        }
        for probe in added.probes {
            self.writer.write(&Frame::Probe(probe))?;
        }
        self.writer.write(&Frame::Process(process.describe()))?;
        let (exe, points) = (process.exe(), &added.sites);
        let attachment = match self.programs.usdt().ok_or(Error::Foreign("usdt_plain"))? {
            UsdtProgram::Multi(program) => Uprobes::attach_multi(program, &exe, points, Some(pid))?,
            UsdtProgram::Single(program) => {
                self.uprobes.attach(program, &exe, points, Some(pid))?
            }
        };
        self.attached.push((pid, added.sites.len(), attachment));
        self.translator.fds.scan(pid);
        Ok(added.sites.len())
    }

    /// Gives up all capabilities, but for those that it takes to attach to what is still to come:
    /// every process of a recording of all, and what a process turns into that is no monitor yet,
    /// neither by its probes nor by a VM. `signal` says that a command is to be given signals.
    ///
    /// Must be called before any other thread is started, and from then on nothing that has another
    /// owner can be opened.
    ///
    /// # Errors
    /// [`Error::System`].
    pub fn give_up_rights(&mut self, signal: bool) -> Result<(), Error> {
        let is_monitor = |pid: u32| {
            let has_probes = |(owner, sites, _): &(u32, usize, _)| *owner == pid && *sites > 0;
            self.attached.iter().any(has_probes) || process::has_vm(pid)
        };
        let mut processes = self.processes.iter();
        let later = Later {
            attach: self.all || !processes.all(|process| is_monitor(process.pid)),
            signal,
        };
        rights::give_up(later, || self.programs.lost().is_ok()).map_err(|source| Error::System {
            what: "give up rights".to_owned(),
            source,
        })
    }

    /// Whether any of the processes still lives, or others may come.
    pub fn is_anyone_alive(&self) -> bool {
        self.all || !self.processes.is_empty()
    }

    /// Waits for at most one tick, and writes what has arrived.
    ///
    /// # Errors
    /// [`Error::System`], [`Error::Map`] and [`Error::Recording`].
    pub fn turn(&mut self) -> Result<(), Error> {
        self.turn_seeing(&mut |_, _| {})
    }

    /// As [`turn`](Self::turn), and shows each frame that has arrived, with its probe's name if it is
    /// a hit.
    ///
    /// # Errors
    /// The same.
    pub fn turn_seeing(&mut self, see: &mut dyn FnMut(&Frame, &str)) -> Result<(), Error> {
        let ended = self.wait()?;
        for pid in self.drain(see)? {
            // Without its probes, or its name if it is gone already, its ioctls are recorded still.
            let _ = self.add(pid);
        }
        for pid in ended {
            self.forget(pid)?;
        }
        self.check_lost()?;
        if self.looked.elapsed() >= LOOK {
            self.looked = Instant::now();
            self.look_for_paused()?;
            self.follow_execs()?;
        }
        if self.flushed.elapsed() >= FLUSH {
            self.flushed = Instant::now();
            self.writer.flush()?;
        }
        Ok(())
    }

    /// Ends the file, and goes on in another one at `output`, which stands by itself.
    ///
    /// # Errors
    /// As for [`turn`](Self::turn).
    pub fn rotate(&mut self, output: &Path) -> Result<(), Error> {
        self.drain(&mut |_, _| {})?;
        self.check_lost()?;
        self.write_state()?;
        let next = Writer::create(output, header(&self.coverage))?;
        mem::replace(&mut self.writer, next).finish(clock::monotonic())?;
        self.frames = self.known();
        self.write_state()
    }

    /// What it has recorded so far.
    pub fn totals(&self) -> Totals {
        Totals {
            events: self.events,
            lost: self.lost,
            cpu_ns: clock::own_cpu(),
        }
    }

    /// What the eBPF programs have taken so far, ns, where the kernel says it.
    pub fn bpf_ns(&self) -> Option<u64> {
        self.stats.as_ref()?;
        Some(self.programs.cost().ok()?.1)
    }

    /// The edges of every vCPU that is known, as they are now.
    pub fn vcpus(&mut self) -> Vec<VcpuEdges> {
        let runs = self.programs.runs();
        runs.map(|(tid, edges)| self.translator.vcpu_edges(tid, &edges))
            .collect()
    }

    /// The processes and the probes that are known, as the frames that a recording has of them.
    pub fn known(&self) -> Vec<Frame> {
        let probes = self.translator.sites.probes().cloned().map(Frame::Probe);
        let processes = self.processes.iter();
        let processes = processes.map(|process| Frame::Process(process.describe()));
        probes.chain(processes).collect()
    }

    /// Writes the last edges of every vCPU, and the names of all threads.
    fn write_state(&mut self) -> Result<(), Error> {
        for (tid, edges) in self.programs.runs() {
            self.translator.edges(tid, &edges, &mut self.frames);
        }
        for process in &self.processes {
            self.frames.extend(self.translator.threads_of(process.pid));
        }
        self.write_frames()
    }

    /// Writes what is left, ends the file and detaches, in this order: without a multi-link the last
    /// takes seconds.
    ///
    /// # Errors
    /// [`Error::Map`] and [`Error::Recording`].
    pub fn finish(mut self) -> Result<Summary, Error> {
        for process in &self.processes {
            self.programs.remove_target(process.pid)?;
        }
        self.drain(&mut |_, _| {})?;
        self.check_lost()?;
        self.write_state()?;
        let bpf = self
            .stats
            .take()
            .and_then(|_open| self.programs.cost().ok());
        let cost = Cost {
            events: self.events,
            bpf_runs: bpf.map(|(runs, _)| runs),
            bpf_ns: bpf.map(|(_, ns)| ns),
            cpu_ns: clock::own_cpu(),
        };
        self.frames.push(Frame::Clock(clock::anchor()));
        self.frames.push(Frame::Cost(cost));
        self.write_frames()?;
        self.writer.finish(clock::monotonic())?;
        Ok(Summary {
            cost,
            lost: self.lost,
        })
    }

    /// Waits until the ring buffer fills, a process ends or the tick is over; gives the processes
    /// that ended. A signal ends the wait too.
    fn wait(&mut self) -> Result<Vec<u32>, Error> {
        let records = self.programs.records_fd();
        let mut fds = vec![PollFd::from_borrowed_fd(records, PollFlags::IN)];
        let processes = self.processes.iter();
        fds.extend(processes.map(|process| PollFd::new(&process.pidfd, PollFlags::IN)));
        let tick = Timespec {
            tv_sec: 0,
            tv_nsec: i64::from(TICK.subsec_nanos()),
        };
        match poll(&mut fds, Some(&tick)) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => {
                let what = "wait for events".to_string();
                return Err(Error::System {
                    what,
                    source: io::Error::from(error),
                });
            }
        }
        let readable = fds.iter().skip(1).map(|fd| !fd.revents().is_empty());
        let ended = self.processes.iter().zip(readable);
        let ended = ended.filter(|(_, ended)| *ended).map(|(one, _)| one.pid);
        Ok(ended.collect())
    }

    /// Writes what has arrived; gives the processes that it is of and that were not known.
    fn drain(&mut self, see: &mut dyn FnMut(&Frame, &str)) -> Result<Vec<u32>, Error> {
        let mut strangers = Vec::new();
        while let Some(record) = self.programs.records.next() {
            self.events += 1;
            if self.all
                && let Some(pid) = translate::process(&record)
                && !self.processes.iter().any(|one| one.pid == pid)
                && self.joined.insert(pid)
            {
                strangers.push(pid);
            }
            self.translator.translate(&record, &mut self.frames);
            for frame in self.frames.drain(..) {
                let probe = match &frame {
                    Frame::Hit(hit) => self.translator.sites.name(hit.probe),
                    _ => "",
                };
                see(&frame, probe);
                self.writer.write(&frame)?;
            }
        }
        Ok(strangers)
    }

    /// Lets go of a process that has ended; its id may be given to another one.
    fn forget(&mut self, pid: u32) -> Result<(), Error> {
        self.programs.remove_target(pid)?;
        self.translator.fds.forget(pid);
        self.processes.retain(|process| process.pid != pid);
        self.attached.retain(|(owner, ..)| *owner != pid);
        self.joined.remove(&pid);
        Ok(())
    }

    /// Attaches to the programs that processes have turned into: monitors are often started by a
    /// script that ends in `exec`.
    fn follow_execs(&mut self) -> Result<(), Error> {
        let mut processes = mem::take(&mut self.processes);
        for process in &mut processes {
            if process.has_changed() {
                self.translator.fds.forget(process.pid);
                // One whose probes cannot be attached to is recorded by its ioctls.
                let _ = self.attach(process);
            }
        }
        self.processes = processes;
        Ok(())
    }

    fn check_lost(&mut self) -> Result<(), Error> {
        let before_ns = clock::monotonic();
        let lost = self.programs.lost()?;
        if lost > self.lost {
            let count = lost - self.lost;
            self.lost = lost;
            self.writer.write(&Frame::Lost {
                since_ns: self.whole_ns,
                at_ns: clock::monotonic(),
                count,
            })?;
        }
        self.whole_ns = before_ns;
        Ok(())
    }

    /// Writes the edges of vCPUs that have left `KVM_RUN` and stay out.
    fn look_for_paused(&mut self) -> Result<(), Error> {
        let now = clock::monotonic();
        for (tid, edges) in self.programs.runs() {
            let out = edges.exit >= edges.enter && now.saturating_sub(edges.exit) > self.gap_ns;
            if out && self.out.insert(tid, edges.exit) != Some(edges.exit) {
                self.translator.edges(tid, &edges, &mut self.frames);
            }
        }
        self.write_frames()
    }

    fn write_frames(&mut self) -> Result<(), Error> {
        for frame in self.frames.drain(..) {
            self.writer.write(&frame)?;
        }
        Ok(())
    }
}

/// Names the right that is missing where a process's program may not be looked at.
fn name_right(error: Error, exe: &Path) -> Error {
    let denied = |error: &io::Error| error.kind() == io::ErrorKind::PermissionDenied;
    match &error {
        // The link of another user's process may not be followed.
        Error::Read { path, source } if path == exe && denied(source) => {
            Error::Rights(rights::SYS_PTRACE)
        }
        // The file that it leads to may not be read.
        Error::Usdt(usdt::Error::Open { source, .. }) if denied(source) => {
            Error::Rights(rights::DAC_READ_SEARCH)
        }
        _ => error,
    }
}

fn header(coverage: &[Coverage]) -> Header {
    let system = rustix::system::uname();
    let mut backends = Vec::new();
    for way in coverage.iter().filter_map(|covered| covered.way) {
        // "uprobe (sleepable)" is a kind of uprobe.
        let kind = way.split(' ').next().unwrap_or(way).to_string();
        if !backends.contains(&kind) {
            backends.push(kind);
        }
    }
    Header {
        tool: env!("CARGO_PKG_VERSION").to_string(),
        kernel: system.release().to_string_lossy().into_owned(),
        arch: system.machine().to_string_lossy().into_owned(),
        hostname: system.nodename().to_string_lossy().into_owned(),
        boot_id: process::line("/proc/sys/kernel/random/boot_id"),
        backends,
        clock: clock::anchor(),
    }
}
