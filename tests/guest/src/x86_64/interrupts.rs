//! The IDT, the local APIC, and the interrupts that vCPU 0 sends itself or gets from its timer.
//!
//! Interrupts are off except while a command asks for one: a handler that runs on its own would
//! show from outside as a vCPU that stands still.

use core::arch::global_asm;
use core::sync::atomic::{AtomicU64, Ordering};

use super::cpu;
use crate::shared::Shared;

/// The first vector that is not an exception's.
const FIRST: u64 = 32;
const TIMER: u64 = 32;
/// The first of 64 vectors for [`raise`].
const RAISED: u64 = 64;
const SPURIOUS: u64 = 255;

/// The local APIC's timer counts at this rate under KVM, and is divided by one.
const TIMER_HZ: u64 = 1_000_000_000;
const DIVIDE_BY_ONE: u64 = 0xb;
const PERIODIC: u64 = 1 << 17;
/// The spurious vector register's "APIC enabled".
const ENABLED: u64 = 1 << 8;

/// How long a pending interrupt may take to arrive, in time stamp counter ticks: a fraction of a
/// second.
const ARRIVAL_TICKS: u64 = 1 << 30;

/// The last vector taken.
static TAKEN: AtomicU64 = AtomicU64::new(0);

unsafe extern "C" {
    static vectors: u8;
}

/// Bytes of one entry of `vectors`.
const ENTRY: u64 = 16;

#[repr(C, align(16))]
struct Idt([[u64; 2]; 256]);

static mut IDT: Idt = Idt([[0; 2]; 256]);

global_asm!(
    r#"
    .global vectors
    .balign 16
vectors:
    .set vector, 0
    .rept 256
    .balign 16
    pushq   $vector
    jmp     interrupted
    .set vector, vector + 1
    .endr

/* The CPU aligned the stack and pushed five words; with the vector and nine registers it is aligned
   again once one more word is there. An exception's error code does not matter: those don't return. */
interrupted:
    pushq   %rax
    pushq   %rcx
    pushq   %rdx
    pushq   %rsi
    pushq   %rdi
    pushq   %r8
    pushq   %r9
    pushq   %r10
    pushq   %r11
    movq    72(%rsp), %rdi
    subq    $8, %rsp
    cld
    call    {taken}
    addq    $8, %rsp
    popq    %r11
    popq    %r10
    popq    %r9
    popq    %r8
    popq    %rdi
    popq    %rsi
    popq    %rdx
    popq    %rcx
    popq    %rax
    addq    $8, %rsp
    iretq
    "#,
    taken = sym taken,
    options(att_syntax),
);

/// Fills the IDT, and gives vCPU 0 an APIC that takes interrupts.
pub(super) fn set_up() {
    /// Present, an interrupt gate, to the code segment that this program runs in.
    const GATE: u64 = 0x8e00_0008_0000;
    let first = (&raw const vectors).addr() as u64;
    for vector in 0..256 {
        let entry = first + vector * ENTRY;
        let low = entry & 0xffff | GATE | (entry & 0xffff_0000) << 32;
        // SAFETY: nothing reads the table before it is loaded below, and vCPU 0 is alone.
        unsafe { (&raw mut IDT.0[vector as usize]).write([low, entry >> 32]) };
    }
    cpu::load_idt((&raw const IDT).addr() as u64, size_of::<Idt>() as u16 - 1);
    cpu::enable_x2apic();
    cpu::write_apic(cpu::Apic::Spurious, ENABLED | SPURIOUS);
}

/// Raises an interrupt that stays pending; returns its vector.
pub(super) fn raise(event: u64) -> u64 {
    cpu::mask_interrupts();
    let vector = RAISED + event % 64;
    TAKEN.store(0, Ordering::Relaxed);
    cpu::write_apic(cpu::Apic::SelfIpi, vector);
    vector
}

/// Takes what is pending; returns its vector, 0 if nothing came.
pub(super) fn take() -> u64 {
    cpu::unmask_interrupts();
    let start = cpu::ticks();
    while TAKEN.load(Ordering::Relaxed) < RAISED && cpu::ticks().wrapping_sub(start) < ARRIVAL_TICKS
    {
        core::hint::spin_loop();
    }
    cpu::mask_interrupts();
    TAKEN.swap(0, Ordering::Relaxed)
}

/// Lets the timer interrupt this vCPU `rate` times a second from now on; 0 stops it.
pub(super) fn start_timer(rate: u64) {
    cpu::write_apic(cpu::Apic::TimerDivide, DIVIDE_BY_ONE);
    cpu::write_apic(cpu::Apic::Timer, PERIODIC | TIMER);
    let count = TIMER_HZ.checked_div(rate).unwrap_or(0);
    cpu::write_apic(cpu::Apic::TimerCount, count);
    cpu::unmask_interrupts();
}

extern "C" fn taken(vector: u64) {
    if vector < FIRST {
        super::exception(vector);
    }
    if vector >= RAISED {
        TAKEN.store(vector, Ordering::Relaxed);
    }
    Shared::get().count_lpi();
    cpu::write_apic(cpu::Apic::EndOfInterrupt, 0);
}
