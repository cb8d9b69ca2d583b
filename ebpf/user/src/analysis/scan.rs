//! Where in a recording migrations lie, found by looking through it once and keeping next to nothing.
//!
//! What a report is about is a small part of most recordings: the rest need not be held in memory. The
//! times are told generously, by what marks a migration in [`migration`](super::migration) and in
//! [`by_kernel`](super::by_kernel).

use std::collections::{BTreeMap, HashMap, HashSet};
use std::io::Read;
use std::mem;

use blackout_abi::Edge;

use super::by_kernel::HANDOVER_NS;
use super::kvm;
use super::migration::WHOLES;
use super::spans::{DEEPEST, Meaning};
use crate::recording::{Error, Frame, Reader, VcpuEdges};

/// Before and after a migration, what belongs to it may lie: the command that asked for it, a vCPU that
/// runs on. 2 s, in ns.
const AROUND_NS: u64 = 2_000_000_000;

/// Times in order, and apart.
#[derive(Clone, Debug, Default)]
pub(super) struct Windows(Vec<(u64, u64)>);

impl Windows {
    /// All times.
    pub(super) fn all() -> Self {
        Self(vec![(0, u64::MAX)])
    }

    fn new(mut times: Vec<(u64, u64)>) -> Self {
        times.sort_unstable();
        let mut apart: Vec<(u64, u64)> = Vec::new();
        for (from, to) in times {
            match apart.last_mut() {
                Some((_, until)) if from <= *until => *until = to.max(*until),
                _ => apart.push((from, to)),
            }
        }
        Self(apart)
    }

    /// Whether a part of what is between the two times is inside.
    pub(super) fn meet(&self, start_ns: u64, end_ns: u64) -> bool {
        let next = self.0.partition_point(|(_, to)| *to < start_ns);
        self.0.get(next).is_some_and(|(from, _)| *from <= end_ns)
    }
}

/// The times in which migrations lie, of each recording in the file.
///
/// # Errors
/// What the reader returns.
pub(super) fn windows<R: Read>(reader: Reader<R>) -> Result<Vec<Windows>, Error> {
    let mut all = Vec::new();
    let mut scan = Scan::default();
    for frame in reader {
        match frame? {
            Frame::Joined(_) => all.push(mem::take(&mut scan).finish()),
            frame => scan.see(&frame),
        }
    }
    all.push(scan.finish());
    Ok(all)
}

/// At most so many times are held apart, so many processes and vCPUs, and so many probes.
const MOST: usize = 1 << 16;

#[derive(Default)]
struct Scan {
    /// The edge of each probe that begins or ends a migration.
    wholes: HashMap<u32, Edge>,
    /// Probes of other monitors.
    foreign: HashSet<u32>,
    /// Where migrations began that have not ended, by thread.
    open: HashMap<(u32, u32), Vec<u64>>,
    times: Vec<(u64, u64)>,
    processes: BTreeMap<u32, Process>,
    /// vCPUs of all of them.
    vcpus: usize,
}

/// What is known of a process.
#[derive(Default)]
struct Process {
    /// Whether its probes tell of migrations.
    tells: bool,
    /// The first sign that it may migrate.
    sign_ns: Option<u64>,
    vcpus: HashMap<u32, VcpuEdges>,
}

impl Scan {
    fn see(&mut self, frame: &Frame) {
        match frame {
            Frame::Probe(def) if self.wholes.len() + self.foreign.len() < MOST => {
                let meaning = Meaning::of(def);
                if WHOLES.contains(&meaning.row.as_str()) {
                    self.wholes.insert(def.id, meaning.edge);
                } else if meaning.hop == 0 {
                    self.foreign.insert(def.id);
                }
            }
            Frame::Hit(hit) => {
                if let Some(edge) = self.wholes.get(&hit.probe).copied() {
                    let open = self.open.entry((hit.pid, hit.tid)).or_default();
                    match edge {
                        Edge::Begin => {
                            // One that is too deep is as long as those around it.
                            if open.len() < DEEPEST {
                                open.push(hit.ts_ns);
                            }
                            if let Some(process) = self.process(hit.pid) {
                                process.tells = true;
                            }
                        }
                        Edge::End => {
                            let from = open.pop();
                            self.times.extend(from.map(|from| around(from, hit.ts_ns)));
                            self.thin();
                        }
                        Edge::Point => {}
                    }
                } else if self.foreign.contains(&hit.probe) {
                    self.sign(hit.pid, hit.ts_ns);
                }
            }
            Frame::Ioctl(ioctl) if kvm::reads_dirty_log(ioctl) => {
                self.sign(ioctl.pid, ioctl.enter_ns);
            }
            Frame::VcpuEdges(edges) => {
                let has_room = self.vcpus < MOST;
                let Some(process) = self.process(edges.pid) else {
                    return;
                };
                if has_room || process.vcpus.contains_key(&edges.tid) {
                    let known = process.vcpus.insert(edges.tid, *edges);
                    self.vcpus += usize::from(known.is_none());
                }
            }
            _ => {}
        }
    }

    fn sign(&mut self, pid: u32, at_ns: u64) {
        if let Some(process) = self.process(pid) {
            let before_ns = process.sign_ns.unwrap_or(at_ns);
            process.sign_ns = Some(before_ns.min(at_ns));
        }
    }

    /// What is known of the process; `None` for one too many.
    fn process(&mut self, pid: u32) -> Option<&mut Process> {
        if self.processes.len() >= MOST && !self.processes.contains_key(&pid) {
            return None;
        }
        Some(self.processes.entry(pid).or_default())
    }

    /// Keeps the times few: those that meet are one, and if they are too many yet, all are.
    fn thin(&mut self) {
        if self.times.len() < MOST {
            return;
        }
        self.times = Windows::new(mem::take(&mut self.times)).0;
        if let ([first, .., last], true) = (&self.times[..], self.times.len() > MOST / 2) {
            self.times = vec![(first.0, last.1)];
        }
    }

    fn finish(self) -> Windows {
        let mut times = self.times;
        let open = self.open.into_values().flatten();
        times.extend(open.map(|from| around(from, u64::MAX)));
        for process in self.processes.values().filter(|process| !process.tells) {
            let vcpus = || process.vcpus.values();
            let handover_ns = HANDOVER_NS.unsigned_abs();
            if let Some(gone_ns) = vcpus().map(|vcpu| vcpu.last_exit_ns).max() {
                let sign_ns = process
                    .sign_ns
                    .map_or(gone_ns, |sign_ns| sign_ns.min(gone_ns));
                times.push(around(sign_ns, gone_ns.saturating_add(handover_ns)));
            }
            let came = || vcpus().map(|vcpu| vcpu.first_enter_ns);
            if let (Some(first @ 1..), Some(last)) = (came().min(), came().max()) {
                times.push(around(first.saturating_sub(handover_ns), last));
            }
        }
        Windows::new(times)
    }
}

fn around(from_ns: u64, to_ns: u64) -> (u64, u64) {
    (
        from_ns.saturating_sub(AROUND_NS),
        to_ns.saturating_add(AROUND_NS),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_stay_few() {
        let mut scan = Scan::default();
        for hour in 0..3 * MOST as u64 {
            scan.times
                .push(around(hour * 3_600_000_000_000, hour * 3_600_000_000_000));
            scan.thin();
            assert!(scan.times.len() <= MOST);
        }
        let windows = scan.finish();
        assert!(windows.meet(0, 0) && windows.meet(7_200_000_000_000, 7_200_000_000_001));
    }

    #[test]
    fn times_that_meet_are_one() {
        let windows = Windows::new(vec![(50, 60), (10, 20), (15, 30)]);
        assert_eq!(windows.0, [(10, 30), (50, 60)]);
        assert!(windows.meet(0, 10) && windows.meet(30, 31) && windows.meet(0, u64::MAX));
        assert!(!windows.meet(0, 9) && !windows.meet(31, 49) && !windows.meet(61, 70));
        assert!(!Windows::default().meet(0, u64::MAX) && Windows::all().meet(3, 3));
    }
}
