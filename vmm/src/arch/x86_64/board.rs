//! The devices of the board that the monitor emulates: COM1, the power management ports.

use std::io;
use std::sync::{Arc, Mutex};

use vmm_sys_util::eventfd::EventFd;

use super::power::{self, PowerManagement};
use super::{Error, Uart, layout};
use crate::arch::BoardDevice;
use crate::devices::DeviceState;
use crate::devices::line::Line;
use crate::devices::serial::Output;
use crate::kvm::Vm;
use crate::runstate::GuestRequests;

/// The board's devices.
pub struct Board {
    serial: Uart,
    power: PowerManagement,
    reset_ports: Vec<BoardDevice>,
}

impl Board {
    /// Makes them, once the interrupt controllers are there. What the guest asks of them goes to
    /// `requests`.
    pub fn new(vm: &Arc<Vm>, output: Output, requests: &GuestRequests) -> Result<Self, Error> {
        let irqfd = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map_err(Error::Irqfd)?;
        vm.register_irqfd(&irqfd, layout::SERIAL_GSI)?;
        let sci = Arc::clone(vm);
        let sci = Line::new(move |level| {
            sci.set_irq_line(layout::SCI_GSI, level)
                .map_err(|error| error.source)
        });
        Ok(Board {
            serial: Uart::new(irqfd, output),
            power: PowerManagement::new(sci, requests.clone()),
            reset_ports: power::reset_ports(requests),
        })
    }

    /// The console.
    pub fn serial(&self) -> &Uart {
        &self.serial
    }

    /// Where exits find them.
    pub fn on_bus(&self) -> Vec<BoardDevice> {
        let mut devices = self.reset_ports.clone();
        devices.push(BoardDevice {
            base: layout::SERIAL,
            size: layout::SERIAL_SIZE,
            pio: true,
            device: Arc::new(Mutex::new(self.serial.clone())),
        });
        devices.push(BoardDevice {
            base: layout::PM1,
            size: layout::PM1_SIZE,
            pio: true,
            device: Arc::new(Mutex::new(self.power.clone())),
        });
        devices
    }

    /// What migrates.
    pub fn devices(&self) -> Vec<Box<dyn DeviceState>> {
        vec![Box::new(self.serial.clone()), Box::new(self.power.clone())]
    }

    /// Presses the power button: its event stays until the guest has seen it.
    pub fn press_power_button(&self) -> io::Result<()> {
        self.power.press_button();
        Ok(())
    }
}
