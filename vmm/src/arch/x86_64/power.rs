//! How a guest switches itself off or resets, and how it hears of the power button: ACPI's PM1
//! registers (ACPI 6.5, 4.8.3) at the ports that QEMU's q35 machine has them at, and the ports that
//! PCs reset by.

use std::ffi::CStr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};

use super::layout;
use crate::arch::BoardDevice;
use crate::devices::line::Line;
use crate::devices::{BusDevice, DeviceState, StateError, decode, encode};
use crate::runstate::{GuestRequests, Request};

/// The PM1 registers. Clones share them: the bus, the migration and whoever presses the button.
#[derive(Clone, Debug)]
pub(super) struct PowerManagement {
    pm1: Arc<Mutex<Pm1>>,
}

#[derive(Debug)]
struct Pm1 {
    registers: Registers,
    sci: Line,
    requests: GuestRequests,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Registers {
    status: u16,
    enable: u16,
    control: u16,
}

const STATE_VERSION: u32 = 1;

/// In `PM1_STS` and `PM1_EN`: the power button.
const POWER_BUTTON: u16 = 1 << 8;
/// Events that there are, in the enable register: timer, global lock, power button, sleep button,
/// real-time clock.
const EVENTS: u16 = 0x721;
/// `PM1_CNT.SCI_EN`: ACPI mode, which this machine is always in.
const ACPI_MODE: u16 = 1;
/// `PM1_CNT.SLP_EN`: enter the sleep state that the other bits name. There is only one here, S5.
const SLEEP_ENABLE: u16 = 1 << 13;

impl PowerManagement {
    /// Registers as after a reset; `sci` is the ACPI interrupt.
    pub(super) fn new(sci: Line, requests: GuestRequests) -> Self {
        PowerManagement {
            pm1: Arc::new(Mutex::new(Pm1 {
                registers: Registers::default(),
                sci,
                requests,
            })),
        }
    }

    /// Presses the power button.
    pub(super) fn press_button(&self) {
        let mut pm1 = self.lock();
        pm1.registers.status |= POWER_BUTTON;
        pm1.update();
    }

    fn lock(&self) -> MutexGuard<'_, Pm1> {
        self.pm1.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Registers {
    fn pending(&self) -> bool {
        self.status & self.enable != 0
    }

    /// The 6 bytes from `PM1_STS` on.
    fn bytes(&self) -> [u8; 6] {
        let [s0, s1] = self.status.to_le_bytes();
        let [e0, e1] = self.enable.to_le_bytes();
        let [c0, c1] = (self.control | ACPI_MODE).to_le_bytes();
        [s0, s1, e0, e1, c0, c1]
    }
}

impl Pm1 {
    fn update(&mut self) {
        let pending = self.registers.pending();
        self.sci.set(pending);
    }

    fn write_byte(&mut self, offset: u64, byte: u8) {
        let shift = 8 * (offset & 1);
        let value = u16::from(byte) << shift;
        let replace = |register: u16| register & !(0xff << shift) | value;
        let registers = &mut self.registers;
        match offset {
            0 | 1 => registers.status &= !value,
            2 | 3 => registers.enable = replace(registers.enable) & EVENTS,
            4 | 5 => {
                registers.control = replace(registers.control) & !SLEEP_ENABLE;
                if value & SLEEP_ENABLE != 0 {
                    self.requests.send(Request::Shutdown);
                }
            }
            _ => {}
        }
    }
}

impl BusDevice for PowerManagement {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        let bytes = self.lock().registers.bytes();
        let from = usize::try_from(offset).ok().and_then(|at| bytes.get(at..));
        for (byte, value) in data.iter_mut().zip(from.unwrap_or_default()) {
            *byte = *value;
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        let mut pm1 = self.lock();
        for (offset, &byte) in (offset..).zip(data) {
            pm1.write_byte(offset, byte);
        }
        pm1.update();
    }
}

impl DeviceState for PowerManagement {
    fn name(&self) -> &CStr {
        c"pm1"
    }

    fn version(&self) -> u32 {
        STATE_VERSION
    }

    fn save(&mut self) -> Result<Vec<u8>, StateError> {
        encode(&self.lock().registers)
    }

    fn load(&mut self, version: u32, state: &[u8]) -> Result<(), StateError> {
        let registers: Registers = decode(STATE_VERSION, version, state)?;
        let mut pm1 = self.lock();
        pm1.registers = registers;
        let pending = pm1.registers.pending();
        pm1.sci.drive(pending);
        Ok(())
    }
}

/// The ports that reset a PC.
pub(super) fn reset_ports(requests: &GuestRequests) -> Vec<BoardDevice> {
    let port = |base, mask, resets| BoardDevice {
        base,
        size: 1,
        pio: true,
        device: Arc::new(Mutex::new(ResetPort {
            requests: requests.clone(),
            mask,
            resets,
        })),
    };
    vec![
        port(layout::KEYBOARD_COMMAND, u8::MAX, layout::PULSE_RESET),
        port(layout::RESET_CONTROL, layout::RESET_CPU, layout::RESET_CPU),
    ]
}

/// A port that reads as 0, "idle", and resets the machine when the bits of `mask` are `resets`.
struct ResetPort {
    requests: GuestRequests,
    mask: u8,
    resets: u8,
}

impl BusDevice for ResetPort {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&mut self, _offset: u64, data: &[u8]) {
        if let [byte] = *data
            && byte & self.mask == self.resets
        {
            self.requests.send(Request::Reset);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::sync::mpsc::{Receiver, channel};

    use super::*;

    fn power() -> (PowerManagement, Arc<AtomicBool>, Receiver<Request>) {
        let level = Arc::new(AtomicBool::new(false));
        let driven = Arc::clone(&level);
        let line = Line::new(move |level| {
            driven.store(level, Ordering::Relaxed);
            Ok(())
        });
        let (sender, requests) = channel();
        (
            PowerManagement::new(line, GuestRequests::new(sender)),
            level,
            requests,
        )
    }

    #[test]
    fn only_the_values_that_mean_it_switch_the_machine_off() {
        let rows: &[(u64, &[u8], Option<Request>)] = &[
            (4, &[0x00, 0x20], Some(Request::Shutdown)),
            (5, &[0x20], Some(Request::Shutdown)),
            (4, &[0x20], None),
            (4, &[0x00, 0x00], None),
            (2, &[0x00, 0x20], None),
            (5, &[], None),
        ];
        for (offset, data, wanted) in rows {
            let (mut power, _, requests) = power();
            power.write(*offset, data);
            let sent = requests.try_recv().ok();
            assert_eq!(sent, *wanted, "{offset} <- {data:x?}");
        }
    }

    #[test]
    fn only_the_values_that_mean_it_reset_the_machine() {
        let rows: &[(u64, &[u8], bool)] = &[
            (layout::KEYBOARD_COMMAND, &[0xfe], true),
            (layout::KEYBOARD_COMMAND, &[0xff], false),
            (layout::RESET_CONTROL, &[0x06], true),
            (layout::RESET_CONTROL, &[0x02], false),
            (layout::RESET_CONTROL, &[], false),
            (layout::RESET_CONTROL, &[6, 6], false),
        ];
        for (port, data, resets) in rows {
            let (sender, requests) = channel();
            let ports = reset_ports(&GuestRequests::new(sender));
            let found = ports.iter().find(|device| device.base == *port).unwrap();
            found.device.lock().unwrap().write(0, data);
            assert_eq!(
                requests.try_recv().is_ok(),
                *resets,
                "{port:#x} <- {data:x?}"
            );
        }
    }

    #[test]
    fn the_power_button_raises_the_sci_until_it_is_acknowledged() {
        let (mut power, level, _requests) = power();
        power.press_button();
        assert!(!level.load(Ordering::Relaxed), "nobody wants to know");
        power.write(2, &POWER_BUTTON.to_le_bytes());
        assert!(level.load(Ordering::Relaxed));
        let mut status = [0; 2];
        power.read(0, &mut status);
        assert_eq!(u16::from_le_bytes(status), POWER_BUTTON);
        power.write(0, &POWER_BUTTON.to_le_bytes());
        assert!(!level.load(Ordering::Relaxed));
    }

    #[test]
    fn any_access_is_answered_and_registers_go_with_the_guest() {
        let (mut source, _, _requests) = power();
        for offset in 0..8 {
            for width in 0..8 {
                let mut data = [0x0f; 8];
                source.write(offset, &data[..width]);
                source.read(offset, &mut data[..width]);
            }
        }
        source.write(2, &POWER_BUTTON.to_le_bytes());
        source.press_button();
        let state = source.save().unwrap();
        let (mut destination, level, _requests) = power();
        destination.load(STATE_VERSION, &state).unwrap();
        assert!(level.load(Ordering::Relaxed));
        assert_eq!(destination.save().unwrap(), state);
    }
}
