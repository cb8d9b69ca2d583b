//! The x86-64 serial console: a 16550A (vm-superio) on I/O ports.

use std::ffi::CStr;
use std::io::{self, Write};
use std::sync::{Arc, Mutex, PoisonError};

use serde::{Deserialize, Serialize};
use vm_superio::serial::{NoEvents, SerialState};
use vm_superio::{Serial as Uart, Trigger};
use vmm_sys_util::eventfd::EventFd;

use super::{BusDevice, DeviceState, StateError, decode, encode};

/// Where the guest's output goes.
pub type Output = Box<dyn Write + Send>;

/// The console. Clones share one UART: the bus, the migration and the input thread each have one.
#[derive(Clone)]
pub struct Serial {
    uart: Arc<Mutex<Uart<Interrupt, NoEvents, Output>>>,
}

/// The UART's interrupt line: an irqfd, so that raising it needs no ioctl.
struct Interrupt(EventFd);

impl Trigger for Interrupt {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

/// The UART's registers, as vm-superio keeps them.
#[derive(Serialize, Deserialize)]
struct Saved {
    baud_divisor_low: u8,
    baud_divisor_high: u8,
    interrupt_enable: u8,
    interrupt_identification: u8,
    line_control: u8,
    line_status: u8,
    modem_control: u8,
    modem_status: u8,
    scratch: u8,
    in_buffer: Vec<u8>,
}

const STATE_VERSION: u32 = 1;

impl Serial {
    /// A console that raises its interrupt through `irqfd` and writes to `output`.
    pub fn new(irqfd: EventFd, output: Output) -> Self {
        Serial {
            uart: Arc::new(Mutex::new(Uart::new(Interrupt(irqfd), output))),
        }
    }

    /// Gives the guest input; returns how many bytes the receive FIFO had room for.
    pub fn enqueue(&self, input: &[u8]) -> usize {
        self.with(|uart| uart.enqueue_raw_bytes(input).unwrap_or(0))
    }

    /// Passes on what the guest has written: part of the stop's drain.
    pub fn flush(&self) -> io::Result<()> {
        self.with(|uart| uart.writer_mut().flush())
    }

    fn with<T>(&self, body: impl FnOnce(&mut Uart<Interrupt, NoEvents, Output>) -> T) -> T {
        body(&mut self.uart.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Registers are one byte wide and one byte apart; wider accesses see the first.
impl BusDevice for Serial {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        if let (Some(byte), Ok(offset)) = (data.first_mut(), u8::try_from(offset)) {
            *byte = self.with(|uart| uart.read(offset));
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let (Some(&byte), Ok(offset)) = (data.first(), u8::try_from(offset)) {
            let result = self.with(|uart| uart.write(offset, byte));
            if let Err(error) = result {
                tracing::debug!(%error, "the console lost a byte");
            }
        }
    }
}

impl DeviceState for Serial {
    fn name(&self) -> &CStr {
        c"serial"
    }

    fn version(&self) -> u32 {
        STATE_VERSION
    }

    fn save(&mut self) -> Result<Vec<u8>, StateError> {
        let state = self.with(|uart| uart.state());
        encode(&Saved {
            baud_divisor_low: state.baud_divisor_low,
            baud_divisor_high: state.baud_divisor_high,
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
            in_buffer: state.in_buffer,
        })
    }

    fn load(&mut self, version: u32, state: &[u8]) -> Result<(), StateError> {
        let saved: Saved = decode(STATE_VERSION, version, state)?;
        let state = SerialState {
            baud_divisor_low: saved.baud_divisor_low,
            baud_divisor_high: saved.baud_divisor_high,
            interrupt_enable: saved.interrupt_enable,
            interrupt_identification: saved.interrupt_identification,
            line_control: saved.line_control,
            line_status: saved.line_status,
            modem_control: saved.modem_control,
            modem_status: saved.modem_status,
            scratch: saved.scratch,
            in_buffer: saved.in_buffer,
        };
        self.with(|uart| {
            let irqfd = uart.interrupt_evt().0.try_clone();
            let irqfd = irqfd.map_err(|e| StateError::Invalid(format!("irqfd: {e}")))?;
            let output = std::mem::replace(uart.writer_mut(), Box::new(io::sink()));
            let restored = Uart::from_state(&state, Interrupt(irqfd), NoEvents, output);
            *uart = restored.map_err(|e| StateError::Invalid(format!("serial: {e:?}")))?;
            Ok(())
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn console() -> (Serial, EventFd) {
        let irqfd = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        (
            Serial::new(irqfd.try_clone().unwrap(), Box::new(io::sink())),
            irqfd,
        )
    }

    #[test]
    fn input_and_registers_go_with_the_guest() {
        let (mut source, _) = console();
        source.write(7, &[0x5a]);
        assert_eq!(source.enqueue(b"hi"), 2);
        let state = source.save().unwrap();

        let (mut destination, _) = console();
        destination.load(STATE_VERSION, &state).unwrap();
        let mut byte = [0];
        for (offset, expected) in [(7, 0x5a), (0, b'h'), (0, b'i')] {
            destination.read(offset, &mut byte);
            assert_eq!(byte[0], expected);
        }
    }

    #[test]
    fn a_broken_state_is_refused() {
        let (mut serial, _) = console();
        let state = serial.save().unwrap();
        for cut in 0..state.len() {
            assert!(
                serial.load(STATE_VERSION, &state[..cut]).is_err(),
                "cut at {cut}"
            );
        }
        assert!(matches!(
            serial.load(2, &state),
            Err(StateError::Version { found: 2, .. })
        ));
    }
}
