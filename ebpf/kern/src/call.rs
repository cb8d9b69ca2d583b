//! The kernel's own functions behind an ioctl. Of the save path only the outermost is there to be
//! traced: the functions it calls are inlined.

use core::ffi::c_void;

use aya_ebpf::helpers::generated::bpf_probe_read_kernel;
use blackout_abi::event::{Call, Function, Kind};

use crate::shared::{CALLS, current, emit, header, is_target, now, return_offset};

/// A watched function is entered. They do not nest, so a thread is in at most one.
#[inline(always)]
pub fn enter() {
    let task = current();
    if is_target(task.tgid) {
        let _ = CALLS.insert(task.tid, now(), 0);
    }
}

/// A watched function returns `ret`.
#[inline(always)]
pub fn exit(function: Function, ret: i32) {
    let end = now();
    let task = current();
    let Some(start) = CALLS.get_ptr(task.tid) else {
        return;
    };
    // SAFETY: the thread's own entry; nobody else writes or deletes it while the thread is here.
    let start = unsafe { *start };
    emit::<Call>(Kind::Call, |record| {
        record.write(Call {
            header: header(Kind::Call, task, end),
            start,
            ret,
            function: function as u32,
            reserved: 0,
        });
    });
    let _ = CALLS.remove(task.tid);
}

/// What a function returned, from the context of a kretprobe.
#[inline(always)]
pub fn returned(registers: *mut c_void) -> i64 {
    let mut value = 0_u64;
    // SAFETY: `value` has room for 8 bytes; the helper checks the source, which the loader made an
    // offset into the registers. A failed read leaves 0.
    unsafe {
        bpf_probe_read_kernel(
            (&raw mut value).cast(),
            8,
            registers.cast::<u8>().add(return_offset()).cast(),
        );
    }
    value as i64
}
