//! Ports, model-specific registers, and the local APIC behind them.

use core::arch::asm;

const MSR_APIC_BASE: u32 = 0x1b;
/// `IA32_APIC_BASE`: the APIC is on, and its registers are MSRs.
const APIC_ON: u64 = 1 << 11;
const APIC_X2: u64 = 1 << 10;

/// Writes a byte to a port.
pub(super) fn out8(port: u16, value: u8) {
    // SAFETY: the ports that this guest writes belong to devices that never touch memory.
    unsafe { asm!("out dx, al", in("dx") port, in("al") value, options(nostack)) };
}

/// Writes two bytes to a port.
pub(super) fn out16(port: u16, value: u16) {
    // SAFETY: as above.
    unsafe { asm!("out dx, ax", in("dx") port, in("ax") value, options(nostack)) };
}

/// Whether the APIC has an x2APIC mode (CPUID leaf 1).
pub(super) fn has_x2apic() -> bool {
    core::arch::x86_64::__cpuid(1).ecx & 1 << 21 != 0
}

/// Switches this vCPU's APIC to x2APIC mode (Intel SDM volume 3, 12.12).
pub(super) fn enable_x2apic() {
    write_msr(MSR_APIC_BASE, read_msr(MSR_APIC_BASE) | APIC_ON | APIC_X2);
}

/// Registers of the APIC in x2APIC mode, by their MSR.
#[derive(Clone, Copy)]
#[repr(u32)]
pub(super) enum Apic {
    EndOfInterrupt = 0x80b,
    Spurious = 0x80f,
    Command = 0x830,
    Timer = 0x832,
    TimerCount = 0x838,
    TimerDivide = 0x83e,
    SelfIpi = 0x83f,
}

/// Writes one of this vCPU's APIC registers.
pub(super) fn write_apic(register: Apic, value: u64) {
    write_msr(register as u32, value);
}

/// Sends `command`, the low half of the ICR, to the vCPU with the APIC id `target`.
pub(super) fn send_ipi(target: u32, command: u32) {
    write_apic(Apic::Command, u64::from(target) << 32 | u64::from(command));
}

/// Loads the IDT register.
pub(super) fn load_idt(base: u64, limit: u16) {
    #[repr(C, packed)]
    struct Pointer(u16, u64);
    let pointer = Pointer(limit, base);
    // SAFETY: the table at `base` is never freed, and its gates lead to code that returns with all
    // registers as they were, or not at all.
    unsafe { asm!("lidt [{}]", in(reg) &raw const pointer, options(nostack)) };
}

/// Lets interrupts in. They may use the stack below the red zone, which this target has not.
pub(super) fn unmask_interrupts() {
    // SAFETY: the IDT is loaded. A barrier for the compiler: handlers write to memory.
    unsafe { asm!("sti", options(nostack)) };
}

/// Keeps interrupts out.
pub(super) fn mask_interrupts() {
    // SAFETY: nothing here waits for an interrupt with interrupts off.
    unsafe { asm!("cli", options(nostack)) };
}

/// The address of the page tables in use.
pub(super) fn page_tables() -> u64 {
    let value: u64;
    // SAFETY: reading CR3 changes nothing.
    unsafe { asm!("mov {}, cr3", out(reg) value, options(nostack, nomem)) };
    value
}

/// The address of the last page fault.
pub(super) fn fault_address() -> u64 {
    let value: u64;
    // SAFETY: reading CR2 changes nothing.
    unsafe { asm!("mov {}, cr2", out(reg) value, options(nostack, nomem)) };
    value
}

/// The time stamp counter.
pub(super) fn ticks() -> u64 {
    // SAFETY: every x86-64 CPU has RDTSC, and nothing forbids it at privilege 0.
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// Stops this vCPU for good.
pub(super) fn halt() -> ! {
    loop {
        // SAFETY: with interrupts off, nothing runs after this.
        unsafe { asm!("cli", "hlt", options(nostack, nomem)) };
    }
}

fn read_msr(index: u32) -> u64 {
    let (low, high): (u32, u32);
    // SAFETY: the MSRs that this guest reads exist on every CPU that KVM emulates.
    unsafe {
        asm!("rdmsr", in("ecx") index, out("eax") low, out("edx") high, options(nostack, nomem));
    }
    u64::from(high) << 32 | u64::from(low)
}

fn write_msr(index: u32, value: u64) {
    let (low, high) = (value as u32, (value >> 32) as u32);
    // SAFETY: the MSRs that this guest writes belong to the APIC, which never touches memory that
    // Rust knows of. It is a barrier for the compiler, so that what a vCPU is to find in memory is
    // there before it starts.
    unsafe { asm!("wrmsr", in("ecx") index, in("eax") low, in("edx") high, options(nostack)) };
}
