//! What all programs use: maps, globals, the process filter and the way into the ring buffer.

use core::mem::MaybeUninit;
use core::ptr::{addr_of, read_volatile};

use aya_ebpf::bindings::{
    BPF_RB_AVAIL_DATA, BPF_RB_FORCE_WAKEUP, BPF_RB_NO_WAKEUP, bpf_pidns_info,
};
use aya_ebpf::helpers::generated::{
    bpf_get_current_task_btf, bpf_probe_read_kernel, bpf_task_pt_regs,
};
use aya_ebpf::helpers::{
    bpf_get_current_pid_tgid, bpf_get_ns_current_pid_tgid, bpf_get_smp_processor_id,
    bpf_ktime_get_ns,
};
use aya_ebpf::macros::map;
use aya_ebpf::maps::{Array, HashMap, PerCpuArray, RingBuf};
use blackout_abi::event::{Header, Ioctl, Kind, Lost, RunEdges, SiteSpec};

/// The records. The loader sets the size.
#[map]
pub static RECORDS: RingBuf = RingBuf::with_byte_size(1 << 20, 0);

/// Records that found no room.
#[map]
pub static LOST: PerCpuArray<Lost> = PerCpuArray::with_max_entries(1, 0);

/// The processes to trace, by tgid.
#[map]
pub static TARGETS: HashMap<u32, u8> = HashMap::with_max_entries(1024, 0);

/// USDT sites by attach cookie. The loader sets the size.
#[map]
pub static SITES: Array<SiteSpec> = Array::with_max_entries(1, 0);

/// Threads that called `KVM_RUN`, by tid.
#[map]
pub static RUNS: HashMap<u32, RunEdges> = HashMap::with_max_entries(8192, 0);

/// KVM ioctls that have not returned, by tid.
#[map]
pub static IOCTLS: HashMap<u32, Ioctl> = HashMap::with_max_entries(8192, 0);

/// When a watched kernel function was entered, by tid.
#[map]
pub static CALLS: HashMap<u32, u64> = HashMap::with_max_entries(1024, 0);

/// A vCPU that is out of `KVM_RUN` for longer than this many ns is reported when it enters again.
#[unsafe(no_mangle)]
static GAP_NS: u64 = 200_000;

/// Not 0: every process that makes an ioctl of KVM is a target from then on.
#[unsafe(no_mangle)]
static ALL: u64 = 0;

/// Device and inode of the pid namespace that ids are to be given in; 0 for the first one.
#[unsafe(no_mangle)]
static PIDNS_DEV: u64 = 0;
/// See [`PIDNS_DEV`].
#[unsafe(no_mangle)]
static PIDNS_INO: u64 = 0;

/// Byte offset, in the saved registers, of the one that holds a function's return value.
#[unsafe(no_mangle)]
static RETURN_OFFSET: u64 = 0;

/// Byte offsets, in the registers saved at a system call's entry, of its first three arguments.
#[unsafe(no_mangle)]
static FIRST_ARG_OFFSET: u64 = 0;
/// See [`FIRST_ARG_OFFSET`].
#[unsafe(no_mangle)]
static SECOND_ARG_OFFSET: u64 = 0;
/// See [`FIRST_ARG_OFFSET`].
#[unsafe(no_mangle)]
static THIRD_ARG_OFFSET: u64 = 0;

/// Bytes in the ring buffer above which the reader is woken.
#[unsafe(no_mangle)]
static WAKE_BYTES: u64 = 1 << 19;

/// Reads a global that the loader may have replaced.
macro_rules! global {
    ($name:ident) => {
        // SAFETY: a u64 in the object's read-only data; volatile because the loader writes it
        // before the program runs, which the compiler cannot see.
        unsafe { read_volatile(addr_of!($name)) }
    };
}

/// The threshold of [`GAP_NS`].
pub fn gap_ns() -> u64 {
    global!(GAP_NS)
}

/// See [`RETURN_OFFSET`].
pub fn return_offset() -> usize {
    global!(RETURN_OFFSET) as usize
}

/// The first two arguments of the system call that the running thread is in: for a call that was
/// entered before anybody looked. The kernel must have BTF.
#[inline(always)]
pub fn syscall_args() -> Option<(u64, u64)> {
    Some((
        syscall_arg(global!(FIRST_ARG_OFFSET))?,
        syscall_arg(global!(SECOND_ARG_OFFSET))?,
    ))
}

/// Its third argument.
#[inline(always)]
pub fn syscall_third_arg() -> Option<u64> {
    syscall_arg(global!(THIRD_ARG_OFFSET))
}

/// The register at `offset` of those that were saved when the running thread entered the kernel.
#[inline(always)]
fn syscall_arg(offset: u64) -> Option<u64> {
    // SAFETY: the helpers take what they are given: the running task.
    let registers = unsafe { bpf_task_pt_regs(bpf_get_current_task_btf()) } as *const u8;
    let mut value = 0_u64;
    // SAFETY: `value` has room for 8 bytes; the helper checks the source, which is an offset that
    // the loader gave into the task's registers.
    let failed = unsafe {
        let from = registers.add(offset as usize).cast();
        bpf_probe_read_kernel((&raw mut value).cast(), 8, from)
    };
    (failed == 0).then_some(value)
}

/// A thread, in the loader's pid namespace.
#[derive(Clone, Copy)]
pub struct Task {
    /// The process.
    pub tgid: u32,
    /// The thread.
    pub tid: u32,
}

/// The running thread. A task outside the loader's namespace has the ids 0, which no map holds.
#[inline(always)]
pub fn current() -> Task {
    let (device, inode) = (global!(PIDNS_DEV), global!(PIDNS_INO));
    if inode == 0 {
        let both = bpf_get_current_pid_tgid();
        return Task {
            tgid: (both >> 32) as u32,
            tid: both as u32,
        };
    }
    let mut ids = bpf_pidns_info { pid: 0, tgid: 0 };
    // SAFETY: `ids` is a valid bpf_pidns_info of the size given.
    unsafe {
        bpf_get_ns_current_pid_tgid(device, inode, &mut ids, size_of::<bpf_pidns_info>() as u32);
    }
    Task {
        tgid: ids.tgid,
        tid: ids.pid,
    }
}

/// Whether the loader asked for the process.
#[inline(always)]
pub fn is_target(tgid: u32) -> bool {
    TARGETS.get_ptr(tgid).is_some()
}

/// Whether the process, which makes an ioctl of KVM, is to be traced.
#[inline(always)]
pub fn is_wanted(tgid: u32) -> bool {
    is_target(tgid) || global!(ALL) != 0 && TARGETS.insert(tgid, 1, 0).is_ok()
}

/// `CLOCK_MONOTONIC`, ns.
#[inline(always)]
pub fn now() -> u64 {
    // SAFETY: the helper takes nothing and has no precondition.
    unsafe { bpf_ktime_get_ns() }
}

/// A record's head, for `task` at `time`.
#[inline(always)]
pub fn header(kind: Kind, task: Task, time: u64) -> Header {
    // SAFETY: the helper takes nothing and has no precondition.
    let cpu = unsafe { bpf_get_smp_processor_id() };
    Header {
        time,
        kind: kind as u32,
        tgid: task.tgid,
        tid: task.tid,
        cpu,
    }
}

/// Reserves a record, lets `fill` write all of it, and submits it. A record that finds no room is
/// counted.
///
/// The reader is not woken for each record, which would put its thread onto a CPU in the middle of
/// what is measured; it looks by itself every few milliseconds, and is woken when the buffer fills.
#[inline(always)]
pub fn emit<T: 'static>(kind: Kind, fill: impl FnOnce(&mut MaybeUninit<T>)) {
    let Some(mut entry) = RECORDS.reserve::<T>(0) else {
        return count_lost(kind);
    };
    fill(&mut entry);
    let full = RECORDS.query(u64::from(BPF_RB_AVAIL_DATA)) > global!(WAKE_BYTES);
    entry.submit(u64::from(if full {
        BPF_RB_FORCE_WAKEUP
    } else {
        BPF_RB_NO_WAKEUP
    }));
}

#[inline(always)]
fn count_lost(kind: Kind) {
    if let Some(lost) = LOST.get_ptr_mut(0) {
        // SAFETY: the map's value on this CPU. A program that preempts this one on the same CPU
        // can cost a count, never a bad access; kinds are 1 to 5, so the index is inside.
        unsafe { (*lost).by_kind[kind as usize - 1] += 1 };
    }
}
