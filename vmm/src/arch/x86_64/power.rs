//! How a guest switches itself off or resets: the ports that QEMU's PC machines have for it.

use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex};

use crate::arch::BoardDevice;
use crate::devices::BusDevice;
use crate::runstate::Request;

/// ACPI's PM1a control register, where QEMU's q35 has it.
const PM1A_CONTROL: u64 = 0x604;
/// `SLP_EN`: enter the sleep state that the other bits name. There is only one here, S5.
const SLEEP_ENABLE: u16 = 1 << 13;
/// The keyboard controller's command port.
const KEYBOARD_COMMAND: u64 = 0x64;
/// The command that pulses the CPU's reset line.
const PULSE_RESET: u16 = 0xfe;
/// The chipset's reset control register.
const RESET_CONTROL: u64 = 0xcf9;
/// `RST_CPU`.
const RESET_CPU: u16 = 1 << 2;

/// The board's devices that are not KVM's. What the guest asks of them goes to `requests`.
pub fn platform_devices(requests: &Sender<Request>) -> Vec<BoardDevice> {
    let port = |base, size, asks_for: fn(u16) -> Option<Request>| BoardDevice {
        base,
        size,
        pio: true,
        device: Arc::new(Mutex::new(PowerPort {
            requests: requests.clone(),
            asks_for,
        })),
    };
    vec![
        port(PM1A_CONTROL, 2, |value| {
            (value & SLEEP_ENABLE != 0).then_some(Request::Shutdown)
        }),
        port(KEYBOARD_COMMAND, 1, |value| {
            (value == PULSE_RESET).then_some(Request::Reset)
        }),
        port(RESET_CONTROL, 1, |value| {
            (value & RESET_CPU != 0).then_some(Request::Reset)
        }),
    ]
}

/// A port that reads as 0, "idle", and turns some written values into requests.
struct PowerPort {
    requests: Sender<Request>,
    asks_for: fn(u16) -> Option<Request>,
}

impl BusDevice for PowerPort {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        let value = match *data {
            [byte] => u16::from(byte) << (8 * (offset & 1)),
            [low, high] => u16::from_le_bytes([low, high]),
            _ => return,
        };
        if let Some(request) = (self.asks_for)(value) {
            // The receiver only goes away when the process ends.
            let _ = self.requests.send(request);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use super::*;

    #[test]
    fn only_the_values_that_mean_it_ask_for_something() {
        let rows: &[(u64, u64, &[u8], Option<Request>)] = &[
            (PM1A_CONTROL, 0, &[0x00, 0x20], Some(Request::Shutdown)),
            (PM1A_CONTROL, 1, &[0x20], Some(Request::Shutdown)),
            (PM1A_CONTROL, 0, &[0x20], None),
            (PM1A_CONTROL, 0, &[0x00, 0x00], None),
            (PM1A_CONTROL, 0, &[0, 0x20, 0, 0], None),
            (KEYBOARD_COMMAND, 0, &[0xfe], Some(Request::Reset)),
            (KEYBOARD_COMMAND, 0, &[0xff], None),
            (RESET_CONTROL, 0, &[0x06], Some(Request::Reset)),
            (RESET_CONTROL, 0, &[0x02], None),
            (RESET_CONTROL, 0, &[], None),
        ];
        for (port, offset, data, wanted) in rows {
            let (sender, requests) = channel();
            let devices = platform_devices(&sender);
            let found = devices.iter().find(|device| device.base == *port).unwrap();
            found.device.lock().unwrap().write(*offset, data);
            let sent = requests.try_recv().ok();
            assert_eq!(sent, *wanted, "{port:#x}+{offset} <- {data:x?}");
        }
    }
}
