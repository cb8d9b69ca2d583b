//! The arm64 console: a PL011 UART (ARM DDI 0183G), one page of registers, each 32 bits wide.
//!
//! Bytes that the guest writes leave at once, so its transmitter is always ready. What comes in
//! waits in a FIFO of 16 bytes, as deep as the revision in the peripheral id says, or of one when
//! the guest has FIFOs off. There is no modem, no DMA and no loopback.

use std::collections::VecDeque;
use std::ffi::CStr;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};

use super::line::Line;
use super::serial::Output;
use super::{BusDevice, DeviceState, StateError, decode, encode};

/// The console. Clones share one UART: the bus, the migration and the input thread each have one.
#[derive(Clone)]
pub struct Pl011 {
    uart: Arc<Mutex<Uart>>,
}

struct Uart {
    registers: Registers,
    line: Line,
    output: Output,
}

/// What migrates: the registers that hold something, and what the guest has not read yet.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Registers {
    flow: u32,
    integer_baud: u32,
    fractional_baud: u32,
    line_control: u32,
    control: u32,
    fifo_levels: u32,
    mask: u32,
    raw: u32,
    dma: u32,
    received: VecDeque<u8>,
}

const STATE_VERSION: u32 = 1;

/// Offsets of the registers.
mod at {
    pub(super) const DATA: u64 = 0x00;
    /// Receive status on a read, error clear on a write.
    pub(super) const STATUS: u64 = 0x04;
    pub(super) const FLAGS: u64 = 0x18;
    pub(super) const FLOW: u64 = 0x20;
    pub(super) const INTEGER_BAUD: u64 = 0x24;
    pub(super) const FRACTIONAL_BAUD: u64 = 0x28;
    pub(super) const LINE_CONTROL: u64 = 0x2c;
    pub(super) const CONTROL: u64 = 0x30;
    pub(super) const FIFO_LEVELS: u64 = 0x34;
    pub(super) const MASK: u64 = 0x38;
    pub(super) const RAW: u64 = 0x3c;
    pub(super) const MASKED: u64 = 0x40;
    pub(super) const CLEAR: u64 = 0x44;
    pub(super) const DMA: u64 = 0x48;
    pub(super) const IDS: u64 = 0xfe0;
}

/// `UARTPeriphID0` to 3 and `UARTPCellID0` to 3: Arm's PL011, revision r1p4.
const IDS: [u8; 8] = [0x11, 0x10, 0x14, 0x00, 0x0d, 0xf0, 0x05, 0xb1];

/// `UARTFR`.
const RECEIVE_EMPTY: u32 = 1 << 4;
const RECEIVE_FULL: u32 = 1 << 6;
const TRANSMIT_EMPTY: u32 = 1 << 7;
/// `UARTLCR_H.FEN`.
const FIFOS_ON: u32 = 1 << 4;
/// Interrupts, as in `UARTIMSC`, `UARTRIS`, `UARTMIS` and `UARTICR`.
const RECEIVED: u32 = 1 << 4;
const TRANSMITTED: u32 = 1 << 5;
const ALL_INTERRUPTS: u32 = 0x7ff;

/// Bytes that the receive FIFO holds.
const FIFO: usize = 16;

impl Default for Registers {
    /// As after a reset.
    fn default() -> Self {
        Registers {
            flow: 0,
            integer_baud: 0,
            fractional_baud: 0,
            line_control: 0,
            control: 0x300,
            fifo_levels: 0x12,
            mask: 0,
            raw: 0,
            dma: 0,
            received: VecDeque::with_capacity(FIFO),
        }
    }
}

impl Registers {
    /// How many received bytes there is room for.
    fn depth(&self) -> usize {
        if self.line_control & FIFOS_ON != 0 {
            FIFO
        } else {
            1
        }
    }

    fn flags(&self) -> u32 {
        let mut flags = TRANSMIT_EMPTY;
        if self.received.is_empty() {
            flags |= RECEIVE_EMPTY;
        }
        if self.received.len() >= self.depth() {
            flags |= RECEIVE_FULL;
        }
        flags
    }

    fn read(&mut self, offset: u64) -> u32 {
        match offset {
            at::DATA => {
                let byte = self.received.pop_front().unwrap_or(0);
                if self.received.is_empty() {
                    self.raw &= !RECEIVED;
                }
                byte.into()
            }
            at::FLAGS => self.flags(),
            at::FLOW => self.flow,
            at::INTEGER_BAUD => self.integer_baud,
            at::FRACTIONAL_BAUD => self.fractional_baud,
            at::LINE_CONTROL => self.line_control,
            at::CONTROL => self.control,
            at::FIFO_LEVELS => self.fifo_levels,
            at::MASK => self.mask,
            at::RAW => self.raw,
            at::MASKED => self.raw & self.mask,
            at::DMA => self.dma,
            // Nothing that comes in is ever damaged.
            at::STATUS => 0,
            _ => identification(&IDS, offset),
        }
    }

    /// Returns the byte to send, if `value` is one.
    fn write(&mut self, offset: u64, value: u32) -> Option<u8> {
        match offset {
            at::DATA => {
                self.raw |= TRANSMITTED;
                return Some(value as u8);
            }
            at::FLOW => self.flow = value & 0xff,
            at::INTEGER_BAUD => self.integer_baud = value & 0xffff,
            at::FRACTIONAL_BAUD => self.fractional_baud = value & 0x3f,
            at::LINE_CONTROL => self.line_control = value & 0xff,
            at::CONTROL => self.control = value & 0xff87,
            at::FIFO_LEVELS => self.fifo_levels = value & 0x3f,
            at::MASK => self.mask = value & ALL_INTERRUPTS,
            at::CLEAR => self.raw &= !value,
            at::DMA => self.dma = value & 0x7,
            _ => {}
        }
        None
    }
}

/// The byte of a PrimeCell's identification registers at `offset`; 0 elsewhere.
pub(super) fn identification(ids: &[u8; 8], offset: u64) -> u32 {
    let index = offset.checked_sub(at::IDS).map(|bytes| bytes / 4);
    let byte = index.and_then(|index| ids.get(usize::try_from(index).ok()?));
    byte.copied().unwrap_or(0).into()
}

impl Pl011 {
    /// A console that raises `line` and writes to `output`.
    pub fn new(line: Line, output: Output) -> Self {
        Pl011 {
            uart: Arc::new(Mutex::new(Uart {
                registers: Registers::default(),
                line,
                output,
            })),
        }
    }

    /// Gives the guest input; returns how many bytes there was room for.
    pub fn enqueue(&self, input: &[u8]) -> usize {
        let mut uart = self.lock();
        let registers = &mut uart.registers;
        let room = registers.depth().saturating_sub(registers.received.len());
        let taken = input.len().min(room);
        if taken > 0 {
            registers.received.extend(input.iter().take(taken));
            registers.raw |= RECEIVED;
        }
        uart.update();
        taken
    }

    /// Passes on what the guest has written: part of the stop's drain.
    pub fn flush(&self) -> io::Result<()> {
        self.lock().output.flush()
    }

    fn lock(&self) -> MutexGuard<'_, Uart> {
        self.uart.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Uart {
    fn update(&mut self) {
        let pending = self.registers.raw & self.registers.mask != 0;
        self.line.set(pending);
    }
}

/// Registers are 32 bits wide; narrower accesses see their low bytes, as drivers expect.
impl BusDevice for Pl011 {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        let mut uart = self.lock();
        let value = uart.registers.read(offset).to_le_bytes();
        for (byte, value) in data.iter_mut().zip(value) {
            *byte = value;
        }
        uart.update();
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        let mut value = [0; 4];
        for (value, byte) in value.iter_mut().zip(data) {
            *value = *byte;
        }
        let mut uart = self.lock();
        if let Some(byte) = uart.registers.write(offset, u32::from_le_bytes(value))
            && let Err(error) = uart.output.write_all(&[byte])
        {
            tracing::debug!(%error, "the console lost a byte");
        }
        uart.update();
    }
}

impl DeviceState for Pl011 {
    fn name(&self) -> &CStr {
        c"serial"
    }

    fn version(&self) -> u32 {
        STATE_VERSION
    }

    fn save(&mut self) -> Result<Vec<u8>, StateError> {
        encode(&self.lock().registers)
    }

    fn load(&mut self, version: u32, state: &[u8]) -> Result<(), StateError> {
        let registers: Registers = decode(STATE_VERSION, version, state)?;
        let waiting = registers.received.len();
        if waiting > FIFO {
            let problem = format!("{waiting} received bytes wait, {FIFO} can");
            return Err(StateError::Invalid(problem));
        }
        let mut uart = self.lock();
        let pending = registers.raw & registers.mask != 0;
        uart.registers = registers;
        uart.line.drive(pending);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;

    #[derive(Clone, Default)]
    struct Sink(Arc<Mutex<Vec<u8>>>);

    impl Write for Sink {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn console() -> (Pl011, Arc<AtomicBool>, Sink) {
        let (level, sink) = (Arc::new(AtomicBool::new(false)), Sink::default());
        let driven = Arc::clone(&level);
        let line = Line::new(move |level| {
            driven.store(level, Ordering::Relaxed);
            Ok(())
        });
        (Pl011::new(line, Box::new(sink.clone())), level, sink)
    }

    fn get(uart: &mut Pl011, offset: u64) -> u32 {
        let mut data = [0; 4];
        uart.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    fn set(uart: &mut Pl011, offset: u64, value: u32) {
        uart.write(offset, &value.to_le_bytes());
    }

    #[test]
    fn what_is_written_leaves_at_once_and_the_line_follows_the_mask() {
        let (mut uart, level, sink) = console();
        uart.write(at::DATA, b"h");
        set(&mut uart, at::DATA, u32::from(b'i'));
        assert_eq!(*sink.0.lock().unwrap(), b"hi");
        assert!(!level.load(Ordering::Relaxed));
        set(&mut uart, at::MASK, TRANSMITTED);
        assert!(level.load(Ordering::Relaxed));
        assert_eq!(get(&mut uart, at::MASKED), TRANSMITTED);
        set(&mut uart, at::CLEAR, TRANSMITTED);
        assert!(!level.load(Ordering::Relaxed));
    }

    #[test]
    fn input_waits_for_the_guest_and_lowers_the_line_once_it_is_read() {
        let (mut uart, level, _) = console();
        set(&mut uart, at::MASK, RECEIVED);
        assert_eq!(uart.enqueue(b"ab"), 1);
        set(&mut uart, at::LINE_CONTROL, FIFOS_ON);
        assert_eq!(uart.enqueue(&[b'x'; 32]), FIFO - 1);
        assert_eq!(get(&mut uart, at::FLAGS) & RECEIVE_FULL, RECEIVE_FULL);
        assert!(level.load(Ordering::Relaxed));
        assert_eq!(get(&mut uart, at::DATA), u32::from(b'a'));
        for _ in 1..FIFO {
            assert!(level.load(Ordering::Relaxed));
            assert_eq!(get(&mut uart, at::DATA), u32::from(b'x'));
        }
        assert!(!level.load(Ordering::Relaxed));
        assert_eq!(get(&mut uart, at::FLAGS) & RECEIVE_EMPTY, RECEIVE_EMPTY);
        assert_eq!(get(&mut uart, at::DATA), 0);
    }

    #[test]
    fn a_driver_finds_an_arm_pl011() {
        let (mut uart, _, _) = console();
        let ids: Vec<u32> = (0..8).map(|n| get(&mut uart, at::IDS + 4 * n)).collect();
        assert_eq!(ids, IDS.map(u32::from));
        assert_eq!(get(&mut uart, 0xffc + 4), 0);
    }

    #[test]
    fn any_access_is_answered() {
        let (mut uart, _, _) = console();
        for offset in 0..0x1000 {
            for width in [0, 1, 2, 4, 8] {
                let mut data = [0xff; 8];
                uart.write(offset, &data[..width]);
                uart.read(offset, &mut data[..width]);
            }
        }
    }

    #[test]
    fn registers_and_input_go_with_the_guest() {
        let (mut source, _, _) = console();
        set(&mut source, at::LINE_CONTROL, FIFOS_ON);
        set(&mut source, at::MASK, RECEIVED);
        source.enqueue(b"hi");
        let state = source.save().unwrap();
        let (mut destination, level, _) = console();
        destination.load(STATE_VERSION, &state).unwrap();
        assert!(level.load(Ordering::Relaxed));
        assert_eq!(destination.save().unwrap(), state);
        assert_eq!(get(&mut destination, at::DATA), u32::from(b'h'));
        for cut in 0..state.len() {
            assert!(destination.load(STATE_VERSION, &state[..cut]).is_err());
        }
        let overfull = Registers {
            received: [0; FIFO + 1].into(),
            ..Registers::default()
        };
        let state = encode(&overfull).unwrap();
        assert!(destination.load(STATE_VERSION, &state).is_err());
    }
}
