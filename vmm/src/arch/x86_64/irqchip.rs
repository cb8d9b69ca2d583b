//! What KVM emulates outside the vCPUs: two PICs and the I/O APIC, whose state is here; the PIT and
//! kvmclock, which have files of their own.

use std::ffi::CStr;
use std::sync::{Arc, Mutex};

use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_irqchip,
};
use serde::{Deserialize, Serialize};

use super::clock::Clock;
use super::pit::Pit;
use super::{Error, layout};
use crate::arch::{GuestClock, Mapped};
use crate::devices::{DeviceState, StateError, decode, encode};
use crate::kvm::{Vcpu, Vm};
use crate::memory::GuestRam;
use crate::runstate::StateHandler;

/// The interrupt controllers, the PIT and the kvmclock of one VM.
#[derive(Debug)]
pub struct Irqchip {
    vm: Arc<Vm>,
    clock: Clock,
    pit: Pit,
}

impl Irqchip {
    /// Creates them, before the vCPUs: a vCPU gets its local APIC when it is created.
    pub fn create(vm: &Arc<Vm>, _vcpus: u32, guest_clock: GuestClock) -> Result<Self, Error> {
        vm.create_irqchip(layout::KVM_TSS, layout::KVM_IDENTITY_MAP)?;
        Ok(Irqchip {
            clock: Clock::new(Arc::clone(vm), guest_clock),
            pit: Pit::new(Arc::clone(vm)),
            vm: Arc::clone(vm),
        })
    }

    /// Nothing is left to do once the vCPUs exist.
    pub fn init(&mut self, _vcpus: &[Arc<Mutex<Vcpu>>]) -> Result<(), Error> {
        Ok(())
    }

    /// Nothing is left of what a guest did once a state was loaded.
    pub fn reset(&self) -> Result<(), Error> {
        Ok(())
    }

    /// What must be told when the VM starts and stops; `vcpus` are all that it has.
    pub fn handlers(&self, vcpus: &[Arc<Mutex<Vcpu>>]) -> Vec<Box<dyn StateHandler>> {
        vec![
            Box::new(self.clock.handler(vcpus)),
            Box::new(self.pit.clone()),
        ]
    }

    /// Makes the ioctl that the handler called `handler` makes on a stop, alone: without a span,
    /// so that a benchmark can tell what the handler adds. The VM must be stopped. `false` when
    /// there is no such handler.
    pub fn bare_stop(&self, handler: &CStr) -> Result<bool, Error> {
        match handler.to_bytes() {
            b"kvmclock" => self.vm.clock().map(drop)?,
            b"pit" => self.vm.pit().map(drop)?,
            _ => return Ok(false),
        }
        Ok(true)
    }

    /// There is no ITS on this board.
    pub fn mapped(&self, _ram: &GuestRam) -> Option<Mapped> {
        None
    }

    /// What migrates, in the order in which it is loaded: after the vCPUs, because the I/O APIC
    /// raises again what is pending and needs the local APICs to take it.
    pub fn devices(&self) -> Vec<Box<dyn DeviceState>> {
        let chips = Chips(Arc::clone(&self.vm));
        vec![
            Box::new(chips),
            Box::new(self.pit.clone()),
            Box::new(self.clock.clone()),
        ]
    }
}

const STATE_VERSION: u32 = 1;

/// The PICs and the I/O APIC.
struct Chips(Arc<Vm>);

const CHIPS: [u32; 3] = [
    KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE,
    KVM_IRQCHIP_IOAPIC,
];

#[derive(Serialize, Deserialize)]
struct SavedChips {
    /// In the order of [`CHIPS`].
    chips: [kvm_irqchip; CHIPS.len()],
}

impl DeviceState for Chips {
    fn name(&self) -> &CStr {
        c"irqchip"
    }

    fn version(&self) -> u32 {
        STATE_VERSION
    }

    fn save(&mut self) -> Result<Vec<u8>, StateError> {
        let mut chips = [kvm_irqchip::default(); CHIPS.len()];
        for (chip, id) in chips.iter_mut().zip(CHIPS) {
            *chip = self.0.irqchip(id)?;
        }
        encode(&SavedChips { chips })
    }

    fn load(&mut self, version: u32, state: &[u8]) -> Result<(), StateError> {
        let SavedChips { chips } = decode(STATE_VERSION, version, state)?;
        for (chip, id) in chips.iter().zip(CHIPS) {
            if chip.chip_id != id {
                let problem = format!("irqchip {} where chip {id} belongs", chip.chip_id);
                return Err(StateError::Invalid(problem));
            }
            self.0.set_irqchip(chip)?;
        }
        Ok(())
    }
}
