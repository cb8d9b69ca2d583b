//! Migrations of which the monitor says nothing: any VMM, seen by its KVM ioctls alone.
//!
//! Every live migration looks like this to the kernel, whoever does it: all vCPUs of one VM leave
//! `KVM_RUN` for good, and their registers are read; then the registers of as many vCPUs of another
//! process are written, and these call `KVM_RUN` for the first time. Both sides must be on one host.
//! A guest that only shuts down, or boots, has no such twin.

use super::clock::{self, Clock};
use super::downtime;
use super::kvm;
use super::load::{Loaded, Process};
use super::migration::{Migration, View};
use super::party::{Party, Place, Side};
use super::{its, migration};
use crate::recording::{Ioctl, VcpuEdges};

/// A VM that starts later than this after another one stopped is not its continuation. 60 s, in ns.
const HANDOVER_NS: u64 = 60_000_000_000;

/// A VM's vCPUs when they came or went.
#[derive(Clone, Copy)]
struct Vm<'a> {
    recording: &'a Loaded,
    pid: u32,
    process: &'a Process,
    /// When the last one went, or the first one came; its host's clock, ns.
    at_ns: u64,
    vcpus: usize,
}

/// The migrations of processes that have no probes to tell of one, in the order of their ends.
pub(super) fn find(recordings: &[Loaded]) -> Vec<Migration<'_>> {
    let vms = |at: fn(&[VcpuEdges]) -> Option<u64>| {
        let all = recordings.iter().flat_map(|recording| {
            let processes = recording.processes.iter();
            processes.map(move |(pid, process)| (recording, *pid, process))
        });
        let silent = all.filter(|(.., process)| !tells(process));
        let mut vms: Vec<_> = silent
            .filter_map(|(recording, pid, process)| {
                let threads = process.threads.values();
                let edges: Vec<_> = threads.filter_map(|thread| thread.edges).collect();
                Some(Vm {
                    recording,
                    pid,
                    process,
                    at_ns: at(&edges)?,
                    vcpus: edges.len(),
                })
            })
            .collect();
        vms.sort_by_key(|vm| vm.at_ns);
        vms
    };
    let mut gone = vms(departure);
    let mut found = Vec::new();
    for came in vms(arrival) {
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
    let between = gone.at_ns..came.at_ns;
    let within = |vm: &Vm<'_>, moves: fn(&Ioctl) -> bool| {
        let mut ioctls = vm.process.threads.values().flat_map(|one| &one.ioctls);
        ioctls.any(|ioctl| moves(ioctl) && between.contains(&ioctl.exit_ns))
    };
    gone.vcpus == came.vcpus
        && gone.pid != came.pid
        && between.end.saturating_sub(between.start) <= HANDOVER_NS
        && clock::same_host(gone.recording, came.recording)
        && within(gone, kvm::reads_registers)
        && within(came, kvm::writes_registers)
}

fn join<'a>(gone: Vm<'a>, came: Vm<'a>) -> Migration<'a> {
    let threads = || gone.process.threads.values();
    // The kernel's first sign of it is that somebody asks what the guest has written.
    let asked = threads()
        .flat_map(|thread| &thread.ioctls)
        .filter(|ioctl| kvm::reads_dirty_log(ioctl))
        .map(|ioctl| ioctl.enter_ns);
    let begun_ns = asked.chain([gone.at_ns]).min().unwrap_or(gone.at_ns);
    let place = Place {
        origin_ns: i64::try_from(begun_ns).unwrap_or(i64::MAX),
        offset_ns: 0,
    };
    let entered = came.process.threads.values();
    let entered = entered.filter_map(|thread| Some(thread.edges?.first_enter_ns));
    let end_ns = place.at(entered.max().unwrap_or(came.at_ns));
    let party = |vm: Vm<'a>, side| {
        let process = (vm.pid, vm.process);
        Party::new(side, vm.recording, process, place, (0, end_ns))
    };
    let source = party(gone, Side::Source);
    let destination = party(came, Side::Destination);
    let downtime = downtime::measure_by_kernel(&source, &destination);
    let parties = [&source, &destination];
    let its = parties.into_iter().flat_map(its::operations).collect();
    let lost_events = gone
        .recording
        .lost
        .iter()
        .filter(|(at_ns, _)| *at_ns >= begun_ns)
        .fold(0u64, |sum, (_, count)| sum.saturating_add(*count));
    Migration {
        view: View::Kernel,
        id: None,
        mode: String::new(),
        status: "completed".to_owned(),
        error: None,
        origin_ns: place.origin_ns,
        end_ns,
        clock: Clock::SAME,
        source: Some(source),
        destination: Some(destination),
        wire: Vec::new(),
        downtime,
        its,
        lost_events,
    }
}
