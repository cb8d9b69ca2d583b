//! Interrupts and doorbells that pass by the monitor: MSI routes, irqfds, ioeventfds.

use kvm_bindings::{
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_MSI_VALID_DEVID, KvmIrqRouting,
    kvm_irq_routing_entry, kvm_irq_routing_irqchip, kvm_irq_routing_msi,
};
use kvm_ioctls::{Cap, IoEventAddress, NoDatamatch};
use vmm_sys_util::eventfd::EventFd;

use super::{Error, Result, Vm};

/// What a GSI's irqfd sends: a message-signalled interrupt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MsiRoute {
    /// The GSI; above those of the board's own interrupts.
    pub gsi: u32,
    /// The address that the device would write to.
    pub address: u64,
    /// What it would write.
    pub data: u32,
    /// Who writes: the PCI requester id, by which an ITS finds the device's table. Where the
    /// interrupt controller takes no device ids it is not passed on.
    pub device: u32,
}

impl Vm {
    /// `KVM_SET_GSI_ROUTING`: the routes of the board's own interrupts, and `msis`. It replaces all
    /// routes and waits until no interrupt is on its way along an old one, so it is not cheap.
    pub fn set_routes(&self, msis: impl Iterator<Item = MsiRoute>) -> Result<()> {
        let error = |e| Error::new("KVM_SET_GSI_ROUTING", "", e);
        let device_ids = self.check_extension(Cap::MsiDevid) > 0;
        let board = Self::BOARD_ROUTES.into_iter().map(irqchip_entry);
        let all: Vec<_> = board
            .chain(msis.map(|msi| msi_entry(msi, device_ids)))
            .collect();
        let routing = KvmIrqRouting::from_entries(&all)
            .map_err(|_| error(kvm_ioctls::Error::new(libc::E2BIG)))?;
        self.fd.set_gsi_routing(&routing).map_err(error)
    }

    /// `KVM_IRQFD`: a write to `irqfd` pulses the interrupt `gsi`. The in-kernel interrupt
    /// controller must be ready.
    pub fn register_irqfd(&self, irqfd: &EventFd, gsi: u32) -> Result<()> {
        self.fd
            .register_irqfd(irqfd, gsi)
            .map_err(|e| Error::new("KVM_IRQFD", format!("GSI {gsi}"), e))
    }

    /// `KVM_IOEVENTFD`: a store of any width and value to `address` signals `eventfd` and is over
    /// for the vCPU; no exit reaches the monitor.
    ///
    /// # Errors
    /// `EEXIST` when there is one at `address` already.
    pub fn register_ioeventfd(&self, eventfd: &EventFd, address: u64) -> Result<()> {
        let at = IoEventAddress::Mmio(address);
        self.fd
            .register_ioevent(eventfd, &at, NoDatamatch)
            .map_err(|e| Error::new("KVM_IOEVENTFD", format!("{address:#x}"), e))
    }

    /// Undoes [`Vm::register_ioeventfd`].
    pub fn unregister_ioeventfd(&self, eventfd: &EventFd, address: u64) -> Result<()> {
        let at = IoEventAddress::Mmio(address);
        self.fd
            .unregister_ioevent(eventfd, &at, NoDatamatch)
            .map_err(|e| Error::new("KVM_IOEVENTFD", format!("{address:#x}, deassign"), e))
    }
}

/// GSI, chip and pin.
pub(super) type BoardRoute = (u32, u32, u32);

fn irqchip_entry((gsi, irqchip, pin): BoardRoute) -> kvm_irq_routing_entry {
    let mut entry = kvm_irq_routing_entry {
        gsi,
        type_: KVM_IRQ_ROUTING_IRQCHIP,
        ..Default::default()
    };
    entry.u.irqchip = kvm_irq_routing_irqchip { irqchip, pin };
    entry
}

fn msi_entry(msi: MsiRoute, device_ids: bool) -> kvm_irq_routing_entry {
    let mut message = kvm_irq_routing_msi {
        address_lo: msi.address as u32,
        address_hi: (msi.address >> 32) as u32,
        data: msi.data,
        ..Default::default()
    };
    let mut entry = kvm_irq_routing_entry {
        gsi: msi.gsi,
        type_: KVM_IRQ_ROUTING_MSI,
        ..Default::default()
    };
    if device_ids {
        entry.flags = KVM_MSI_VALID_DEVID;
        message.__bindgen_anon_1.devid = msi.device;
    }
    entry.u.msi = message;
    entry
}
