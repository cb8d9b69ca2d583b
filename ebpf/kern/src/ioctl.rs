//! KVM's ioctls, by the system call's tracepoints, as there is no tracepoint in KVM for them, or by
//! KVM's own functions, which leaves the host's other system calls alone. One record for each call,
//! made when it returns; `KVM_RUN` goes to [`run`](crate::run) instead.

use core::ffi::c_void;

use aya_ebpf::helpers::generated::bpf_probe_read_user;
use blackout_abi::event::{Ioctl, Kind};

use crate::run;
use crate::shared::{
    IOCTLS, current, emit, header, is_target, is_wanted, now, syscall_args, syscall_third_arg,
};

const KVMIO: u32 = 0xae;
const KVM_RUN: u32 = 0xae80;
const KVM_CREATE_DEVICE: u32 = 0xc00c_aee0;
/// `_IOC_WRITE`: the caller passes a structure to the kernel.
const IOC_WRITE: u32 = 1 << 30;

/// `fd`, `cmd` and `arg` of the call.
///
/// # Safety
/// `ctx` is the context of `syscalls:sys_enter_ioctl`, whose record has each argument as 8 bytes
/// from offset 16 on (`struct syscall_trace_enter`).
#[inline(always)]
pub unsafe fn enter_args(ctx: *mut c_void) -> (u32, u32, u64) {
    let args = ctx.cast::<u64>();
    // SAFETY: the caller's; the verifier checks that the offsets are inside the record.
    unsafe { (*args.add(2) as u32, *args.add(3) as u32, *args.add(4)) }
}

/// What the call returned.
///
/// # Safety
/// `ctx` is the context of `syscalls:sys_exit_ioctl` (`struct syscall_trace_exit`).
#[inline(always)]
pub unsafe fn exit_ret(ctx: *mut c_void) -> i64 {
    // SAFETY: the caller's; the verifier checks that the offset is inside the record.
    unsafe { *ctx.cast::<i64>().add(2) }
}

/// A function of KVM's that serves ioctls is entered. What the system call was given is in the registers
/// that were saved at its entry.
#[inline(always)]
pub fn enter_in_kvm() {
    if let Some((fd, cmd)) = syscall_args()
        && let Some(arg) = syscall_third_arg()
    {
        enter(fd as u32, cmd as u32, arg);
    }
}

/// An ioctl is called, by any process and on any file.
#[inline(always)]
pub fn enter(fd: u32, cmd: u32, arg: u64) {
    if (cmd >> 8) & 0xff != KVMIO {
        return;
    }
    let task = current();
    let start = now();
    if cmd == KVM_RUN {
        return run::enter(task, fd, start);
    }
    if !is_wanted(task.tgid) {
        return;
    }
    let mut call = Ioctl {
        header: header(Kind::Ioctl, task, start),
        start,
        fd,
        cmd,
        arg,
        ret: 0,
        head: [0; 6],
        head_len: 0,
        reserved: 0,
    };
    if cmd & IOC_WRITE != 0 {
        read_head(&mut call);
    }
    // A full map (8192 threads inside a KVM ioctl) drops the call; so does the entry of a thread
    // that was killed in one and whose number came back, which is overwritten.
    let _ = IOCTLS.insert(task.tid, call, 0);
}

/// An ioctl returns, of any process and on any file. `REGISTERS` says whether the program may look
/// at the task's saved registers.
#[inline(always)]
pub fn exit<const REGISTERS: bool>(ret: i64) {
    let task = current();
    if run::exit(task.tid) {
        return;
    }
    let Some(call) = IOCTLS.get_ptr_mut(task.tid) else {
        // The call was not seen: it is of no interest, or began before the recording.
        if REGISTERS
            && is_target(task.tgid)
            && let Some((fd, cmd)) = syscall_args()
            && cmd as u32 == KVM_RUN
        {
            run::exit_unseen(task, fd as u32);
        }
        return;
    };
    // SAFETY: the thread's own entry; nobody else writes or deletes it while the thread is here.
    let call = unsafe { &mut *call };
    call.header = header(Kind::Ioctl, task, now());
    call.ret = ret;
    if call.cmd == KVM_CREATE_DEVICE {
        read_head(call);
    }
    emit::<Ioctl>(Kind::Ioctl, |record| {
        record.write(*call);
    });
    let _ = IOCTLS.remove(task.tid);
}

/// The running thread ends.
#[inline(always)]
pub fn thread_exit() {
    let _ = IOCTLS.remove(current().tid);
}

/// Reads what `arg` points to, as far as the request says that it is long.
#[inline(always)]
fn read_head(call: &mut Ioctl) {
    let size = (call.cmd >> 16) & 0x3fff;
    let size = if size < 24 { size } else { 24 };
    // SAFETY: `head` has room for 24 bytes; the helper checks the user's address.
    let failed = unsafe {
        bpf_probe_read_user(
            call.head.as_mut_ptr().cast(),
            size,
            call.arg as *const c_void,
        )
    };
    call.head_len = if failed == 0 { size } else { 0 };
}
