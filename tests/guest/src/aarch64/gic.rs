//! GICv3: distributor, redistributors and CPU interfaces, set up for LPIs.

use core::sync::atomic::{AtomicBool, AtomicU8, Ordering};

use blackout_abi::guest::{BootPage, MAX_VCPUS};

use super::registers::{Deadline, Registers, icc, mask, read, unmask};
use crate::Failure;
use crate::arena::Arena;
use crate::shared::Shared;

/// The first LPI.
pub(crate) const FIRST_LPI: u32 = 8192;
/// INTIDs of 16 bits: as many as KVM offers.
const ID_BITS: u32 = 16;
/// LPIs that there are.
pub(crate) const LPIS: u32 = (1 << ID_BITS) - FIRST_LPI;
/// Bytes from one redistributor to the next: its control and its SGI frame.
const REDISTRIBUTOR: u64 = 0x2_0000;
/// Priority 0xa0, enabled: an entry of the LPI configuration table.
const LPI_CONFIG: u8 = 0xa1;

mod gicd {
    pub(crate) const CTLR: u64 = 0x0;
    /// Affinity routing and group 1 on.
    pub(crate) const ENABLE: u32 = 1 << 4 | 1 << 1;
}

mod gicr {
    pub(crate) const CTLR: u64 = 0x0;
    pub(crate) const ENABLE_LPIS: u32 = 1;
    pub(crate) const TYPER: u64 = 0x8;
    pub(crate) const PROPBASER: u64 = 0x70;
    pub(crate) const PENDBASER: u64 = 0x78;
    /// Inner-shareable, write-back: for both tables.
    pub(crate) const CACHED: u64 = 1 << 10 | 7 << 7;
}

/// How often each LPI was taken since [`Gic::forget`]; more than 255 times is no different.
static TAKEN: [AtomicU8; LPIS as usize] = [const { AtomicU8::new(0) }; LPIS as usize];
/// The vCPU that took each LPI last.
static TAKEN_BY: [AtomicU8; LPIS as usize] = [const { AtomicU8::new(0) }; LPIS as usize];
/// Whether the vCPUs are to keep interrupts masked.
static MASK: AtomicBool = AtomicBool::new(true);
/// Whether each vCPU does.
static MASKED: [AtomicBool; MAX_VCPUS] = [const { AtomicBool::new(true) }; MAX_VCPUS];

/// The interrupt controller, without its ITS.
pub(crate) struct Gic {
    redistributors: Registers,
    config: u64,
    pending: [u64; MAX_VCPUS],
}

impl Gic {
    /// Turns the distributor on and gives out the LPI tables.
    pub(crate) fn new(boot: &BootPage, vcpus: usize, arena: &mut Arena) -> Result<Self, Failure> {
        if boot.gicd == 0 || boot.gicr == 0 {
            return Err(Failure::Controller);
        }
        Registers(boot.gicd).write(gicd::CTLR, gicd::ENABLE);
        let config = arena.take(u64::from(LPIS), 0x1_0000)?;
        // SAFETY: the arena just gave this range out.
        unsafe { core::ptr::write_bytes(config as *mut u8, LPI_CONFIG, LPIS as usize) };
        let mut pending = [0; MAX_VCPUS];
        for table in pending.iter_mut().take(vcpus) {
            *table = arena.take((1 << ID_BITS) / 8, 0x1_0000)?;
        }
        Ok(Gic {
            redistributors: Registers(boot.gicr),
            config,
            pending,
        })
    }

    /// Gives a vCPU's redistributor its LPI tables and turns its LPIs on.
    pub(crate) fn enable_lpis(&self, vcpu: usize) {
        let redistributor = self.redistributor(vcpu);
        let id_bits = u64::from(ID_BITS - 1);
        redistributor.write64(gicr::PROPBASER, self.config | gicr::CACHED | id_bits);
        redistributor.write64(gicr::PENDBASER, self.pending[vcpu] | gicr::CACHED);
        redistributor.write(gicr::CTLR, gicr::ENABLE_LPIS);
    }

    /// A vCPU's `MPIDR_EL1` affinity, as PSCI takes it.
    pub(crate) fn affinity(&self, vcpu: usize) -> u64 {
        let affinity = self.redistributor(vcpu).read64(gicr::TYPER) >> 32;
        affinity & 0x00ff_ffff | (affinity >> 24) << 32
    }

    /// A vCPU's number, as an ITS with `GITS_TYPER.PTA` = 0 takes it.
    pub(crate) fn processor_number(&self, vcpu: usize) -> u64 {
        self.redistributor(vcpu).read64(gicr::TYPER) >> 8 & 0xffff
    }

    fn redistributor(&self, vcpu: usize) -> Registers {
        Registers(self.redistributors.0 + vcpu as u64 * REDISTRIBUTOR)
    }

    /// Lets the vCPUs take interrupts, or keeps interrupts from them, and waits until `vcpu` does.
    pub(crate) fn set_mask(masked: bool, vcpu: usize) {
        MASK.store(masked, Ordering::Release);
        let deadline = Deadline::seconds(10);
        follow_mask(0);
        while MASKED[vcpu].load(Ordering::Acquire) != masked && !deadline.passed() {
            core::hint::spin_loop();
        }
    }

    /// Forgets that an LPI was ever taken.
    pub(crate) fn forget(lpi: u32) {
        TAKEN[(lpi - FIRST_LPI) as usize].store(0, Ordering::Relaxed);
    }

    /// Waits until an LPI was taken since it was forgotten: how often it was, 0 when it does not
    /// come, and by which vCPU.
    pub(crate) fn wait_for(lpi: u32) -> (u8, usize) {
        let index = (lpi - FIRST_LPI) as usize;
        let deadline = Deadline::seconds(10);
        loop {
            match TAKEN[index].load(Ordering::Acquire) {
                0 if !deadline.passed() => {}
                count => return (count, TAKEN_BY[index].load(Ordering::Relaxed).into()),
            }
        }
    }
}

/// Turns this vCPU's CPU interface on, once, and masks or unmasks its interrupts as all shall.
/// Each vCPU calls it in each turn of its loop.
pub(crate) fn follow_mask(vcpu: usize) {
    let masked = MASK.load(Ordering::Relaxed);
    if MASKED[vcpu].load(Ordering::Relaxed) == masked {
        return;
    }
    if masked {
        mask();
    } else {
        icc::enable();
        unmask();
    }
    MASKED[vcpu].store(masked, Ordering::Release);
}

/// Takes every interrupt that waits; the vectors lead here.
pub(crate) extern "C" fn interrupt() {
    let vcpu = read!("tpidr_el1") as u8;
    loop {
        let intid = icc::acknowledge();
        if (1020..FIRST_LPI).contains(&intid) {
            return;
        }
        let index = intid.checked_sub(FIRST_LPI).map(|index| index as usize);
        if let Some(index) = index.filter(|&index| index < TAKEN.len()) {
            TAKEN_BY[index].store(vcpu, Ordering::Relaxed);
            TAKEN[index].fetch_add(1, Ordering::AcqRel);
            Shared::get().count_lpi();
        }
        icc::end(intid);
    }
}
