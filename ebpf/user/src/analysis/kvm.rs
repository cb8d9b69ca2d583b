//! Names of KVM's ioctls and device attributes (linux/kvm.h of Linux 6.12, arm64's asm/kvm.h).

use crate::recording::{DeviceAttr, FdKind, Ioctl};

/// `KVM_DEV_ARM_VGIC_GRP_REDIST_REGS`
pub const GRP_REDIST_REGS: u32 = 5;
/// `KVM_DEV_ARM_VGIC_GRP_CTRL`
pub const GRP_CTRL: u32 = 4;

/// KVM's type of ioctls.
const KVMIO: u8 = 0xae;

/// The number of `KVM_SET_DEVICE_ATTR` within KVM's type.
const NR_SET_DEVICE_ATTR: u8 = 0xe1;

/// When a number means what its row says.
#[derive(Clone, Copy)]
enum On {
    /// Always, unless an earlier row fits.
    Any,
    /// On a VM's descriptor.
    Vm,
    /// On any other.
    Vcpu,
    /// When the request passes no structure.
    Bare,
}

/// An ioctl's number within KVM's type 0xAE, and its name. Size and direction are left out: the
/// size differs between architectures. Some numbers mean one thing on a VM and another on a vCPU, or with a
/// structure and without.
const NAMES: &[(u8, On, &str)] = &[
    (0x00, On::Any, "KVM_GET_API_VERSION"),
    (0x01, On::Any, "KVM_CREATE_VM"),
    (0x02, On::Any, "KVM_GET_MSR_INDEX_LIST"),
    (0x03, On::Any, "KVM_CHECK_EXTENSION"),
    (0x04, On::Any, "KVM_GET_VCPU_MMAP_SIZE"),
    (0x05, On::Any, "KVM_GET_SUPPORTED_CPUID"),
    (0x09, On::Any, "KVM_GET_EMULATED_CPUID"),
    (0x0a, On::Any, "KVM_GET_MSR_FEATURE_INDEX_LIST"),
    (0x41, On::Any, "KVM_CREATE_VCPU"),
    (0x42, On::Any, "KVM_GET_DIRTY_LOG"),
    (0x44, On::Any, "KVM_SET_NR_MMU_PAGES"),
    (0x45, On::Any, "KVM_GET_NR_MMU_PAGES"),
    (0x46, On::Any, "KVM_SET_USER_MEMORY_REGION"),
    (0x47, On::Any, "KVM_SET_TSS_ADDR"),
    (0x48, On::Any, "KVM_SET_IDENTITY_MAP_ADDR"),
    (0x49, On::Any, "KVM_SET_USER_MEMORY_REGION2"),
    (0x60, On::Any, "KVM_CREATE_IRQCHIP"),
    (0x61, On::Any, "KVM_IRQ_LINE"),
    (0x62, On::Any, "KVM_GET_IRQCHIP"),
    (0x63, On::Any, "KVM_SET_IRQCHIP"),
    (0x64, On::Any, "KVM_CREATE_PIT"),
    (0x65, On::Any, "KVM_GET_PIT"),
    (0x66, On::Any, "KVM_SET_PIT"),
    (0x67, On::Any, "KVM_IRQ_LINE_STATUS"),
    (0x6a, On::Any, "KVM_SET_GSI_ROUTING"),
    (0x71, On::Any, "KVM_REINJECT_CONTROL"),
    (0x76, On::Any, "KVM_IRQFD"),
    (0x77, On::Any, "KVM_CREATE_PIT2"),
    (0x78, On::Any, "KVM_SET_BOOT_CPU_ID"),
    (0x79, On::Any, "KVM_IOEVENTFD"),
    (0x7b, On::Any, "KVM_SET_CLOCK"),
    (0x7c, On::Any, "KVM_GET_CLOCK"),
    (0x80, On::Any, "KVM_RUN"),
    (0x81, On::Any, "KVM_GET_REGS"),
    (0x82, On::Any, "KVM_SET_REGS"),
    (0x83, On::Any, "KVM_GET_SREGS"),
    (0x84, On::Any, "KVM_SET_SREGS"),
    (0x85, On::Any, "KVM_TRANSLATE"),
    (0x86, On::Any, "KVM_INTERRUPT"),
    (0x88, On::Any, "KVM_GET_MSRS"),
    (0x89, On::Any, "KVM_SET_MSRS"),
    (0x8b, On::Any, "KVM_SET_SIGNAL_MASK"),
    (0x8c, On::Any, "KVM_GET_FPU"),
    (0x8d, On::Any, "KVM_SET_FPU"),
    (0x8e, On::Any, "KVM_GET_LAPIC"),
    (0x8f, On::Any, "KVM_SET_LAPIC"),
    (0x90, On::Any, "KVM_SET_CPUID2"),
    (0x91, On::Any, "KVM_GET_CPUID2"),
    (0x92, On::Any, "KVM_TPR_ACCESS_REPORTING"),
    (0x93, On::Any, "KVM_SET_VAPIC_ADDR"),
    (0x98, On::Any, "KVM_GET_MP_STATE"),
    (0x99, On::Any, "KVM_SET_MP_STATE"),
    (0x9a, On::Any, "KVM_NMI"),
    (0x9b, On::Any, "KVM_SET_GUEST_DEBUG"),
    (0x9c, On::Any, "KVM_X86_SETUP_MCE"),
    (0x9d, On::Any, "KVM_X86_GET_MCE_CAP_SUPPORTED"),
    (0x9e, On::Any, "KVM_X86_SET_MCE"),
    (0x9f, On::Vm, "KVM_GET_PIT2"),
    (0x9f, On::Vcpu, "KVM_GET_VCPU_EVENTS"),
    (0xa0, On::Vm, "KVM_SET_PIT2"),
    (0xa0, On::Vcpu, "KVM_SET_VCPU_EVENTS"),
    (0xa1, On::Vcpu, "KVM_GET_DEBUGREGS"),
    (0xa2, On::Bare, "KVM_SET_TSC_KHZ"),
    (0xa2, On::Any, "KVM_SET_DEBUGREGS"),
    (0xa3, On::Bare, "KVM_GET_TSC_KHZ"),
    (0xa3, On::Any, "KVM_ENABLE_CAP"),
    (0xa4, On::Vcpu, "KVM_GET_XSAVE"),
    (0xa5, On::Vm, "KVM_SIGNAL_MSI"),
    (0xa5, On::Vcpu, "KVM_SET_XSAVE"),
    (0xa6, On::Vcpu, "KVM_GET_XCRS"),
    (0xa7, On::Vcpu, "KVM_SET_XCRS"),
    (0xaa, On::Any, "KVM_DIRTY_TLB"),
    (0xab, On::Vm, "KVM_ARM_SET_DEVICE_ADDR"),
    (0xab, On::Vcpu, "KVM_GET_ONE_REG"),
    (0xac, On::Any, "KVM_SET_ONE_REG"),
    (0xad, On::Any, "KVM_KVMCLOCK_CTRL"),
    (0xae, On::Any, "KVM_ARM_VCPU_INIT"),
    (0xaf, On::Any, "KVM_ARM_PREFERRED_TARGET"),
    (0xb0, On::Any, "KVM_GET_REG_LIST"),
    (0xb2, On::Any, "KVM_SET_PMU_EVENT_FILTER"),
    (0xb4, On::Any, "KVM_ARM_MTE_COPY_TAGS"),
    (0xb7, On::Any, "KVM_SMI"),
    (0xba, On::Any, "KVM_MEMORY_ENCRYPT_OP"),
    (0xbd, On::Any, "KVM_HYPERV_EVENTFD"),
    (0xbe, On::Any, "KVM_GET_NESTED_STATE"),
    (0xbf, On::Any, "KVM_SET_NESTED_STATE"),
    (0xc0, On::Any, "KVM_CLEAR_DIRTY_LOG"),
    (0xc1, On::Any, "KVM_GET_SUPPORTED_HV_CPUID"),
    (0xc2, On::Any, "KVM_ARM_VCPU_FINALIZE"),
    (0xc6, On::Any, "KVM_X86_SET_MSR_FILTER"),
    (0xc7, On::Any, "KVM_RESET_DIRTY_RINGS"),
    (0xcc, On::Any, "KVM_GET_SREGS2"),
    (0xcd, On::Any, "KVM_SET_SREGS2"),
    (0xce, On::Any, "KVM_GET_STATS_FD"),
    (0xcf, On::Any, "KVM_GET_XSAVE2"),
    (0xe0, On::Any, "KVM_CREATE_DEVICE"),
    (0xe1, On::Any, "KVM_SET_DEVICE_ATTR"),
    (0xe2, On::Any, "KVM_GET_DEVICE_ATTR"),
    (0xe3, On::Any, "KVM_HAS_DEVICE_ATTR"),
];

/// The ioctl's name; its number where the name is not known.
pub fn ioctl_name(ioctl: &Ioctl) -> String {
    let [number, kind, ..] = ioctl.cmd.to_le_bytes();
    let fits = |on: On| match on {
        On::Any => true,
        On::Vm => ioctl.fd_kind == FdKind::Vm,
        On::Vcpu => ioctl.fd_kind != FdKind::Vm,
        On::Bare => ioctl.cmd >> 16 == 0,
    };
    NAMES
        .iter()
        .find(|(other, on, _)| kind == KVMIO && *other == number && fits(*on))
        .map_or_else(
            || format!("ioctl {:#x}", ioctl.cmd),
            |(.., name)| (*name).to_owned(),
        )
}

/// The name of a device attribute that saves, restores or resets something; `None` for others.
pub fn attr_name(kind: FdKind, attr: DeviceAttr) -> Option<&'static str> {
    Some(match (kind, attr.group, attr.attr) {
        (FdKind::Its, GRP_CTRL, 1) => "ITS_SAVE_TABLES",
        (FdKind::Its, GRP_CTRL, 2) => "ITS_RESTORE_TABLES",
        (FdKind::Its, GRP_CTRL, 4) => "ITS_CTRL_RESET",
        (FdKind::Gic, GRP_CTRL, 3) => "VGIC_SAVE_PENDING_TABLES",
        (FdKind::Its | FdKind::Gic, GRP_CTRL, 0) => "CTRL_INIT",
        (FdKind::Its, 0, _) | (FdKind::Gic, 0, _) => "ADDR",
        (FdKind::Gic, 1, _) => "DIST_REGS",
        (FdKind::Gic, 3, _) => "NR_IRQS",
        (FdKind::Gic, GRP_REDIST_REGS, _) => "REDIST_REGS",
        (FdKind::Gic, 6, _) => "CPU_SYSREGS",
        (FdKind::Gic, 7, _) => "LEVEL_INFO",
        (FdKind::Its, 8, _) => "ITS_REGS",
        _ => return None,
    })
}

/// Whether the ioctl sets a device attribute of `group` on a descriptor of `kind`, or on one whose
/// kind the recorder could not tell.
pub fn sets_attr(ioctl: &Ioctl, kind: FdKind, group: u32) -> Option<u64> {
    let [number, ..] = ioctl.cmd.to_le_bytes();
    let attr = ioctl.attr?;
    let fits = ioctl.fd_kind == kind || ioctl.fd_kind == FdKind::Unknown;
    (number == NR_SET_DEVICE_ATTR && fits && attr.group == group).then_some(attr.attr)
}

/// Whether the ioctl reads general registers of a vCPU, as every monitor does that saves one:
/// `KVM_GET_REGS`, `KVM_GET_ONE_REG`.
pub fn reads_registers(ioctl: &Ioctl) -> bool {
    // On a VM, the second number is another ioctl's.
    is_one_of(ioctl, &[0x81]) || ioctl.fd_kind != FdKind::Vm && is_one_of(ioctl, &[0xab])
}

/// Whether the ioctl writes general registers of a vCPU, as every monitor does that restores one:
/// `KVM_SET_REGS`, `KVM_SET_ONE_REG`.
pub fn writes_registers(ioctl: &Ioctl) -> bool {
    is_one_of(ioctl, &[0x82, 0xac])
}

/// Whether the ioctl asks what the guest has written: `KVM_GET_DIRTY_LOG`, `KVM_CLEAR_DIRTY_LOG`,
/// `KVM_RESET_DIRTY_RINGS`.
pub fn reads_dirty_log(ioctl: &Ioctl) -> bool {
    is_one_of(ioctl, &[0x42, 0xc0, 0xc7])
}

/// By number: these are asked of every ioctl of a recording.
fn is_one_of(ioctl: &Ioctl, numbers: &[u8]) -> bool {
    let [number, kind, ..] = ioctl.cmd.to_le_bytes();
    kind == KVMIO && numbers.contains(&number)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_means_what_its_descriptor_says() {
        let name = |cmd, fd_kind| {
            ioctl_name(&Ioctl {
                cmd,
                fd_kind,
                ..Ioctl::default()
            })
        };
        assert_eq!(name(0x4018_aee1, FdKind::Its), "KVM_SET_DEVICE_ATTR");
        assert_eq!(name(0x4070_ae9f, FdKind::Vm), "KVM_GET_PIT2");
        assert_eq!(name(0x8040_ae9f, FdKind::Vcpu), "KVM_GET_VCPU_EVENTS");
        assert_eq!(name(0x4010_aeab, FdKind::Vcpu), "KVM_GET_ONE_REG");
        assert_eq!(name(0xaea3, FdKind::Vcpu), "KVM_GET_TSC_KHZ");
        assert_eq!(name(0x4068_aea3, FdKind::Vcpu), "KVM_ENABLE_CAP");
        assert_eq!(name(0x5401, FdKind::Unknown), "ioctl 0x5401");
    }

    #[test]
    fn the_same_attribute_differs_by_device() {
        let attr = |attr| DeviceAttr {
            group: GRP_CTRL,
            attr,
        };
        assert_eq!(attr_name(FdKind::Its, attr(1)), Some("ITS_SAVE_TABLES"));
        assert_eq!(
            attr_name(FdKind::Gic, attr(3)),
            Some("VGIC_SAVE_PENDING_TABLES")
        );
        assert_eq!(attr_name(FdKind::Gic, attr(1)), None);
        assert_eq!(attr_name(FdKind::Device, attr(1)), None);
    }
}
