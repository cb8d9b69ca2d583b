//! Names of the registers that this monitor reads or writes by itself, as `KVM_{GET,SET}_ONE_REG`
//! and the GIC's device attributes know them (`Documentation/virt/kvm/api.rst`, "arm64 registers").

use kvm_bindings::{
    KVM_REG_ARM_CORE, KVM_REG_ARM64, KVM_REG_ARM64_SYSREG, KVM_REG_SIZE_U64, kvm_regs, user_pt_regs,
};

/// The low 16 bits of a system register's id: its encoding.
pub(super) const fn sysreg(op0: u64, op1: u64, crn: u64, crm: u64, op2: u64) -> u64 {
    op0 << 14 | op1 << 11 | crn << 7 | crm << 3 | op2
}

const fn sysreg_id(encoding: u64) -> u64 {
    KVM_REG_ARM64 | KVM_REG_SIZE_U64 | KVM_REG_ARM64_SYSREG as u64 | encoding
}

/// A register of `struct kvm_regs`, at a byte offset.
const fn core_id(offset: usize) -> u64 {
    KVM_REG_ARM64 | KVM_REG_SIZE_U64 | KVM_REG_ARM_CORE as u64 | (offset / 4) as u64
}

const PT_REGS: usize = std::mem::offset_of!(kvm_regs, regs);

/// The first argument register.
pub(super) const X0: u64 = core_id(PT_REGS + std::mem::offset_of!(user_pt_regs, regs));
/// The program counter.
pub(super) const PC: u64 = core_id(PT_REGS + std::mem::offset_of!(user_pt_regs, pc));
/// The processor state.
pub(super) const PSTATE: u64 = core_id(PT_REGS + std::mem::offset_of!(user_pt_regs, pstate));
/// `MPIDR_EL1`: the vCPU's affinity.
pub(super) const MPIDR_EL1: u64 = sysreg_id(sysreg(3, 0, 0, 0, 5));
/// `KVM_REG_ARM_TIMER_CNT`: the virtual counter.
pub(super) const TIMER_CNT: u64 = sysreg_id(sysreg(3, 3, 14, 3, 2));

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_those_of_the_kernel_headers() {
        assert_eq!(X0, 0x6030_0000_0010_0000);
        assert_eq!(PC, 0x6030_0000_0010_0040);
        assert_eq!(PSTATE, 0x6030_0000_0010_0042);
        assert_eq!(TIMER_CNT, 0x6030_0000_0013_df1a);
        assert_eq!(MPIDR_EL1, 0x6030_0000_0013_c005);
    }
}
