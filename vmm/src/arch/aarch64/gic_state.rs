//! The state of the GICv3: distributor, redistributors, line levels. The CPU interfaces are in
//! `cpu_interface.rs`.
//!
//! Each access locks every vCPU, so a register costs a stop more the more vCPUs there are: none is
//! read that KVM keeps nothing behind (`GICD_STATUSR`, `GICR_STATUSR`, `GICR_WAKER`, `IGRPMODR`,
//! `NSACR`, the configuration of SGIs, the upper halves of `GICD_IROUTER`, which are all constant in
//! `arch/arm64/kvm/vgic/vgic-mmio-v3.c` of Linux 6.12), and none twice. A destination, whose guest has
//! never run, knows what its registers hold from the rehearsal of its devices, and writes only those
//! that are to hold something else.

use std::ffi::CStr;
use std::iter;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use kvm_bindings::{
    KVM_DEV_ARM_VGIC_GRP_DIST_REGS, KVM_DEV_ARM_VGIC_GRP_LEVEL_INFO,
    KVM_DEV_ARM_VGIC_GRP_REDIST_REGS, KVM_DEV_ARM_VGIC_LINE_LEVEL_INFO_SHIFT,
    KVM_DEV_ARM_VGIC_V3_MPIDR_SHIFT, VGIC_LEVEL_INFO_LINE_LEVEL,
};
use serde::{Deserialize, Serialize};

use super::cpu_interface::Interface;
use super::layout::IRQS;
use super::registers::MPIDR_EL1;
use crate::devices::{DeviceState, StateError, decode, encode};
use crate::kvm::{self, Device, Vcpu};
use crate::probes::{self, Guarded};

/// Interrupts of a vCPU's own.
const PRIVATE: u32 = 32;
/// `GICR_CTLR.EnableLPIs`.
const ENABLE_LPIS: u32 = 1;
/// Where a redistributor's SGI frame starts.
const SGI: u64 = 0x1_0000;

/// Offsets of distributor registers, and of those in the SGI frame, which have the same
/// (GIC architecture, IHI 0069, chapters 12.9 and 12.11).
mod gicd {
    pub(super) const CTLR: u64 = 0x0;
    pub(super) const IIDR: u64 = 0x8;
    pub(super) const IGROUPR: u64 = 0x80;
    pub(super) const ISENABLER: u64 = 0x100;
    pub(super) const ICENABLER: u64 = 0x180;
    pub(super) const ISPENDR: u64 = 0x200;
    pub(super) const ISACTIVER: u64 = 0x300;
    pub(super) const ICACTIVER: u64 = 0x380;
    pub(super) const IPRIORITYR: u64 = 0x400;
    pub(super) const ICFGR: u64 = 0xc00;
    pub(super) const IROUTER: u64 = 0x6000;
}

/// Offsets in a redistributor's first frame. The 64-bit ones are accessed by halves.
mod gicr {
    pub(super) const CTLR: u64 = 0x0;
    pub(super) const PROPBASER: [u64; 2] = [0x70, 0x74];
    pub(super) const PENDBASER: [u64; 2] = [0x78, 0x7c];
}

/// A vCPU's affinity, as the upper half of a device attribute names it: Aff3 to Aff0, 8 bits each.
pub(super) fn affinity(vcpu: &Vcpu) -> Result<u64, kvm::Error> {
    Ok(pack_affinity(vcpu.register64(MPIDR_EL1)?))
}

fn pack_affinity(mpidr: u64) -> u64 {
    let packed = mpidr & 0x00ff_ffff | (mpidr >> 32 & 0xff) << 24;
    packed << KVM_DEV_ARM_VGIC_V3_MPIDR_SHIFT
}

/// The part of the GIC that migrates.
pub(super) struct GicState {
    device: Arc<Device>,
    affinities: Vec<u64>,
    /// Whether a guest has run, or the registers were changed in another way than by this.
    touched: Arc<AtomicBool>,
    /// What the registers hold, as long as they are not touched: what was saved or loaded last.
    known: Option<State>,
}

#[derive(Debug, Serialize, Deserialize)]
struct State {
    irqs: u32,
    iidr: u32,
    ctlr: u32,
    redistributors: Vec<Redistributor>,
    /// What [`shared`] lists, in its order.
    shared: Vec<u32>,
}

/// What a vCPU has of its own.
#[derive(Debug, Serialize, Deserialize)]
struct Redistributor {
    propbaser: [u32; 2],
    pendbaser: [u32; 2],
    ctlr: u32,
    /// What [`private`] lists, in its order.
    private: Vec<u32>,
    interface: Interface,
}

/// One 32-bit access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Access {
    group: u32,
    attr: u64,
}

impl DeviceState for GicState {
    fn name(&self) -> &CStr {
        c"gic"
    }

    fn version(&self) -> u32 {
        1
    }

    fn save(&mut self) -> Result<Vec<u8>, StateError> {
        let affinities = self.affinities.iter();
        let redistributors = affinities.map(|&affinity| self.save_redistributor(affinity));
        let state = State {
            irqs: IRQS,
            iidr: self.get(distributor(gicd::IIDR))?,
            ctlr: self.get(distributor(gicd::CTLR))?,
            redistributors: redistributors.collect::<Result<_, _>>()?,
            shared: self.get_all(shared())?,
        };
        let encoded = encode(&state);
        self.know(state);
        encoded
    }

    /// RAM and the vCPUs are loaded. First who the distributor is, then the redistributors, whose
    /// LPI tables come before `GICR_CTLR` turns them on, then the interrupts that the vCPUs share
    /// and the CPU interfaces.
    fn load(&mut self, version: u32, state: &[u8]) -> Result<(), StateError> {
        let state: State = decode(self.version(), version, state)?;
        check(&state, self.affinities.len())?;
        let untouched = !self.touched.load(Ordering::Acquire);
        // Whatever fails, nothing is known then.
        let known = self.known.take().filter(|_| untouched);
        let known_redistributors = known.iter().flat_map(|known| &known.redistributors);
        let known_redistributors = known_redistributors.map(Some).chain(iter::repeat(None));
        let redistributors = self.affinities.iter().zip(&state.redistributors);
        let redistributors = redistributors.zip(known_redistributors);

        self.set(distributor(gicd::IIDR), state.iidr)?;
        self.set(distributor(gicd::CTLR), state.ctlr)?;
        for ((&affinity, redistributor), known) in redistributors.clone() {
            self.load_tables(affinity, redistributor, known)?;
        }
        for ((&affinity, redistributor), known) in redistributors.clone() {
            let (private, known) = (&redistributor.private, known.map(|known| &known.private));
            self.load_private(affinity, private, known)?;
        }
        let known_shared = known.as_ref().map(|known| &known.shared);
        self.set_all(shared(), &state.shared, known_shared)?;
        for ((&affinity, redistributor), known) in redistributors {
            let known = known.map(|known| &known.interface);
            redistributor
                .interface
                .load(&self.device, affinity, known)?;
        }
        self.know(state);
        Ok(())
    }
}

impl GicState {
    /// The state of an initialised GIC.
    ///
    /// Whoever changes a register, and whoever lets the guest run, sets `touched`.
    pub(super) fn new(device: Arc<Device>, affinities: Vec<u64>, touched: Arc<AtomicBool>) -> Self {
        GicState {
            device,
            affinities,
            touched,
            known: None,
        }
    }

    /// The registers hold `state`.
    fn know(&mut self, state: State) {
        let untouched = !self.touched.load(Ordering::Acquire);
        self.known = untouched.then_some(state);
    }

    /// Turns everything off. A state is loaded by registers of which some only add to what there is,
    /// and the LPI tables can't be moved while they are in use.
    pub(super) fn clear(&self) -> Result<(), kvm::Error> {
        for &affinity in &self.affinities {
            self.set(in_redistributor(affinity, gicr::CTLR), 0)?;
            for offset in [gicd::ICENABLER, gicd::ICACTIVER] {
                self.set(in_redistributor(affinity, SGI + offset), u32::MAX)?;
            }
        }
        for word in u64::from(PRIVATE / 32)..u64::from(IRQS / 32) {
            for offset in [gicd::ICENABLER, gicd::ICACTIVER] {
                self.set(distributor(offset + 4 * word), u32::MAX)?;
            }
        }
        Ok(())
    }

    fn save_redistributor(&self, affinity: u64) -> Result<Redistributor, kvm::Error> {
        let both = |halves: [u64; 2]| -> Result<[u32; 2], kvm::Error> {
            let [low, high] = halves.map(|offset| self.get(in_redistributor(affinity, offset)));
            Ok([low?, high?])
        };
        Ok(Redistributor {
            propbaser: both(gicr::PROPBASER)?,
            pendbaser: both(gicr::PENDBASER)?,
            ctlr: self.get(in_redistributor(affinity, gicr::CTLR))?,
            private: self.get_all(private(affinity))?,
            interface: Interface::save(&self.device, affinity)?,
        })
    }

    /// Where a redistributor's LPI tables are, then `GICR_CTLR`: with it the redistributor reads
    /// which LPIs are pending. Those that the ITS maps only later are read when it maps them.
    fn load_tables(
        &self,
        affinity: u64,
        state: &Redistributor,
        known: Option<&Redistributor>,
    ) -> Result<(), kvm::Error> {
        if known.is_some_and(|known| known.has_tables_of(state)) {
            return Ok(());
        }
        let at = |offset| in_redistributor(affinity, offset);
        for (offset, half) in gicr::PROPBASER.into_iter().zip(state.propbaser) {
            self.set(at(offset), half)?;
        }
        for (offset, half) in gicr::PENDBASER.into_iter().zip(state.pendbaser) {
            self.set(at(offset), half)?;
        }
        let enable = || self.set(at(gicr::CTLR), state.ctlr);
        if state.ctlr & ENABLE_LPIS == 0 {
            return enable();
        }
        probes::gic_restore_pending_tables().run(|_| enable())
    }

    fn load_private(
        &self,
        affinity: u64,
        values: &[u32],
        known: Option<&Vec<u32>>,
    ) -> Result<(), kvm::Error> {
        let enabler = in_redistributor(affinity, SGI + gicd::ISENABLER);
        let place = private(affinity).position(|access| access == enabler);
        let enabled = place.and_then(|place| values.get(place));
        let known_enabled = place.and_then(|place| known?.get(place));
        if known_enabled.is_none() || enabled != known_enabled {
            // SGIs are on after a reset: only this turns off those that the guest turned off.
            self.set(in_redistributor(affinity, SGI + gicd::ICENABLER), u32::MAX)?;
        }
        self.set_all(private(affinity), values, known)
    }

    fn get(&self, access: Access) -> Result<u32, kvm::Error> {
        self.device.get(access.group, access.attr)
    }

    fn set(&self, access: Access, value: u32) -> Result<(), kvm::Error> {
        self.device.set(access.group, access.attr, value)
    }

    fn get_all(&self, accesses: impl Iterator<Item = Access>) -> Result<Vec<u32>, kvm::Error> {
        accesses.map(|access| self.get(access)).collect()
    }

    /// Sets every register whose value is not known to be there.
    fn set_all(
        &self,
        accesses: impl Iterator<Item = Access>,
        values: &[u32],
        known: Option<&Vec<u32>>,
    ) -> Result<(), kvm::Error> {
        for (place, (access, &value)) in accesses.zip(values).enumerate() {
            if known.and_then(|known| known.get(place)) != Some(&value) {
                self.set(access, value)?;
            }
        }
        Ok(())
    }
}

impl Redistributor {
    /// Whether its LPI tables are where those of `other` are, and off: turning them on reads them.
    fn has_tables_of(&self, other: &Redistributor) -> bool {
        let tables = |r: &Redistributor| (r.propbaser, r.pendbaser, r.ctlr);
        tables(self) == tables(other) && other.ctlr & ENABLE_LPIS == 0
    }
}

fn distributor(offset: u64) -> Access {
    let group = KVM_DEV_ARM_VGIC_GRP_DIST_REGS;
    Access {
        group,
        attr: offset,
    }
}

fn in_redistributor(affinity: u64, offset: u64) -> Access {
    let group = KVM_DEV_ARM_VGIC_GRP_REDIST_REGS;
    Access {
        group,
        attr: affinity | offset,
    }
}

/// The levels of the 32 lines from `first` on.
fn line_levels(affinity: u64, first: u32) -> Access {
    let info = VGIC_LEVEL_INFO_LINE_LEVEL << KVM_DEV_ARM_VGIC_LINE_LEVEL_INFO_SHIFT;
    let group = KVM_DEV_ARM_VGIC_GRP_LEVEL_INFO;
    Access {
        group,
        attr: affinity | u64::from(info | first),
    }
}

/// The interrupts that a vCPU does not share, in the order that loads them: how an interrupt is
/// set up, whether its line is up, whether it is pending or active, its priority.
fn private(affinity: u64) -> impl Iterator<Item = Access> {
    let at = move |offset| in_redistributor(affinity, SGI + offset);
    let words = move |offset: u64, count: u64| (0..count).map(move |n| at(offset + 4 * n));
    words(gicd::IGROUPR, 1)
        .chain(words(gicd::ISENABLER, 1))
        .chain(words(gicd::ICFGR + 4, 1))
        .chain([line_levels(affinity, 0)])
        .chain(words(gicd::ISPENDR, 1))
        .chain(words(gicd::ISACTIVER, 1))
        .chain(words(gicd::IPRIORITYR, 8))
}

/// The same for the interrupts that all vCPUs share, and where each of them goes.
fn shared() -> impl Iterator<Item = Access> {
    // Registers hold a fixed number of bits for each interrupt; those of the private ones, which
    // come first, are the redistributors' business.
    let words = |offset: u64, bits: u64| {
        let first = u64::from(PRIVATE) * bits / 32;
        let end = u64::from(IRQS) * bits / 32;
        (first..end).map(move |n| distributor(offset + 4 * n))
    };
    let routes = (PRIVATE..IRQS).map(|irq| distributor(gicd::IROUTER + 8 * u64::from(irq)));
    let levels = (PRIVATE..IRQS)
        .step_by(32)
        .map(|first| line_levels(0, first));
    words(gicd::IGROUPR, 1)
        .chain(words(gicd::ISENABLER, 1))
        .chain(routes)
        .chain(words(gicd::ICFGR, 2))
        .chain(levels)
        .chain(words(gicd::ISPENDR, 1))
        .chain(words(gicd::ISACTIVER, 1))
        .chain(words(gicd::IPRIORITYR, 8))
}

/// Whether a state that came from outside has what this GIC has.
fn check(state: &State, vcpus: usize) -> Result<(), StateError> {
    let invalid = |text| Err(StateError::Invalid(text));
    let State {
        irqs,
        redistributors,
        ..
    } = state;
    if *irqs != IRQS {
        return invalid(format!("a GIC with {irqs} interrupts, this one has {IRQS}"));
    }
    if redistributors.len() != vcpus {
        let count = redistributors.len();
        return invalid(format!(
            "a GIC with {count} redistributors, this one has {vcpus}"
        ));
    }
    let complete = |redistributor: &Redistributor| {
        redistributor.private.len() == private(0).count() && redistributor.interface.is_complete()
    };
    if state.shared.len() != shared().count() || !redistributors.iter().all(complete) {
        return invalid("a GIC with other registers than this one has".into());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state(vcpus: usize) -> State {
        let redistributor = || Redistributor {
            propbaser: [0; 2],
            pendbaser: [0; 2],
            ctlr: 0,
            private: vec![0; private(0).count()],
            interface: Interface::default(),
        };
        State {
            irqs: IRQS,
            iidr: 0,
            ctlr: 0,
            redistributors: (0..vcpus).map(|_| redistributor()).collect(),
            shared: vec![0; shared().count()],
        }
    }

    #[test]
    fn no_register_is_accessed_twice() {
        let mut all: Vec<_> = shared()
            .chain(private(1 << 32))
            .map(|a| (a.group, a.attr))
            .collect();
        let count = all.len();
        all.sort_unstable();
        all.dedup();
        assert_eq!(all.len(), count);
    }

    #[test]
    fn shared_interrupts_start_behind_the_private_ones() {
        let attrs: Vec<_> = shared().map(|access| access.attr).collect();
        assert!(attrs.contains(&(gicd::IGROUPR + 4)));
        assert!(!attrs.contains(&gicd::IGROUPR));
        assert!(attrs.contains(&(gicd::IPRIORITYR + 32)));
        assert!(!attrs.contains(&(gicd::IPRIORITYR + 28)));
        assert!(attrs.contains(&(gicd::ICFGR + 8)));
        assert!(attrs.contains(&(gicd::IROUTER + 8 * 32)));
    }

    #[test]
    fn a_state_must_fit_this_gic() {
        assert!(check(&state(2), 2).is_ok());
        assert!(check(&state(2), 3).is_err());
        let mut short = state(1);
        short.shared.pop();
        assert!(check(&short, 1).is_err());
        let mut other = state(1);
        other.irqs += 32;
        assert!(check(&other, 1).is_err());
    }

    #[test]
    fn affinities_are_packed_into_four_bytes() {
        assert_eq!(pack_affinity(0x12_8034_5678), 0x1234_5678 << 32);
    }
}
