//! KVM's side of PCI.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vmm_sys_util::eventfd::EventFd;

use super::{Backplane, Msi};
use crate::kvm::{self, MsiRoute, Vm};

/// The first GSI of an MSI: above the pins of every board's interrupt controller.
const FIRST_GSI: u32 = 64;

/// Gives MSIs their GSIs and routes, and doorbells their ioeventfds.
pub struct KvmBackplane {
    vm: Arc<Vm>,
    routes: Mutex<Routes>,
}

struct Routes {
    next_gsi: u32,
    /// What KVM is to know.
    wanted: BTreeMap<u32, Msi>,
    /// What it knows.
    known: BTreeMap<u32, Msi>,
}

impl KvmBackplane {
    /// For `vm`, whose interrupt controller is ready.
    pub fn new(vm: Arc<Vm>) -> Self {
        KvmBackplane {
            vm,
            routes: Mutex::new(Routes {
                next_gsi: FIRST_GSI,
                wanted: BTreeMap::new(),
                known: BTreeMap::new(),
            }),
        }
    }

    fn routes(&self) -> MutexGuard<'_, Routes> {
        self.routes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Backplane for KvmBackplane {
    fn connect(&self, irqfd: &EventFd) -> Result<u32, kvm::Error> {
        let mut routes = self.routes();
        let gsi = routes.next_gsi;
        self.vm.register_irqfd(irqfd, gsi)?;
        routes.next_gsi += 1;
        Ok(gsi)
    }

    fn route(&self, gsi: u32, msi: Msi) {
        self.routes().wanted.insert(gsi, msi);
    }

    fn commit(&self) -> Result<(), kvm::Error> {
        let mut routes = self.routes();
        if routes.wanted == routes.known {
            return Ok(());
        }
        let all = routes.wanted.iter().map(|(&gsi, msi)| MsiRoute {
            gsi,
            address: msi.address,
            data: msi.data,
            device: msi.device,
        });
        match self.vm.set_routes(all) {
            Ok(()) => routes.known = routes.wanted.clone(),
            Err(error) => {
                // One bad message must not stand in the way of everybody's next.
                routes.wanted = routes.known.clone();
                return Err(error);
            }
        }
        Ok(())
    }

    fn attach(&self, address: u64, bell: &EventFd) -> Result<(), kvm::Error> {
        self.vm.register_ioeventfd(bell, address)
    }

    fn detach(&self, address: u64, bell: &EventFd) {
        if let Err(error) = self.vm.unregister_ioeventfd(bell, address) {
            tracing::error!("{error}: {}", error.source);
        }
    }
}
