//! The eBPF programs of the tool.
//!
//! Thin entry points; what they do is in one file per source of events: [`usdt`] (any probe of any
//! process, told apart by attach cookie), [`ioctl`] (KVM's ioctls), [`run`] (`KVM_RUN`, which is
//! counted here and not reported call by call), [`call`] (the ITS functions of arm64's KVM).
//! [`shared`] has what they all use: the maps, the ring buffer, the filter.
//!
//! The loader is `ebpf/user/src/capture`. It attaches those programs that the kernel takes; the
//! programs therefore do not count on each other. The object is the same for x86-64 and arm64:
//! whatever depends on the architecture reaches it through maps and globals.
#![no_std]
#![no_main]

mod call;
mod ioctl;
mod run;
mod shared;
mod usdt;

use aya_ebpf::EbpfContext;
use aya_ebpf::macros::{fentry, fexit, kprobe, kretprobe, raw_tracepoint, tracepoint, uprobe};
use aya_ebpf::programs::{
    FEntryContext, FExitContext, ProbeContext, RawTracePointContext, RetProbeContext,
    TracePointContext,
};
use blackout_abi::event::Function;

/// USDT sites, where the kernel has sleepable uprobes (6.0): strings are paged in if need be.
#[uprobe(sleepable)]
fn usdt_sleepable(ctx: ProbeContext) -> u32 {
    usdt::hit::<true>(ctx.as_ptr());
    0
}

/// USDT sites on older kernels: a string whose page is not resident is not read.
#[uprobe]
fn usdt_plain(ctx: ProbeContext) -> u32 {
    usdt::hit::<false>(ctx.as_ptr());
    0
}

/// `syscalls:sys_enter_ioctl`
#[tracepoint]
fn ioctl_enter(ctx: TracePointContext) -> u32 {
    // SAFETY: the program is attached to `syscalls:sys_enter_ioctl` only.
    let (fd, cmd, arg) = unsafe { ioctl::enter_args(ctx.as_ptr()) };
    ioctl::enter(fd, cmd, arg);
    0
}

/// `syscalls:sys_exit_ioctl`, where the kernel has BTF (`CONFIG_DEBUG_INFO_BTF`).
#[tracepoint]
fn ioctl_exit(ctx: TracePointContext) -> u32 {
    // SAFETY: the program is attached to `syscalls:sys_exit_ioctl` only.
    let ret = unsafe { ioctl::exit_ret(ctx.as_ptr()) };
    ioctl::exit::<true>(ret);
    0
}

/// `syscalls:sys_exit_ioctl` without BTF: a vCPU that was running when the recording began is not
/// told from one that starts.
#[tracepoint]
fn ioctl_exit_plain(ctx: TracePointContext) -> u32 {
    // SAFETY: the program is attached to `syscalls:sys_exit_ioctl` only.
    let ret = unsafe { ioctl::exit_ret(ctx.as_ptr()) };
    ioctl::exit::<false>(ret);
    0
}

/// A tracepoint whose record is of no interest: by itself, which spares the kernel to make the record,
/// and through perf, where the kernel does not give it out so.
macro_rules! moment {
    ($raw:ident, $plain:ident, $($does:path),+) => {
        #[raw_tracepoint]
        fn $raw(_ctx: RawTracePointContext) -> i32 {
            $($does();)+
            0
        }

        #[tracepoint]
        fn $plain(_ctx: TracePointContext) -> u32 {
            $($does();)+
            0
        }
    };
}

// `kvm:kvm_entry`
moment!(guest_enter_raw, guest_enter, run::guest_enter);
// `kvm:kvm_exit`
moment!(guest_exit_raw, guest_exit, run::guest_exit);
// `kvm:kvm_emulate_insn`
moment!(guest_emulated_raw, guest_emulated, run::guest_emulated);
// `sched:sched_process_exit`, which fires for every thread.
moment!(
    thread_exit_raw,
    thread_exit,
    run::thread_exit,
    ioctl::thread_exit
);

/// The four programs of one kernel function: a pair by trampoline, a pair by kprobe.
macro_rules! function {
    ($function:expr, $fentry:ident, $fexit:ident, $kprobe:ident, $kretprobe:ident) => {
        #[fentry]
        fn $fentry(_ctx: FEntryContext) -> i32 {
            call::enter();
            0
        }

        #[fexit]
        fn $fexit(ctx: FExitContext) -> i32 {
            // All three functions take one argument; the return value follows it.
            call::exit($function, ctx.arg::<i32>(1));
            0
        }

        #[kprobe]
        fn $kprobe(_ctx: ProbeContext) -> u32 {
            call::enter();
            0
        }

        #[kretprobe]
        fn $kretprobe(ctx: RetProbeContext) -> u32 {
            call::exit($function, call::returned(ctx.as_ptr()) as i32);
            0
        }
    };
}

/// The pair by trampoline of a function that serves the ioctls of one kind of KVM's files.
macro_rules! serves {
    ($fentry:ident, $fexit:ident) => {
        #[fentry]
        fn $fentry(_ctx: FEntryContext) -> i32 {
            ioctl::enter_in_kvm();
            0
        }

        #[fexit]
        fn $fexit(ctx: FExitContext) -> i32 {
            // They take three arguments; the return value follows them.
            ioctl::exit::<true>(ctx.arg::<i64>(3));
            0
        }
    };
}

serves!(kvm_dev_fentry, kvm_dev_fexit);
serves!(kvm_vm_fentry, kvm_vm_fexit);
serves!(kvm_vcpu_fentry, kvm_vcpu_fexit);
serves!(kvm_device_fentry, kvm_device_fexit);

/// All four of these functions.
#[kprobe]
fn kvm_kprobe(_ctx: ProbeContext) -> u32 {
    ioctl::enter_in_kvm();
    0
}

/// Their returns.
#[kretprobe]
fn kvm_kretprobe(ctx: RetProbeContext) -> u32 {
    ioctl::exit::<true>(call::returned(ctx.as_ptr()));
    0
}

function!(
    Function::ItsSave,
    its_save_fentry,
    its_save_fexit,
    its_save_kprobe,
    its_save_kretprobe
);
function!(
    Function::ItsRestore,
    its_restore_fentry,
    its_restore_fexit,
    its_restore_kprobe,
    its_restore_kretprobe
);
function!(
    Function::PendingSave,
    pending_save_fentry,
    pending_save_fexit,
    pending_save_kprobe,
    pending_save_kretprobe
);

/// `bpf_probe_read_kernel`, `bpf_get_attach_cookie` and others are given only to programs under a
/// licence that the kernel takes for one.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

/// Never reached: the programs have no path that panics, and the verifier refuses one that could.
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}
