//! `[7b]` The GICv3: on every stop the redistributors write which LPIs are pending to guest RAM.
//!
//! The seven layers of the seed stop at the ITS, but an ITS save is not whole without this: the
//! tables say where an event goes, and the pending tables which LPIs wait to be taken.

use std::ffi::CStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use kvm_bindings::{
    KVM_DEV_ARM_VGIC_CTRL_INIT, KVM_DEV_ARM_VGIC_GRP_ADDR, KVM_DEV_ARM_VGIC_GRP_CTRL,
    KVM_DEV_ARM_VGIC_GRP_NR_IRQS, KVM_DEV_ARM_VGIC_SAVE_PENDING_TABLES, KVM_VGIC_V3_ADDR_TYPE_DIST,
    KVM_VGIC_V3_ADDR_TYPE_REDIST, kvm_device_type_KVM_DEV_TYPE_ARM_VGIC_V3,
};

use super::gic_state::GicState;
use super::layout::{GICD, GICR, IRQS};
use crate::kvm::{self, Device, Vm};
use crate::probes::{self, Guarded};
use crate::runstate::notify::CallbackError;
use crate::runstate::{RunState, StateHandler};

/// The interrupt controller, without its ITS.
pub(super) struct Gic {
    device: Arc<Device>,
    /// Each vCPU's, as the upper half of a device attribute.
    affinities: Vec<u64>,
    /// See [`GicState::new`].
    touched: Arc<AtomicBool>,
}

impl Gic {
    /// Creates the controller and places its registers.
    pub(super) fn create(vm: &Vm) -> Result<Self, kvm::Error> {
        let device = vm.create_device(kvm_device_type_KVM_DEV_TYPE_ARM_VGIC_V3, "GICv3")?;
        device.set(KVM_DEV_ARM_VGIC_GRP_NR_IRQS, 0, IRQS)?;
        for (kind, address) in [
            (KVM_VGIC_V3_ADDR_TYPE_DIST, GICD),
            (KVM_VGIC_V3_ADDR_TYPE_REDIST, GICR),
        ] {
            device.set(KVM_DEV_ARM_VGIC_GRP_ADDR, u64::from(kind), address)?;
        }
        Ok(Gic {
            device: Arc::new(device),
            affinities: Vec::new(),
            touched: Arc::default(),
        })
    }

    /// Initialises it, once all vCPUs are there.
    pub(super) fn init(&mut self, affinities: Vec<u64>) -> Result<(), kvm::Error> {
        self.affinities = affinities;
        let init = u64::from(KVM_DEV_ARM_VGIC_CTRL_INIT);
        self.device.set(KVM_DEV_ARM_VGIC_GRP_CTRL, init, 0u64)
    }

    /// `KVM_DEV_ARM_VGIC_SAVE_PENDING_TABLES`, without spans.
    pub(super) fn save_pending_tables(&self) -> Result<(), kvm::Error> {
        let save = u64::from(KVM_DEV_ARM_VGIC_SAVE_PENDING_TABLES);
        self.device.set(KVM_DEV_ARM_VGIC_GRP_CTRL, save, 0u64)
    }

    /// Makes room for a state: see [`GicState::clear`].
    pub(super) fn reset(&self) -> Result<(), kvm::Error> {
        self.touched.store(true, Ordering::Release);
        self.state().clear()
    }

    /// The part that the stop path calls.
    pub(super) fn handler(&self) -> Handler {
        Handler {
            device: Arc::clone(&self.device),
            touched: Arc::clone(&self.touched),
        }
    }

    /// The part that migrates.
    pub(super) fn state(&self) -> GicState {
        let touched = Arc::clone(&self.touched);
        GicState::new(Arc::clone(&self.device), self.affinities.clone(), touched)
    }
}

/// Saves the pending tables when the VM stops.
pub(super) struct Handler {
    device: Arc<Device>,
    touched: Arc<AtomicBool>,
}

impl StateHandler for Handler {
    fn name(&self) -> &'static CStr {
        c"gicv3"
    }

    /// Below the ITS: on a stop its tables come first.
    fn priority(&self) -> i32 {
        20
    }

    fn prepare(&mut self, _: bool, _: RunState) -> Result<(), CallbackError> {
        Ok(())
    }

    /// On a stop, `KVM_DEV_ARM_VGIC_SAVE_PENDING_TABLES`. On a start there is nothing to do: the
    /// controller kept what it wrote out, and a destination has loaded it as a device's state.
    fn change(&mut self, running: bool, _: RunState) -> Result<(), CallbackError> {
        if running {
            self.touched.store(true, Ordering::Release);
            return Ok(());
        }
        let save = u64::from(KVM_DEV_ARM_VGIC_SAVE_PENDING_TABLES);
        probes::gic_save_pending_tables()
            .run(|_| self.device.command(KVM_DEV_ARM_VGIC_GRP_CTRL, save))?;
        Ok(())
    }
}
