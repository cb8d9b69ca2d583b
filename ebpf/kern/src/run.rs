//! `KVM_RUN`. It is called tens of thousands of times a second, so its edges are kept in a map,
//! and only what bounds a blackout is reported: a thread's first call, a call after a gap, the
//! first guest entry after either, the thread's end. The loader reads the last exit of a vCPU that
//! stays out from the map.

use blackout_abi::event::{Kind, Run, RunEdge, RunEdges};

use crate::shared::{
    RUNS, Task, current, emit, gap_ns, header, is_target, is_wanted, now, syscall_args,
};

/// A thread calls `KVM_RUN` on the vCPU `fd`.
#[inline(always)]
pub fn enter(task: Task, fd: u32, time: u64) {
    // A thread that is known belongs to a target: that look-up is for the first call only.
    let Some(edges) = RUNS.get_ptr_mut(task.tid) else {
        if is_wanted(task.tgid) {
            first(task, fd, time);
        }
        return;
    };
    // SAFETY: the thread's own entry; nobody else writes or deletes it while the thread is here.
    let edges = unsafe { &mut *edges };
    if edges.exit != 0 && time - edges.exit > gap_ns() {
        report(RunEdge::Gap, task, time, edges);
        edges.entry_due = 1;
    }
    edges.fd = fd;
    edges.enter = time;
    edges.runs += 1;
}

/// The thread `tid` returns from an ioctl. True if that was `KVM_RUN`.
#[inline(always)]
pub fn exit(tid: u32) -> bool {
    let Some(edges) = RUNS.get_ptr_mut(tid) else {
        return false;
    };
    // SAFETY: as in `enter`.
    let edges = unsafe { &mut *edges };
    if edges.enter <= edges.exit {
        return false;
    }
    edges.exit = now();
    true
}

/// The running thread returns from a `KVM_RUN` on `fd` that was not seen to be called.
#[inline(always)]
pub fn exit_unseen(task: Task, fd: u32) {
    let mut edges = unseen(task, fd);
    edges.exit = now();
    let _ = RUNS.insert(task.tid, edges, 0);
}

/// The running thread enters guest code.
#[inline(always)]
pub fn guest_enter() {
    let task = current();
    let Some(edges) = RUNS.get_ptr_mut(task.tid) else {
        return;
    };
    // SAFETY: as in `enter`.
    let edges = unsafe { &mut *edges };
    edges.guest_enter = now();
    edges.entries += 1;
    if edges.entry_due != 0 {
        edges.entry_due = 0;
        report(RunEdge::Entry, task, edges.guest_enter, edges);
    }
}

/// The running thread left guest code. A thread of a target that is not known is in a `KVM_RUN` that
/// it called before the recording began, maybe for a long time, and may be about to be paused.
#[inline(always)]
pub fn guest_exit() {
    let time = now();
    let task = current();
    if let Some(edges) = RUNS.get_ptr_mut(task.tid) {
        // SAFETY: as in `enter`.
        unsafe { (*edges).guest_exit = time };
    } else {
        left_unseen(task, time);
    }
}

/// KVM emulates an instruction of the running thread's guest. A KVM that emulates them one by one
/// never enters guest code, so its guest runs from the first of them to the last.
#[inline(always)]
pub fn guest_emulated() {
    let time = now();
    let task = current();
    let Some(edges) = RUNS.get_ptr_mut(task.tid) else {
        left_unseen(task, time);
        return;
    };
    // SAFETY: as in `enter`.
    let edges = unsafe { &mut *edges };
    if edges.entries != 0 {
        return;
    }
    if edges.entry_due != 0 {
        edges.entry_due = 0;
        edges.guest_enter = time;
        report(RunEdge::Entry, task, time, edges);
    }
    edges.guest_exit = time;
}

/// The running thread ends.
#[inline(always)]
pub fn thread_exit() {
    let task = current();
    let Some(edges) = RUNS.get_ptr(task.tid) else {
        return;
    };
    // SAFETY: as in `enter`.
    report(RunEdge::End, task, now(), unsafe { &*edges });
    let _ = RUNS.remove(task.tid);
}

/// A thread that is not known was in guest code.
#[inline(always)]
fn left_unseen(task: Task, time: u64) {
    if is_target(task.tgid) {
        let fd = syscall_args().map_or(u32::MAX, |(fd, _)| fd as u32);
        let mut edges = unseen(task, fd);
        edges.enter = time;
        edges.guest_exit = time;
        let _ = RUNS.insert(task.tid, edges, 0);
    }
}

/// The edges of a thread that has been in `KVM_RUN` since before the recording began. Its `first`
/// stays 0, so it is never taken for a vCPU that starts.
#[inline(always)]
fn unseen(task: Task, fd: u32) -> RunEdges {
    RunEdges {
        tgid: task.tgid,
        fd,
        first: 0,
        enter: 0,
        exit: 0,
        guest_enter: 0,
        guest_exit: 0,
        runs: 1,
        entries: 0,
        entry_due: 0,
    }
}

#[inline(always)]
fn first(task: Task, fd: u32, time: u64) {
    let mut edges = RunEdges {
        tgid: task.tgid,
        fd,
        first: time,
        enter: 0,
        exit: 0,
        guest_enter: 0,
        guest_exit: 0,
        runs: 0,
        entries: 0,
        entry_due: 1,
    };
    report(RunEdge::First, task, time, &edges);
    edges.enter = time;
    edges.runs = 1;
    // A full map (8192 vCPU threads) means that this thread's later edges are not seen.
    let _ = RUNS.insert(task.tid, edges, 0);
}

#[inline(always)]
fn report(edge: RunEdge, task: Task, time: u64, edges: &RunEdges) {
    emit::<Run>(Kind::Run, |record| {
        record.write(Run {
            header: header(Kind::Run, task, time),
            edge: edge as u32,
            reserved: 0,
            edges: *edges,
        });
    });
}
