//! Where a recording's clock and pids lie in the trace.

use std::ptr;

use super::event::Track;
use crate::analysis::clock::{self, Clock};
use crate::analysis::{Loaded, Migration, Party};
use crate::recording::VcpuEdges;

/// Added to the pids and tids of another host's processes when one of them is taken: above every
/// pid that Linux gives, below the rows that the trace adds.
const PER_HOST: u64 = 1 << 23;

/// The recordings' places in the trace.
pub(super) struct Hosts<'a> {
    recordings: &'a [Loaded],
    clocks: Vec<Clock>,
    pid_bases: Vec<u64>,
    origin_ns: i64,
}

impl<'a> Hosts<'a> {
    pub(super) fn new(recordings: &'a [Loaded], migrations: &[Migration<'_>]) -> Self {
        let clocks = clocks(recordings, migrations);
        let pid_bases = pid_bases(recordings);
        let mut hosts = Self {
            recordings,
            clocks,
            pid_bases,
            origin_ns: 0,
        };
        let firsts = recordings
            .iter()
            .enumerate()
            .filter_map(|(index, recording)| Some(hosts.at(index, first_ns(recording)?)));
        hosts.origin_ns = firsts.min().unwrap_or(0);
        hosts
    }

    /// The trace's zero on the first recording's clock, ns.
    pub(super) fn origin_ns(&self) -> i64 {
        self.origin_ns
    }

    /// How recording `index`'s clock relates to the first one's.
    pub(super) fn clock(&self, index: usize) -> Clock {
        self.clocks.get(index).copied().unwrap_or(Clock::SAME)
    }

    /// Where a time of recording `index` lies in the trace, ns.
    pub(super) fn at(&self, index: usize, ts_ns: u64) -> i64 {
        let ns = i64::try_from(ts_ns).unwrap_or(i64::MAX);
        ns.saturating_sub(self.clock(index).offset_ns)
            .saturating_sub(self.origin_ns)
    }

    /// Where a time on a migration's axis, of which `party` is a side, lies in the trace, ns.
    pub(super) fn on_axis(&self, party: &Party<'_>, ns: i64) -> i64 {
        let local = ns
            .saturating_add(party.place.origin_ns)
            .saturating_add(party.place.offset_ns);
        let offset_ns = self.clock(self.index(party.recording)).offset_ns;
        local
            .saturating_sub(offset_ns)
            .saturating_sub(self.origin_ns)
    }

    /// A process's id in the trace.
    pub(super) fn pid(&self, recording: &Loaded, pid: u32) -> u64 {
        let base = self
            .pid_bases
            .get(self.index(recording))
            .copied()
            .unwrap_or(0);
        base + u64::from(pid)
    }

    /// A thread's row.
    pub(super) fn track(&self, recording: &Loaded, pid: u32, tid: u32) -> Track {
        Track {
            pid: self.pid(recording, pid),
            tid: self.pid(recording, tid),
        }
    }

    fn index(&self, recording: &Loaded) -> usize {
        self.recordings
            .iter()
            .position(|other| ptr::eq(other, recording))
            .unwrap_or(0)
    }
}

/// Each recording's clock against the first's: of the same host, by a migration between the two,
/// or by the wall clocks.
fn clocks(recordings: &[Loaded], migrations: &[Migration<'_>]) -> Vec<Clock> {
    let Some(first) = recordings.first() else {
        return Vec::new();
    };
    let clock = |recording: &Loaded| {
        if clock::same_host(first, recording) {
            return Clock::SAME;
        }
        let joined = migrations.iter().find_map(|migration| {
            let source = migration.source.as_ref()?.recording;
            let destination = migration.destination.as_ref()?.recording;
            let there = clock::same_host(source, first) && clock::same_host(destination, recording);
            let back = clock::same_host(destination, first) && clock::same_host(source, recording);
            let offset_ns = migration.clock.offset_ns;
            match (there, back) {
                (true, _) => Some(migration.clock),
                (_, true) => Some(Clock {
                    offset_ns: offset_ns.saturating_neg(),
                    ..migration.clock
                }),
                _ => None,
            }
        });
        joined.unwrap_or_else(|| clock::relate(first, recording, std::iter::empty()))
    };
    recordings.iter().map(clock).collect()
}

/// What is added to each recording's pids. Nothing, unless another host has the same.
fn pid_bases(recordings: &[Loaded]) -> Vec<u64> {
    let clash = |a: &Loaded, b: &Loaded| {
        !clock::same_host(a, b) && a.processes.keys().any(|pid| b.processes.contains_key(pid))
    };
    let mut bases = Vec::new();
    for (index, recording) in (0u64..).zip(recordings) {
        let earlier = recordings.iter().take(bases.len());
        let taken = earlier.clone().any(|other| clash(other, recording));
        bases.push(if taken { index * PER_HOST } else { 0 });
    }
    bases
}

/// Where the row of a vCPU's runs begins, ns. One that had run before the recording began is shown
/// from that moment on.
pub(super) fn runs_from(recording: &Loaded, edges: VcpuEdges) -> u64 {
    match edges.first_enter_ns {
        0 => recording.header.clock.monotonic_ns,
        first => first,
    }
}

/// When the recording's first event was, ns.
fn first_ns(recording: &Loaded) -> Option<u64> {
    let threads = recording
        .processes
        .values()
        .flat_map(|process| process.threads.values());
    let edges = threads.filter_map(|thread| thread.edges);
    edges
        .map(|edges| runs_from(recording, edges))
        .chain(recording.first_ns)
        .min()
}
