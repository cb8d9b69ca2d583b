//! The part of the GICv3 that is in each vCPU: its CPU interface, a handful of system registers that
//! KVM keeps under the GIC.

use kvm_bindings::KVM_DEV_ARM_VGIC_GRP_CPU_SYSREGS;
use serde::{Deserialize, Serialize};

use crate::kvm::{self, Device};

/// Encodings of the CPU interface's registers.
mod icc {
    use super::super::registers::sysreg;

    pub(super) const PMR: u64 = sysreg(3, 0, 4, 6, 0);
    pub(super) const BPR0: u64 = sysreg(3, 0, 12, 8, 3);
    pub(super) const BPR1: u64 = sysreg(3, 0, 12, 12, 3);
    pub(super) const CTLR: u64 = sysreg(3, 0, 12, 12, 4);
    pub(super) const SRE: u64 = sysreg(3, 0, 12, 12, 5);
    pub(super) const IGRPEN0: u64 = sysreg(3, 0, 12, 12, 6);
    pub(super) const IGRPEN1: u64 = sysreg(3, 0, 12, 12, 7);

    pub(super) const fn ap0r(n: u64) -> u64 {
        sysreg(3, 0, 12, 8, 4 + n)
    }

    pub(super) const fn ap1r(n: u64) -> u64 {
        sysreg(3, 0, 12, 9, n)
    }
}

/// The registers of a vCPU's CPU interface.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Interface {
    sre: u64,
    ctlr: u64,
    igrpen0: u64,
    igrpen1: u64,
    pmr: u64,
    bpr0: u64,
    bpr1: u64,
    /// As many as the priority bits of `ctlr` ask for.
    ap0r: Vec<u64>,
    ap1r: Vec<u64>,
}

impl Interface {
    /// Reads the registers of the vCPU with this `affinity`, the upper half of a device attribute.
    pub(super) fn save(gic: &Device, affinity: u64) -> Result<Self, kvm::Error> {
        let get = |encoding| gic.get(KVM_DEV_ARM_VGIC_GRP_CPU_SYSREGS, affinity | encoding);
        let ctlr = get(icc::CTLR)?;
        let active = 0..active_priorities(ctlr);
        let all = |encoding: fn(u64) -> u64| -> Result<Vec<u64>, kvm::Error> {
            active.clone().map(|n| get(encoding(n))).collect()
        };
        Ok(Interface {
            sre: get(icc::SRE)?,
            ctlr,
            igrpen0: get(icc::IGRPEN0)?,
            igrpen1: get(icc::IGRPEN1)?,
            pmr: get(icc::PMR)?,
            bpr0: get(icc::BPR0)?,
            bpr1: get(icc::BPR1)?,
            ap0r: all(icc::ap0r)?,
            ap1r: all(icc::ap1r)?,
        })
    }

    /// Writes them, but those that hold what is `known` to be there already.
    pub(super) fn load(
        &self,
        gic: &Device,
        affinity: u64,
        known: Option<&Interface>,
    ) -> Result<(), kvm::Error> {
        for (encoding, value) in self.registers() {
            let mut known = known.into_iter().flat_map(Interface::registers);
            if !known.any(|register| register == (encoding, value)) {
                gic.set(KVM_DEV_ARM_VGIC_GRP_CPU_SYSREGS, affinity | encoding, value)?;
            }
        }
        Ok(())
    }

    /// Encodings and values in the order in which they are loaded. `ICC_CTLR` comes early: KVM refuses
    /// there what this host can't do.
    fn registers(&self) -> impl Iterator<Item = (u64, u64)> {
        let active = |encoding: fn(u64) -> u64, values| {
            (0..)
                .zip(values)
                .map(move |(n, &value)| (encoding(n), value))
        };
        let fixed = [
            (icc::SRE, self.sre),
            (icc::CTLR, self.ctlr),
            (icc::IGRPEN0, self.igrpen0),
            (icc::IGRPEN1, self.igrpen1),
            (icc::PMR, self.pmr),
            (icc::BPR0, self.bpr0),
            (icc::BPR1, self.bpr1),
        ];
        let ap0r = active(icc::ap0r, &self.ap0r);
        fixed
            .into_iter()
            .chain(ap0r)
            .chain(active(icc::ap1r, &self.ap1r))
    }

    /// Whether an interface that came from outside has the registers that its own `ICC_CTLR` says.
    pub(super) fn is_complete(&self) -> bool {
        let active = active_priorities(self.ctlr);
        self.ap0r.len() as u64 == active && self.ap1r.len() as u64 == active
    }
}

/// How many `ICC_AP<n>R` registers a CPU interface has, by the priority bits in its `ICC_CTLR`:
/// one for 5 bits, two for 6, four for 7.
fn active_priorities(ctlr: u64) -> u64 {
    match (ctlr >> 8 & 7) + 1 {
        7.. => 4,
        6 => 2,
        _ => 1,
    }
}

#[cfg(test)]
impl Default for Interface {
    fn default() -> Self {
        Interface {
            sre: 7,
            ctlr: 4 << 8,
            igrpen0: 0,
            igrpen1: 0,
            pmr: 0,
            bpr0: 0,
            bpr1: 0,
            ap0r: vec![0],
            ap1r: vec![0],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn more_priority_bits_have_more_active_priority_registers() {
        let registers = |bits: u64| active_priorities((bits - 1) << 8);
        assert_eq!([5, 6, 7].map(registers), [1, 2, 4]);
    }

    #[test]
    fn an_interface_has_what_its_control_register_says() {
        let mut interface = Interface::default();
        assert!(interface.is_complete());
        interface.ap0r.push(0);
        assert!(!interface.is_complete());
        interface.ap1r.push(0);
        assert!(!interface.is_complete());
        interface.ctlr = 5 << 8;
        assert!(interface.is_complete());
    }
}
