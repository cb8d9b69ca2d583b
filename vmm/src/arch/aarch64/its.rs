//! `[7]` The ITS: on every stop, whatever it is for, it writes its tables to guest RAM.
//!
//! The tables lie in guest RAM, so a migration moves them with the last dirty pages; what is left
//! to move are the few registers that say where they are.

use std::ffi::CStr;
use std::sync::{Arc, Mutex, PoisonError};

use kvm_bindings::{
    KVM_DEV_ARM_ITS_CTRL_RESET, KVM_DEV_ARM_ITS_RESTORE_TABLES, KVM_DEV_ARM_ITS_SAVE_TABLES,
    KVM_DEV_ARM_VGIC_CTRL_INIT, KVM_DEV_ARM_VGIC_GRP_ADDR, KVM_DEV_ARM_VGIC_GRP_CTRL,
    KVM_DEV_ARM_VGIC_GRP_ITS_REGS, KVM_VGIC_ITS_ADDR_TYPE,
    kvm_device_type_KVM_DEV_TYPE_ARM_VGIC_ITS,
};
use serde::{Deserialize, Serialize};

use super::layout::ITS;
use crate::devices::{DeviceState, StateError, decode, encode};
use crate::kvm::{self, Device, Vm};
use crate::probes::{self, Guarded};
use crate::runstate::notify::CallbackError;
use crate::runstate::{RunState, StateHandler};

/// The only ITS's number in probes.
const INDEX: u64 = 0;

/// `GITS_BASER<n>.Type` of the device table.
const DEVICES: u64 = 1;
/// `GITS_BASER<n>.Valid`: the table is there.
const BASER_VALID: u64 = 1 << 63;

/// Offsets of the registers (GIC architecture, IHI 0069, chapter 12.18).
mod gits {
    pub(super) const CTLR: u64 = 0x0;
    pub(super) const IIDR: u64 = 0x4;
    pub(super) const CBASER: u64 = 0x80;
    pub(super) const CWRITER: u64 = 0x88;
    pub(super) const CREADR: u64 = 0x90;
    pub(super) const BASER: u64 = 0x100;
}

/// The interrupt translation service.
pub(super) struct Its {
    device: Arc<Device>,
    basers: Vec<u64>,
    /// Shared with the part that migrates, which knows it from the last time.
    device_table: Arc<Mutex<Option<u64>>>,
}

impl Its {
    /// Creates the ITS and places its registers.
    pub(super) fn create(vm: &Vm) -> Result<Self, kvm::Error> {
        let device = vm.create_device(kvm_device_type_KVM_DEV_TYPE_ARM_VGIC_ITS, "ITS")?;
        let kind = u64::from(KVM_VGIC_ITS_ADDR_TYPE);
        device.set(KVM_DEV_ARM_VGIC_GRP_ADDR, kind, ITS)?;
        Ok(Its {
            device: Arc::new(device),
            basers: Vec::new(),
            device_table: Arc::default(),
        })
    }

    /// Initialises it, once the GIC is.
    pub(super) fn init(&mut self) -> Result<(), kvm::Error> {
        let init = u64::from(KVM_DEV_ARM_VGIC_CTRL_INIT);
        self.device.set(KVM_DEV_ARM_VGIC_GRP_CTRL, init, 0u64)?;
        for offset in (gits::BASER..).step_by(8).take(8) {
            let baser: u64 = self.device.get(KVM_DEV_ARM_VGIC_GRP_ITS_REGS, offset)?;
            if baser_type(baser) != 0 {
                self.basers.push(offset);
            }
        }
        Ok(())
    }

    /// `KVM_DEV_ARM_ITS_CTRL_RESET`: forgets what is mapped, and turns the ITS off.
    pub(super) fn reset(&self) -> Result<(), kvm::Error> {
        let reset = u64::from(KVM_DEV_ARM_ITS_CTRL_RESET);
        self.device.set(KVM_DEV_ARM_VGIC_GRP_CTRL, reset, 0u64)
    }

    /// `KVM_DEV_ARM_ITS_SAVE_TABLES`, without spans.
    pub(super) fn save_tables(&self) -> Result<(), kvm::Error> {
        let save = u64::from(KVM_DEV_ARM_ITS_SAVE_TABLES);
        self.device.set(KVM_DEV_ARM_VGIC_GRP_CTRL, save, 0u64)
    }

    /// The part that the stop path calls.
    pub(super) fn handler(&self) -> Handler {
        Handler {
            device: Arc::clone(&self.device),
        }
    }

    /// The part that migrates.
    pub(super) fn state(&self) -> ItsState {
        ItsState {
            device: Arc::clone(&self.device),
            basers: self.basers.clone(),
            device_table: Arc::clone(&self.device_table),
        }
    }

    /// The `GITS_BASER<n>` of the device table, when the state was saved or loaded last.
    pub(super) fn device_table(&self) -> Option<u64> {
        *self
            .device_table
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

/// `GITS_BASER<n>.Type`, which is fixed: 0 for a register that the ITS does not have.
fn baser_type(baser: u64) -> u64 {
    baser >> 56 & 7
}

/// Saves the tables when the VM stops: QEMU's `vm_change_state_handler` of the ITS.
pub(super) struct Handler {
    device: Arc<Device>,
}

impl StateHandler for Handler {
    fn name(&self) -> &'static CStr {
        c"its"
    }

    /// Above the GIC: on a stop this comes first.
    fn priority(&self) -> i32 {
        30
    }

    fn prepare(&mut self, _: bool, _: RunState) -> Result<(), CallbackError> {
        Ok(())
    }

    /// On a stop, `KVM_DEV_ARM_ITS_SAVE_TABLES`. On a start there is nothing to do: the ITS still
    /// has what it saved, and a destination has loaded it as a device's state.
    ///
    /// A guest decides whether this can succeed, since it says where the tables are: `EINVAL` and
    /// `EFAULT` are its doing. Unlike in QEMU the error ends the migration.
    fn change(&mut self, running: bool, _: RunState) -> Result<(), CallbackError> {
        if running {
            return Ok(());
        }
        let save = u64::from(KVM_DEV_ARM_ITS_SAVE_TABLES);
        probes::its_save_tables(INDEX)
            .run(|_| self.device.command(KVM_DEV_ARM_VGIC_GRP_CTRL, save))?;
        Ok(())
    }
}

/// The registers, and the order that loads them.
pub(super) struct ItsState {
    device: Arc<Device>,
    /// Offsets of the `GITS_BASER<n>` that this ITS has.
    basers: Vec<u64>,
    device_table: Arc<Mutex<Option<u64>>>,
}

#[derive(Debug, Serialize, Deserialize)]
struct State {
    iidr: u64,
    cbaser: u64,
    creadr: u64,
    cwriter: u64,
    /// Those that the ITS has, in order.
    basers: Vec<u64>,
    ctlr: u64,
}

impl ItsState {
    fn get(&self, offset: u64) -> Result<u64, kvm::Error> {
        self.device.get(KVM_DEV_ARM_VGIC_GRP_ITS_REGS, offset)
    }

    fn set(&self, offset: u64, value: u64) -> Result<(), kvm::Error> {
        self.device
            .set(KVM_DEV_ARM_VGIC_GRP_ITS_REGS, offset, value)
    }

    fn note_device_table(&self, basers: &[u64]) {
        let table = basers.iter().find(|&&baser| baser_type(baser) == DEVICES);
        let mut noted = self
            .device_table
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        *noted = table.copied();
    }
}

impl DeviceState for ItsState {
    fn name(&self) -> &CStr {
        c"its"
    }

    fn version(&self) -> u32 {
        1
    }

    fn save(&mut self) -> Result<Vec<u8>, StateError> {
        let basers = self.basers.iter().map(|&offset| self.get(offset));
        let basers = basers.collect::<Result<Vec<_>, _>>()?;
        self.note_device_table(&basers);
        encode(&State {
            basers,
            ctlr: self.get(gits::CTLR)?,
            cbaser: self.get(gits::CBASER)?,
            creadr: self.get(gits::CREADR)?,
            cwriter: self.get(gits::CWRITER)?,
            iidr: self.get(gits::IIDR)?,
        })
    }

    /// RAM and the GIC are loaded. `GITS_IIDR` first: it says which layout the tables have.
    /// `GITS_CBASER` before `GITS_CREADR`, which it zeroes. `GITS_CTLR` last: it turns the ITS on.
    ///
    /// KVM checks the tables as it reads them; what a hostile peer put there ends in an error.
    fn load(&mut self, version: u32, state: &[u8]) -> Result<(), StateError> {
        let state: State = decode(self.version(), version, state)?;
        check(&state, &self.basers)?;
        self.set(gits::IIDR, state.iidr)?;
        self.set(gits::CBASER, state.cbaser)?;
        self.set(gits::CREADR, state.creadr)?;
        self.set(gits::CWRITER, state.cwriter)?;
        for (&offset, &baser) in self.basers.iter().zip(&state.basers) {
            self.set(offset, baser)?;
        }
        self.note_device_table(&state.basers);
        // A guest that has no driver for its ITS has no tables.
        if state.basers.iter().any(|baser| baser & BASER_VALID != 0) {
            let restore = u64::from(KVM_DEV_ARM_ITS_RESTORE_TABLES);
            probes::its_restore_tables(INDEX)
                .run(|_| self.device.command(KVM_DEV_ARM_VGIC_GRP_CTRL, restore))?;
        }
        Ok(self.set(gits::CTLR, state.ctlr)?)
    }
}

fn check(state: &State, basers: &[u64]) -> Result<(), StateError> {
    let (found, own) = (state.basers.len(), basers.len());
    if found != own {
        let text = format!("{found} table registers, the ITS of this host has {own}");
        return Err(StateError::Invalid(text));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state(basers: usize) -> State {
        State {
            iidr: 0,
            cbaser: 0,
            creadr: 0,
            cwriter: 0,
            basers: vec![0; basers],
            ctlr: 0,
        }
    }

    #[test]
    fn a_state_has_the_table_registers_of_this_its() {
        assert!(check(&state(2), &[gits::BASER, gits::BASER + 8]).is_ok());
        let error = check(&state(3), &[gits::BASER]).unwrap_err();
        let text = "3 table registers, the ITS of this host has 1";
        assert_eq!(error.to_string(), text);
    }

    #[test]
    fn a_table_register_without_a_type_is_not_there() {
        assert_eq!(baser_type(0), 0);
        assert_eq!(baser_type(0x8107_0000_8000_0701), 1);
    }
}
