//! Migrations of which the monitor says nothing: any VMM, seen by its KVM ioctls alone.
//!
//! Every live migration looks like this to the kernel, whoever does it: all vCPUs of one VM leave
//! `KVM_RUN` for good, and their registers are read; then the registers of as many vCPUs of another
//! process are written, and these call `KVM_RUN` for the first time. Both sides must be on one host,
//! or in recordings that `blackout merge` joined.
//! A guest that only shuts down, or boots, has no such twin.

use super::clock::{self, Basis, Clock};
use super::downtime;
use super::kvm;
use super::load::Loaded;
use super::loss;
use super::migration::{Migration, View};
use super::party::{Party, Place, Side, Window};
use super::spans::Point;
use super::thread::Process;
use super::{its, migration};
use crate::foreign;
use crate::recording::{Ioctl, VcpuEdges};

/// A VM that starts later than this after another one stopped is not its continuation. 60 s, in ns.
pub(super) const HANDOVER_NS: i64 = 60_000_000_000;

/// Clocks that were set by hand may be apart by this much. 1 s, in ns.
const CLOCKS_APART_NS: u64 = 1_000_000_000;

/// A VM's vCPUs when they came or went.
struct Vm<'a> {
    recording: &'a Loaded,
    pid: u32,
    process: &'a Process,
    /// When the last one went, or the first one came; its host's clock, ns.
    at_ns: u64,
    vcpus: usize,
    /// When its vCPUs' registers were read, or written, in order; ns.
    moved_ns: Vec<u64>,
}

/// The migrations of processes that have no probes to tell of one, in the order of their ends.
pub(super) fn find(recordings: &[Loaded]) -> Vec<Migration<'_>> {
    let vms = |at: fn(&[VcpuEdges]) -> Option<u64>, moves: fn(&Ioctl) -> bool| {
        let all = recordings.iter().flat_map(|recording| {
            let processes = recording.processes.iter();
            processes.map(move |(pid, process)| (recording, *pid, process))
        });
        let silent = all.filter(|(.., process)| !tells(process));
        let mut vms: Vec<_> = silent
            .filter_map(|(recording, pid, process)| {
                let threads = || process.threads.values();
                let edges: Vec<_> = threads().filter_map(|thread| thread.edges).collect();
                let at_ns = at(&edges)?;
                let ioctls = threads().flat_map(|thread| &thread.ioctls);
                let moved = ioctls.filter(|ioctl| moves(ioctl));
                let mut moved_ns: Vec<_> = moved.map(|ioctl| ioctl.exit_ns).collect();
                moved_ns.sort_unstable();
                Some(Vm {
                    recording,
                    pid,
                    process,
                    at_ns,
                    vcpus: edges.len(),
                    moved_ns,
                })
            })
            .collect();
        vms.sort_by_key(|vm| vm.at_ns);
        vms
    };
    let mut gone = vms(departure, kvm::reads_registers);
    let mut found = Vec::new();
    for came in vms(arrival, kvm::writes_registers) {
        let fits = |gone: &Vm<'_>| continues(gone, &came);
        // The one that stopped last.
        if let Some(index) = gone.iter().rposition(fits) {
            found.push(join(gone.remove(index), came));
        }
    }
    found
}

/// Whether the process has probes that tell of migrations.
fn tells(process: &Process) -> bool {
    let mut spans = process.threads.values().flat_map(|thread| &thread.spans);
    spans.any(|span| migration::WHOLES.contains(&span.name()))
}

/// When the last of all vCPUs left `KVM_RUN`, if all have.
fn departure(vcpus: &[VcpuEdges]) -> Option<u64> {
    let out = |edges: &VcpuEdges| edges.last_exit_ns > edges.last_enter_ns;
    if !vcpus.iter().all(out) {
        return None;
    }
    vcpus.iter().map(|edges| edges.last_exit_ns).max()
}

/// When the first vCPU called `KVM_RUN`, if none had before the recording began.
fn arrival(vcpus: &[VcpuEdges]) -> Option<u64> {
    if vcpus.iter().any(|edges| edges.first_enter_ns == 0) {
        return None;
    }
    vcpus.iter().map(|edges| edges.first_enter_ns).min()
}

fn continues(gone: &Vm<'_>, came: &Vm<'_>) -> bool {
    if gone.vcpus != came.vcpus {
        return false;
    }
    let Some(clock) = clock::told(gone.recording, came.recording) else {
        return false;
    };
    let one_host = clock.basis == Basis::OneHost;
    let slack_ns = clock.error_ns.unwrap_or(CLOCKS_APART_NS);
    let slack_ns = i64::try_from(slack_ns).unwrap_or(i64::MAX);
    let (here, there) = places(0, clock);
    let from_ns = here.at(gone.at_ns).saturating_sub(slack_ns);
    let to_ns = there.at(came.at_ns).saturating_add(slack_ns);
    let within = |vm: &Vm<'_>, place: Place| {
        let first = vm.moved_ns.partition_point(|ns| place.at(*ns) < from_ns);
        let first = vm.moved_ns.get(first);
        first.is_some_and(|ns| place.at(*ns) < to_ns)
    };
    !(one_host && gone.pid == came.pid)
        && from_ns < to_ns
        && to_ns.saturating_sub(from_ns) <= HANDOVER_NS
        && within(gone, here)
        && within(came, there)
}

/// The places of source and destination on an axis that begins at `origin_ns`.
fn places(origin_ns: i64, clock: Clock) -> (Place, Place) {
    let place = |offset_ns| Place {
        origin_ns,
        offset_ns,
    };
    (place(0), place(clock.offset_ns))
}

fn join<'a>(gone: Vm<'a>, came: Vm<'a>) -> Migration<'a> {
    let threads = || gone.process.threads.values();
    // The kernel's first sign of it is that somebody asks what the guest has written.
    let asked = threads()
        .flat_map(|thread| &thread.ioctls)
        .filter(|ioctl| kvm::reads_dirty_log(ioctl))
        .map(|ioctl| ioctl.enter_ns);
    // A monitor with probes may have told of it before.
    let last = |is: fn(&Point) -> bool| {
        let points = threads().flat_map(|thread| &thread.points);
        let told = points.filter(|point| point.ts_ns <= gone.at_ns && is(point));
        told.map(|point| point.ts_ns).max()
    };
    let told = [
        last(|point| point.args.str("status") == Some("setup")),
        last(|point| point.args.str("checkpoint") == Some(foreign::STOP.1)),
    ];
    let told = told.into_iter().flatten();
    let begun_ns = asked.chain(told).chain([gone.at_ns]).min();
    let begun_ns = begun_ns.unwrap_or(gone.at_ns);
    let clock = clock::told(gone.recording, came.recording).unwrap_or(Clock::SAME);
    let (here, there) = places(i64::try_from(begun_ns).unwrap_or(i64::MAX), clock);
    let entered = came.process.threads.values();
    let entered = entered.filter_map(|thread| Some(thread.edges?.first_enter_ns));
    let end_ns = there.at(entered.max().unwrap_or(came.at_ns));
    let party = |vm: &Vm<'a>, side, place| {
        let process = (vm.pid, vm.process);
        let window = Window {
            from_ns: 0,
            to_ns: end_ns,
            next_ns: i64::MAX,
        };
        Party::new(side, vm.recording, process, place, window)
    };
    let source = party(&gone, Side::Source, here);
    let destination = party(&came, Side::Destination, there);
    let downtime = downtime::measure_by_kernel(&source, &destination);
    let parties = [&source, &destination];
    let its = parties.into_iter().flat_map(its::operations).collect();
    let lost = loss::of([&source, &destination].into_iter(), end_ns);
    Migration {
        view: View::Kernel,
        id: None,
        mode: String::new(),
        status: "completed".to_owned(),
        error: None,
        origin_ns: here.origin_ns,
        end_ns,
        clock,
        source: Some(source),
        destination: Some(destination),
        wire: Vec::new(),
        downtime,
        its,
        lost,
    }
}
