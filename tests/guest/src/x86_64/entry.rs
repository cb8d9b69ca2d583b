//! From the first instruction to Rust. The monitor enters vCPU 0 in 64-bit mode with a map of the
//! first 4 GiB; the others start in real mode at a page below 1 MiB, and use that map too.

use core::arch::global_asm;
use core::ptr;
use core::sync::atomic::{AtomicU64, Ordering};

use blackout_abi::guest::MAX_VCPUS;

use super::cpu;
use crate::Failure;

/// Bytes of a vCPU's stack.
const STACK: usize = 16 << 10;

#[repr(C, align(16))]
struct Stacks([[u8; STACK]; MAX_VCPUS]);

static mut STACKS: Stacks = Stacks([[0; STACK]; MAX_VCPUS]);

/// Where the other vCPUs start: the first page behind the monitor's boot pages. SIPI carries its
/// number.
const TRAMPOLINE: usize = 0xf000;
/// ICR: INIT, and SIPI with the page's number, edge-triggered, physical destination.
const INIT: u32 = 0x4500;
const SIPI: u32 = 0x4600 | (TRAMPOLINE >> 12) as u32;

/// How long a vCPU may take to start, in time stamp counter ticks: a few seconds.
const START_TICKS: u64 = 1 << 34;

/// The vCPU that is to start; read by `start64`.
static STARTING: AtomicU64 = AtomicU64::new(0);
/// The last vCPU that has started.
static STARTED: AtomicU64 = AtomicU64::new(0);

unsafe extern "C" {
    static trampoline: u8;
    static trampoline_tables: u8;
    static trampoline_end: u8;
}

global_asm!(
    r#"
    .section .text.entry, "ax"
    .global _start
_start:
    leaq    {stacks} + {stack}(%rip), %rsp
    xorl    %ebp, %ebp
    call    {boot}

/* Copied to a page below 1 MiB, where CS points. */
    .code16
    .global trampoline, trampoline_tables, trampoline_end
trampoline:
    cli
    movw    %cs, %ax
    movw    %ax, %ds
    lgdtl   (gdt_pointer - trampoline)
    movl    $0x20, %eax                 /* PAE. */
    movl    %eax, %cr4
    movl    (trampoline_tables - trampoline), %eax
    movl    %eax, %cr3
    movl    $0xc0000080, %ecx           /* EFER: LME. */
    movl    $0x100, %eax
    xorl    %edx, %edx
    wrmsr
    movl    $0x80000033, %eax           /* PG, NE, ET, MP, PE: straight to long mode. */
    movl    %eax, %cr0
    ljmpl   $8, $start64
    .balign 4
trampoline_tables:
    .long   0
gdt_pointer:
    .word   23
    .long   gdt
trampoline_end:

    .code64
start64:
    movl    $16, %eax
    movl    %eax, %ds
    movl    %eax, %es
    movl    %eax, %ss
    movq    {starting}(%rip), %rdi
    leaq    1(%rdi), %rax
    imulq   ${stack}, %rax
    leaq    {stacks}(%rip), %rsp
    addq    %rax, %rsp
    xorl    %ebp, %ebp
    call    {run}

    .balign 8
gdt:
    .quad   0, 0x00af9b000000ffff, 0x00cf93000000ffff
    "#,
    stacks = sym STACKS,
    stack = const STACK,
    starting = sym STARTING,
    boot = sym crate::boot,
    run = sym run,
    options(att_syntax),
);

/// Puts the real-mode code where SIPI can reach it.
pub(super) fn install_trampoline() {
    let (start, end) = ((&raw const trampoline), (&raw const trampoline_end));
    let tables = TRAMPOLINE + (&raw const trampoline_tables).addr() - start.addr();
    // SAFETY: the page lies behind the monitor's boot pages and below this program, so it is
    // nobody's, and the code is shorter than it.
    unsafe {
        ptr::copy_nonoverlapping(start, TRAMPOLINE as *mut u8, end.addr() - start.addr());
        (tables as *mut u32).write_unaligned(cpu::page_tables() as u32);
    }
}

/// Starts the vCPU whose APIC id is `index`, and waits until it runs.
///
/// KVM needs none of the pauses between INIT and SIPI that real hardware does.
pub(super) fn start_vcpu(index: usize) -> Result<(), Failure> {
    STARTING.store(index as u64, Ordering::Release);
    cpu::send_ipi(index as u32, INIT);
    cpu::send_ipi(index as u32, SIPI);
    let start = cpu::ticks();
    while STARTED.load(Ordering::Acquire) != index as u64 {
        if cpu::ticks().wrapping_sub(start) > START_TICKS {
            return Err(Failure::Vcpu);
        }
        core::hint::spin_loop();
    }
    Ok(())
}

/// A started vCPU's first Rust.
extern "C" fn run(index: usize) -> ! {
    STARTED.store(index as u64, Ordering::Release);
    crate::run_vcpu(index)
}
