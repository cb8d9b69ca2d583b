//! The devices of the board that the monitor emulates: console, clock of the day, power button.

use std::io;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use super::layout::{DEVICE_SIZE, GPIO, GPIO_SPI, RTC, SERIAL, SERIAL_SPI};
use super::{Error, Uart};
use crate::arch::BoardDevice;
use crate::devices::DeviceState;
use crate::devices::bus::Shared;
use crate::devices::line::Line;
use crate::devices::pl031::Pl031;
use crate::devices::pl061::Pl061;
use crate::devices::serial::Output;
use crate::kvm::Vm;
use crate::runstate::GuestRequests;

/// How long the power button is held: longer than drivers debounce it, as in QEMU's `gpio_key`.
const PRESS: Duration = Duration::from_millis(100);

/// The board's devices. PSCI, by which the guest switches itself off, is KVM's.
pub struct Board {
    serial: Uart,
    rtc: Pl031,
    gpio: Pl061,
}

impl Board {
    /// Makes them. Their interrupts need the GIC only once the guest runs.
    pub fn new(vm: &Arc<Vm>, output: Output, _requests: &GuestRequests) -> Result<Self, Error> {
        Ok(Board {
            serial: Uart::new(line(vm, SERIAL_SPI), output),
            rtc: Pl031::default(),
            gpio: Pl061::new(line(vm, GPIO_SPI)),
        })
    }

    /// The console.
    pub fn serial(&self) -> &Uart {
        &self.serial
    }

    /// Where exits find them.
    pub fn on_bus(&self) -> Vec<BoardDevice> {
        let devices: [(u64, Shared); 3] = [
            (SERIAL, Arc::new(Mutex::new(self.serial.clone()))),
            (RTC, Arc::new(Mutex::new(self.rtc.clone()))),
            (GPIO, Arc::new(Mutex::new(self.gpio.clone()))),
        ];
        let place = |(base, device)| BoardDevice {
            base,
            size: DEVICE_SIZE,
            pio: false,
            device,
        };
        devices.map(place).into()
    }

    /// What migrates.
    pub fn devices(&self) -> Vec<Box<dyn DeviceState>> {
        vec![
            Box::new(self.serial.clone()),
            Box::new(self.rtc.clone()),
            Box::new(self.gpio.clone()),
        ]
    }

    /// Presses the power button for a moment, which ends on a thread of its own.
    ///
    /// # Errors
    /// When there can be no such thread; nothing was pressed then.
    pub fn press_power_button(&self) -> io::Result<()> {
        let gpio = self.gpio.clone();
        let press = move || {
            gpio.press(true);
            thread::sleep(PRESS);
            gpio.press(false);
        };
        let thread = thread::Builder::new().name("power-button".to_owned());
        thread.spawn(press).map(drop)
    }
}

/// The shared interrupt `spi`.
fn line(vm: &Arc<Vm>, spi: u32) -> Line {
    let vm = Arc::clone(vm);
    Line::new(move |level| vm.set_spi(spi, level).map_err(|error| error.source))
}
