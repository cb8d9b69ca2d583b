//! From the first instruction to Rust: translation, caches, floating point, a stack, vectors.
//!
//! The MMU is on because without it every access is to device memory: atomics trap there, and on
//! real hardware the writes would bypass the caches through which KVM reads the ITS tables.
//! Translation is the identity, in 1 GiB blocks: the first holds the devices, the rest is RAM.

use core::arch::global_asm;

use blackout_abi::guest::{AARCH64_BOOT_PAGE, MAX_VCPUS};

use super::tree;

/// Bytes of a vCPU's stack.
const STACK: usize = 32 << 10;

/// The only translation table: level 1 of 39-bit addresses with 4 KiB granules, 512 blocks of
/// 1 GiB (Arm ARM, D8.3). The access flag is set, so that no CPU ever writes to it.
#[repr(C, align(4096))]
struct Blocks([u64; 512]);

static BLOCKS: Blocks = Blocks(blocks());

/// `MAIR_EL1`: attribute 0 is normal write-back memory, attribute 1 Device-nGnRE.
const MAIR: u64 = 0x04ff;
/// `TCR_EL1`: 39-bit addresses by TTBR0, walks through inner-shareable write-back memory, none by
/// TTBR1, 40-bit physical addresses.
const TCR: u64 = 25 | 1 << 8 | 1 << 10 | 3 << 12 | 1 << 23 | 2 << 32;

const fn blocks() -> [u64; 512] {
    const BLOCK: u64 = 1;
    const DEVICE: u64 = 1 << 2 | 1 << 53 | 1 << 54; // Attribute 1, never executed.
    const NORMAL: u64 = 3 << 8; // Attribute 0, inner shareable.
    const ACCESSED: u64 = 1 << 10;
    let mut blocks = [0; 512];
    let mut index = 0;
    while index < blocks.len() {
        let kind = if index == 0 { DEVICE } else { NORMAL };
        blocks[index] = (index as u64) << 30 | kind | ACCESSED | BLOCK;
        index += 1;
    }
    blocks
}

#[repr(C, align(16))]
struct Stacks([[u8; STACK]; MAX_VCPUS]);

static mut STACKS: Stacks = Stacks([[0; STACK]; MAX_VCPUS]);

unsafe extern "C" {
    /// Where PSCI starts the other vCPUs, with their index in `x0`.
    pub(crate) safe fn secondary_start();
}

global_asm!(
    r#"
    .section .text.entry, "ax"
    .global _start
_start:
    mov     x19, x0
    mov     x20, xzr
    bl      set_up_cpu
    mov     x0, x19
    b       {boot}

    .global secondary_start
secondary_start:
    mov     x20, x0
    bl      set_up_cpu
    mov     x0, x20
    b       {run}

/* x20 is the vCPU's index. */
set_up_cpu:
    mov     x0, #(3 << 20)              /* CPACR_EL1.FPEN: no trap on floating point. */
    msr     cpacr_el1, x0
    ldr     x0, ={mair}
    msr     mair_el1, x0
    ldr     x0, ={tcr}
    msr     tcr_el1, x0
    adrp    x0, {blocks}
    msr     ttbr0_el1, x0
    adrp    x0, vectors
    add     x0, x0, :lo12:vectors
    msr     vbar_el1, x0
    msr     tpidr_el1, x20              /* Where the interrupt handler finds the index. */
    tlbi    vmalle1
    dsb     nsh
    isb
    mrs     x0, sctlr_el1
    mov     x1, #0x1005                 /* I, C, M. */
    orr     x0, x0, x1
    bic     x0, x0, #2                  /* A: unaligned accesses are fine. */
    msr     sctlr_el1, x0
    isb
    adrp    x0, {stacks}
    add     x0, x0, :lo12:{stacks}
    mov     x1, #{stack}
    madd    x0, x20, x1, x0
    add     sp, x0, x1
    ret

    .macro  vector target
    .balign 0x80
    b       \target
    .endm

    .balign 0x800
vectors:
    .rept   5
    vector  unexpected
    .endr
    vector  interrupt                   /* IRQ, this exception level on its own stack. */
    .rept   10
    vector  unexpected
    .endr

/* Rust keeps what the procedure call standard makes it keep; the rest is saved here. */
interrupt:
    sub     sp, sp, #0x2b0
    stp     x0, x1, [sp, #0x00]
    stp     x2, x3, [sp, #0x10]
    stp     x4, x5, [sp, #0x20]
    stp     x6, x7, [sp, #0x30]
    stp     x8, x9, [sp, #0x40]
    stp     x10, x11, [sp, #0x50]
    stp     x12, x13, [sp, #0x60]
    stp     x14, x15, [sp, #0x70]
    stp     x16, x17, [sp, #0x80]
    stp     x18, x29, [sp, #0x90]
    str     x30, [sp, #0xa0]
    add     x0, sp, #0xb0
    stp     q0, q1, [x0, #0x000]
    stp     q2, q3, [x0, #0x020]
    stp     q4, q5, [x0, #0x040]
    stp     q6, q7, [x0, #0x060]
    stp     q8, q9, [x0, #0x080]
    stp     q10, q11, [x0, #0x0a0]
    stp     q12, q13, [x0, #0x0c0]
    stp     q14, q15, [x0, #0x0e0]
    stp     q16, q17, [x0, #0x100]
    stp     q18, q19, [x0, #0x120]
    stp     q20, q21, [x0, #0x140]
    stp     q22, q23, [x0, #0x160]
    stp     q24, q25, [x0, #0x180]
    stp     q26, q27, [x0, #0x1a0]
    stp     q28, q29, [x0, #0x1c0]
    stp     q30, q31, [x0, #0x1e0]
    bl      {interrupt}
    add     x0, sp, #0xb0
    ldp     q0, q1, [x0, #0x000]
    ldp     q2, q3, [x0, #0x020]
    ldp     q4, q5, [x0, #0x040]
    ldp     q6, q7, [x0, #0x060]
    ldp     q8, q9, [x0, #0x080]
    ldp     q10, q11, [x0, #0x0a0]
    ldp     q12, q13, [x0, #0x0c0]
    ldp     q14, q15, [x0, #0x0e0]
    ldp     q16, q17, [x0, #0x100]
    ldp     q18, q19, [x0, #0x120]
    ldp     q20, q21, [x0, #0x140]
    ldp     q22, q23, [x0, #0x160]
    ldp     q24, q25, [x0, #0x180]
    ldp     q26, q27, [x0, #0x1a0]
    ldp     q28, q29, [x0, #0x1c0]
    ldp     q30, q31, [x0, #0x1e0]
    ldr     x30, [sp, #0xa0]
    ldp     x18, x29, [sp, #0x90]
    ldp     x16, x17, [sp, #0x80]
    ldp     x14, x15, [sp, #0x70]
    ldp     x12, x13, [sp, #0x60]
    ldp     x10, x11, [sp, #0x50]
    ldp     x8, x9, [sp, #0x40]
    ldp     x6, x7, [sp, #0x30]
    ldp     x4, x5, [sp, #0x20]
    ldp     x2, x3, [sp, #0x10]
    ldp     x0, x1, [sp, #0x00]
    add     sp, sp, #0x2b0
    eret

unexpected:
    mrs     x0, esr_el1
    mrs     x1, elr_el1
    mrs     x2, far_el1
    b       {exception}
    "#,
    boot = sym boot,
    run = sym crate::run_vcpu,
    interrupt = sym super::gic::interrupt,
    exception = sym super::exception,
    blocks = sym BLOCKS,
    stacks = sym STACKS,
    stack = const STACK,
    mair = const MAIR,
    tcr = const TCR,
);

/// vCPU 0 comes here with what its monitor had in `x0`: the boot page's address, or nothing.
extern "C" fn boot(boot_page: u64) -> ! {
    // SAFETY: below this program there is nothing yet but what the monitor left there.
    unsafe {
        if boot_page == 0 {
            tree::make_boot_page();
            crate::boot(AARCH64_BOOT_PAGE)
        }
        crate::boot(boot_page)
    }
}
