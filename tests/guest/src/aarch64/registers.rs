//! System registers, device registers and the hypervisor call.

use core::arch::asm;

/// Reads a system register.
macro_rules! read {
    ($name:literal) => {{
        let value: u64;
        // SAFETY: reading one of the registers that this guest names has no effect on memory.
        unsafe { core::arch::asm!(concat!("mrs {}, ", $name), out(reg) value, options(nostack)) };
        value
    }};
}

/// Writes a system register, and waits until the write is seen.
macro_rules! write {
    ($name:literal, $value:expr) => {{
        let value: u64 = $value;
        // SAFETY: the registers that this guest writes belong to the interrupt controller: no
        // memory that Rust knows of depends on them.
        unsafe {
            core::arch::asm!(concat!("msr ", $name, ", {}"), "isb", in(reg) value, options(nostack))
        };
    }};
}

pub(super) use read;

/// The interrupt controller's CPU interface, by encoding: the assembler wants a feature for names.
pub(crate) mod icc {
    /// `ICC_IAR1_EL1`: acknowledges and returns an interrupt.
    pub(crate) fn acknowledge() -> u32 {
        read!("s3_0_c12_c12_0") as u32
    }

    /// `ICC_EOIR1_EL1`.
    pub(crate) fn end(intid: u32) {
        write!("s3_0_c12_c12_1", u64::from(intid));
    }

    /// `ICC_SRE_EL1.SRE`, `ICC_PMR_EL1` open, `ICC_IGRPEN1_EL1` on.
    pub(crate) fn enable() {
        write!("s3_0_c12_c12_5", 7);
        write!("s3_0_c4_c6_0", 0xff);
        write!("s3_0_c12_c12_7", 1);
    }
}

/// A range of device registers.
#[derive(Clone, Copy)]
pub(crate) struct Registers(pub(crate) u64);

impl Registers {
    /// Writes 32 bits, after all writes to memory that came before.
    pub(crate) fn write(self, offset: u64, value: u32) {
        // SAFETY: the range is a device's, mapped as such. One plain store, so that the hypervisor
        // gets a syndrome that it can decode; the barrier orders tables in memory before the
        // device that reads them.
        unsafe {
            asm!("dsb sy", "str {:w}, [{}]", in(reg) value, in(reg) self.0 + offset, options(nostack))
        };
    }

    /// Writes 8 bits.
    pub(crate) fn write8(self, offset: u64, value: u8) {
        // SAFETY: see `write`.
        unsafe {
            asm!("strb {:w}, [{}]", in(reg) u32::from(value), in(reg) self.0 + offset, options(nostack))
        };
    }

    /// Reads 64 bits.
    pub(crate) fn read64(self, offset: u64) -> u64 {
        let value;
        // SAFETY: see `write`.
        unsafe { asm!("ldr {}, [{}]", out(reg) value, in(reg) self.0 + offset, options(nostack)) };
        value
    }

    /// Writes 64 bits, after all writes to memory that came before.
    pub(crate) fn write64(self, offset: u64, value: u64) {
        // SAFETY: see `write`.
        unsafe {
            asm!("dsb sy", "str {}, [{}]", in(reg) value, in(reg) self.0 + offset, options(nostack))
        };
    }
}

/// PSCI (Arm DEN 0022), by `HVC` as KVM wants it.
pub(crate) mod psci {
    use core::arch::asm;

    /// `CPU_ON`, 64-bit.
    pub(crate) const CPU_ON: u64 = 0xc400_0003;
    /// `SYSTEM_OFF`.
    pub(crate) const SYSTEM_OFF: u64 = 0x8400_0008;
    /// `SYSTEM_RESET`.
    pub(crate) const SYSTEM_RESET: u64 = 0x8400_0009;

    /// Calls `function`; 0 is success.
    pub(crate) fn call(function: u64, arguments: [u64; 3]) -> u64 {
        let result;
        // SAFETY: a PSCI call changes none of this vCPU's memory; the registers that it may change
        // are named (SMC Calling Convention 1.0).
        unsafe {
            asm!(
                "hvc #0",
                inout("x0") function => result,
                inout("x1") arguments[0] => _,
                inout("x2") arguments[1] => _,
                inout("x3") arguments[2] => _,
                out("x4") _, out("x5") _, out("x6") _, out("x7") _, out("x8") _, out("x9") _,
                out("x10") _, out("x11") _, out("x12") _, out("x13") _, out("x14") _,
                out("x15") _, out("x16") _, out("x17") _,
                options(nostack)
            );
        }
        result
    }
}

/// Lets this vCPU take interrupts.
pub(crate) fn unmask() {
    // SAFETY: the vectors are set, and the handler keeps every register.
    unsafe { asm!("msr daifclr, #2", options(nostack)) };
}

/// Keeps interrupts from this vCPU.
pub(crate) fn mask() {
    // SAFETY: only delays the handler.
    unsafe { asm!("msr daifset, #2", options(nostack)) };
}

/// Stops this vCPU for good, as far as it is up to itself.
pub(crate) fn wait_for_ever() -> ! {
    loop {
        // SAFETY: waits, changes nothing.
        unsafe { asm!("wfi", options(nostack)) };
    }
}

/// A moment after which something that did not happen will not.
pub(crate) struct Deadline(u64);

impl Deadline {
    /// That many seconds of the virtual counter from now.
    pub(crate) fn seconds(seconds: u64) -> Self {
        Deadline(read!("cntvct_el0") + seconds * read!("cntfrq_el0"))
    }

    /// Whether it has come.
    pub(crate) fn passed(&self) -> bool {
        read!("cntvct_el0") > self.0
    }
}
