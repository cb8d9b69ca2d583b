//! What the vCPUs are: the host's CPUID, cut to what this monitor can migrate, with the topology
//! of the machine.

use kvm_bindings::{KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

/// Leaf 1: one package, so the APIC ids of a package's CPUs are 0 to `vcpus` - 1.
const FEATURES: u32 = 1;
const CACHES: u32 = 4;
const TOPOLOGY: u32 = 0xb;
const TOPOLOGY_V2: u32 = 0x1f;
const AMD_FEATURES: u32 = 0x8000_0001;
const AMD_SIZES: u32 = 0x8000_0008;
const AMD_CACHES: u32 = 0x8000_001d;
const AMD_TOPOLOGY: u32 = 0x8000_001e;

const ECX_VMX: u32 = 1 << 5;
/// Without it guests do not look for KVM's own leaves, kvmclock among them.
const ECX_HYPERVISOR: u32 = 1 << 31;
const EDX_HTT: u32 = 1 << 28;
const AMD_ECX_SVM: u32 = 1 << 2;

/// A register of a leaf.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Register {
    Eax,
    Ebx,
    Ecx,
    Edx,
}

/// Where a leaf's bits are features: one that the guest has seen must be there wherever it runs.
/// (leaf, subleaf, register, bits that say something else)
const FEATURE_BITS: &[(u32, u32, Register, u32)] = &[
    // OSXSAVE mirrors CR4; hosts do not say that they are hypervisors.
    (FEATURES, 0, Register::Ecx, 1 << 27 | ECX_HYPERVISOR),
    (FEATURES, 0, Register::Edx, EDX_HTT),
    (7, 0, Register::Ebx, 0),
    // OSPKE mirrors CR4.
    (7, 0, Register::Ecx, 1 << 4),
    (7, 0, Register::Edx, 0),
    (7, 1, Register::Eax, 0),
    (7, 1, Register::Edx, 0),
    (7, 2, Register::Edx, 0),
    (0xd, 0, Register::Eax, 0),
    (0xd, 0, Register::Edx, 0),
    (0xd, 1, Register::Eax, 0),
    (0xd, 1, Register::Ecx, 0),
    (0x4000_0001, 0, Register::Eax, 0),
    (AMD_FEATURES, 0, Register::Ecx, 0),
    (AMD_FEATURES, 0, Register::Edx, 0),
    (0x8000_0007, 0, Register::Edx, 0),
    (AMD_SIZES, 0, Register::Ebx, 0),
];

/// The CPUID of the vCPU `index` of `vcpus`, on a host that supports `supported`.
///
/// Nested virtualization is left out: its state does not migrate, so no guest may have any.
pub(super) fn for_vcpu(
    supported: &[kvm_cpuid_entry2],
    index: u32,
    vcpus: u32,
) -> Vec<kvm_cpuid_entry2> {
    let mut entries: Vec<_> = supported
        .iter()
        .filter(|entry| !matches!(entry.function, TOPOLOGY | TOPOLOGY_V2))
        .copied()
        .collect();
    // APIC ids are as wide as the largest needs; caches and packages are sized in such powers.
    let ids = vcpus.next_power_of_two();
    for entry in &mut entries {
        match entry.function {
            FEATURES => {
                entry.ebx = entry.ebx & 0xffff | (vcpus & 0xff) << 16 | index << 24;
                entry.ecx = entry.ecx & !ECX_VMX | ECX_HYPERVISOR;
                entry.edx &= !EDX_HTT;
                entry.edx |= if vcpus > 1 { EDX_HTT } else { 0 };
            }
            CACHES if entry.eax & 0x1f != 0 => {
                let sharing = if cache_level(entry) == 3 { ids - 1 } else { 0 };
                entry.eax = entry.eax & 0x3fff | sharing << 14 | (ids - 1) << 26;
            }
            AMD_CACHES if entry.eax & 0x1f != 0 => {
                let sharing = if cache_level(entry) == 3 { ids - 1 } else { 0 };
                entry.eax = entry.eax & 0x3fff | sharing << 14;
            }
            AMD_FEATURES => entry.ecx &= !AMD_ECX_SVM,
            AMD_SIZES => {
                entry.ecx = entry.ecx & !0xf0ff | (vcpus - 1) & 0xff | ids.trailing_zeros() << 12;
            }
            AMD_TOPOLOGY => (entry.eax, entry.ebx, entry.ecx) = (index, index, 0),
            _ => {}
        }
    }
    if supported.iter().any(|entry| entry.function == TOPOLOGY) {
        // Intel SDM volume 2, CPUID leaf 0xb: one thread a core, all cores in one package.
        let levels = [(0, 1, 1), (ids.trailing_zeros(), vcpus, 2), (0, 0, 0)];
        entries.extend(
            (0..)
                .zip(levels)
                .map(|(level, (shift, count, kind))| kvm_cpuid_entry2 {
                    function: TOPOLOGY,
                    index: level,
                    flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
                    eax: shift,
                    ebx: count,
                    ecx: kind << 8 | level,
                    edx: index,
                    ..Default::default()
                }),
        );
    }
    entries
}

fn cache_level(entry: &kvm_cpuid_entry2) -> u32 {
    entry.eax >> 5 & 7
}

/// A feature that a guest has seen and the host lacks.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "the guest's CPU has features that this host lacks: CPUID leaf {leaf:#x}.{subleaf} {register:?} bits {missing:#x}"
)]
pub(super) struct Missing {
    leaf: u32,
    subleaf: u32,
    register: Register,
    missing: u32,
}

/// Whether a guest that has seen the CPUID `guest` can go on where `supported` is all there is.
pub(super) fn check(
    guest: &[kvm_cpuid_entry2],
    supported: &[kvm_cpuid_entry2],
) -> Result<(), Missing> {
    for &(leaf, subleaf, register, ignored) in FEATURE_BITS {
        let here = bits(supported, leaf, subleaf, register);
        let missing = bits(guest, leaf, subleaf, register) & !here & !ignored;
        if missing != 0 {
            return Err(Missing {
                leaf,
                subleaf,
                register,
                missing,
            });
        }
    }
    Ok(())
}

/// The register's value; 0 where there is no such leaf.
fn bits(entries: &[kvm_cpuid_entry2], leaf: u32, subleaf: u32, register: Register) -> u32 {
    let entry = entries
        .iter()
        .find(|entry| (entry.function, entry.index) == (leaf, subleaf));
    entry.map_or(0, |entry| match register {
        Register::Eax => entry.eax,
        Register::Ebx => entry.ebx,
        Register::Ecx => entry.ecx,
        Register::Edx => entry.edx,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(function: u32, index: u32, [eax, ebx, ecx, edx]: [u32; 4]) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 {
            function,
            index,
            eax,
            ebx,
            ecx,
            edx,
            ..Default::default()
        }
    }

    fn host() -> Vec<kvm_cpuid_entry2> {
        vec![
            entry(0, 0, [0x1f, 0, 0, 0]),
            entry(
                FEATURES,
                0,
                [0xa0671, 0x1020800, 0x8120_2000 | ECX_VMX, 0xf8b_fbff],
            ),
            entry(CACHES, 0, [0x0400_0121, 0, 0, 0]),
            entry(CACHES, 3, [0x0400_4163, 0, 0, 0]),
            entry(CACHES, 4, [0, 0, 0, 0]),
            entry(7, 0, [2, 0x0180_2852, 0, 0]),
            entry(TOPOLOGY, 0, [5, 64, 0x100, 7]),
            entry(TOPOLOGY_V2, 0, [5, 64, 0x100, 7]),
            entry(AMD_FEATURES, 0, [0, 0, 0x101 | AMD_ECX_SVM, 0x2010_0800]),
            entry(AMD_SIZES, 0, [0x3930, 0, 0x7007, 0]),
        ]
    }

    #[test]
    fn a_vcpu_sees_its_own_apic_id_in_one_package_of_single_thread_cores() {
        let cpuid = for_vcpu(&host(), 2, 3);
        assert_eq!(bits(&cpuid, FEATURES, 0, Register::Ebx), 0x0203_0800);
        assert_ne!(bits(&cpuid, FEATURES, 0, Register::Edx) & EDX_HTT, 0);
        assert_eq!(bits(&cpuid, CACHES, 0, Register::Eax), 0x0c00_0121);
        assert_eq!(bits(&cpuid, CACHES, 3, Register::Eax), 0x0c00_c163);
        assert_eq!(bits(&cpuid, CACHES, 4, Register::Eax), 0);
        assert_eq!(bits(&cpuid, AMD_SIZES, 0, Register::Ecx), 0x2002);
        assert!(cpuid.iter().all(|entry| entry.function != TOPOLOGY_V2));
        let levels: Vec<_> = cpuid
            .iter()
            .filter(|entry| entry.function == TOPOLOGY)
            .map(|entry| (entry.index, entry.eax, entry.ebx, entry.ecx, entry.edx))
            .collect();
        assert_eq!(
            levels,
            [(0, 0, 1, 0x100, 2), (1, 2, 3, 0x201, 2), (2, 0, 0, 2, 2)]
        );
    }

    #[test]
    fn no_guest_has_nested_virtualization() {
        let cpuid = for_vcpu(&host(), 0, 1);
        assert_eq!(bits(&cpuid, FEATURES, 0, Register::Ecx) & ECX_VMX, 0);
        assert_eq!(
            bits(&cpuid, AMD_FEATURES, 0, Register::Ecx) & AMD_ECX_SVM,
            0
        );
        assert_eq!(bits(&cpuid, FEATURES, 0, Register::Edx) & EDX_HTT, 0);
    }

    #[test]
    fn a_guest_goes_where_its_features_are() {
        let guest = for_vcpu(&host(), 1, 4);
        assert_eq!(check(&guest, &host()), Ok(()));
        let mut poorer = host();
        poorer[5].ebx &= !(1 << 11);
        let missing = Missing {
            leaf: 7,
            subleaf: 0,
            register: Register::Ebx,
            missing: 1 << 11,
        };
        assert_eq!(check(&guest, &poorer), Err(missing));
        assert_eq!(check(&for_vcpu(&poorer, 1, 4), &host()), Ok(()));
        assert!(check(&guest, &[]).is_err());
    }
}
