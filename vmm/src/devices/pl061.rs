//! The arm64 power button: a PL061 GPIO controller (ARM DDI 0190B) with one button on it.
//!
//! The device tree tells the guest that line [`BUTTON`] is its power key, as QEMU's `virt` machine
//! does. The guest may drive lines that it makes outputs; nothing is connected to those.

use std::ffi::CStr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};

use super::line::Line;
use super::pl011::identification;
use super::{BusDevice, DeviceState, StateError, decode, encode};

/// The line that the power button pulls up.
pub const BUTTON: u32 = 3;

/// The controller. Clones share it: the bus, the migration and whoever presses the button.
#[derive(Clone, Debug)]
pub struct Pl061 {
    gpio: Arc<Mutex<Gpio>>,
}

#[derive(Debug)]
struct Gpio {
    registers: Registers,
    /// Levels from outside. Not a part of what migrates: a finger does not.
    inputs: u8,
    line: Line,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Registers {
    data: u8,
    direction: u8,
    level_sensitive: u8,
    both_edges: u8,
    event: u8,
    enabled: u8,
    /// Edges that were seen and not cleared.
    edges: u8,
    alternate: u8,
}

const STATE_VERSION: u32 = 1;

/// Offsets of the registers behind `GPIODATA`, which takes all below.
mod at {
    pub(super) const DIRECTION: u64 = 0x400;
    pub(super) const SENSE: u64 = 0x404;
    pub(super) const BOTH_EDGES: u64 = 0x408;
    pub(super) const EVENT: u64 = 0x40c;
    pub(super) const ENABLE: u64 = 0x410;
    pub(super) const RAW: u64 = 0x414;
    pub(super) const MASKED: u64 = 0x418;
    pub(super) const CLEAR: u64 = 0x41c;
    pub(super) const ALTERNATE: u64 = 0x420;
}

/// `GPIOPeriphID0` to 3 and `GPIOPCellID0` to 3.
const IDS: [u8; 8] = [0x61, 0x10, 0x04, 0x00, 0x0d, 0xf0, 0x05, 0xb1];

impl Pl061 {
    /// A controller whose button is not pressed.
    pub fn new(line: Line) -> Self {
        Pl061 {
            gpio: Arc::new(Mutex::new(Gpio {
                registers: Registers::default(),
                inputs: 0,
                line,
            })),
        }
    }

    /// Presses the power button, or lets go of it.
    pub fn press(&self, pressed: bool) {
        let mut gpio = self.lock();
        let levels = if pressed { 1 << BUTTON } else { 0 };
        gpio.set_inputs(levels);
        gpio.update();
    }

    fn lock(&self) -> MutexGuard<'_, Gpio> {
        self.gpio.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Gpio {
    /// The levels of all lines: outputs have the guest's, inputs those from outside.
    fn levels(&self) -> u8 {
        let Registers {
            data, direction, ..
        } = self.registers;
        data & direction | self.inputs & !direction
    }

    fn set_inputs(&mut self, inputs: u8) {
        let before = self.levels();
        self.inputs = inputs;
        let now = self.levels();
        let registers = &mut self.registers;
        let wanted = registers.both_edges | !(now ^ registers.event);
        registers.edges |= (before ^ now) & wanted & !registers.level_sensitive;
    }

    fn raw(&self) -> u8 {
        let registers = &self.registers;
        let active = !(self.levels() ^ registers.event);
        registers.edges & !registers.level_sensitive | active & registers.level_sensitive
    }

    fn update(&mut self) {
        let pending = self.raw() & self.registers.enabled != 0;
        self.line.set(pending);
    }

    fn read(&self, offset: u64) -> u32 {
        let registers = &self.registers;
        let value = match offset {
            // The address says which lines are of interest.
            ..at::DIRECTION => self.levels() & (offset >> 2) as u8,
            at::DIRECTION => registers.direction,
            at::SENSE => registers.level_sensitive,
            at::BOTH_EDGES => registers.both_edges,
            at::EVENT => registers.event,
            at::ENABLE => registers.enabled,
            at::RAW => self.raw(),
            at::MASKED => self.raw() & registers.enabled,
            at::ALTERNATE => registers.alternate,
            _ => return identification(&IDS, offset),
        };
        value.into()
    }

    fn write(&mut self, offset: u64, value: u8) {
        let registers = &mut self.registers;
        match offset {
            ..at::DIRECTION => {
                let lines = (offset >> 2) as u8 & registers.direction;
                registers.data = registers.data & !lines | value & lines;
            }
            at::DIRECTION => registers.direction = value,
            at::SENSE => registers.level_sensitive = value,
            at::BOTH_EDGES => registers.both_edges = value,
            at::EVENT => registers.event = value,
            at::ENABLE => registers.enabled = value,
            at::CLEAR => registers.edges &= !value,
            at::ALTERNATE => registers.alternate = value,
            _ => {}
        }
    }
}

/// Registers are 8 bits wide, 32 bits apart.
impl BusDevice for Pl061 {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        let value = self.lock().read(offset).to_le_bytes();
        for (byte, value) in data.iter_mut().zip(value) {
            *byte = value;
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        let Some(&value) = data.first() else {
            return;
        };
        let mut gpio = self.lock();
        gpio.write(offset, value);
        gpio.update();
    }
}

impl DeviceState for Pl061 {
    fn name(&self) -> &CStr {
        c"gpio"
    }

    fn version(&self) -> u32 {
        STATE_VERSION
    }

    fn save(&mut self) -> Result<Vec<u8>, StateError> {
        encode(&self.lock().registers)
    }

    fn load(&mut self, version: u32, state: &[u8]) -> Result<(), StateError> {
        let registers = decode(STATE_VERSION, version, state)?;
        let mut gpio = self.lock();
        (gpio.registers, gpio.inputs) = (registers, 0);
        let pending = gpio.raw() & gpio.registers.enabled != 0;
        gpio.line.drive(pending);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;

    fn button() -> (Pl061, Arc<AtomicBool>) {
        let level = Arc::new(AtomicBool::new(false));
        let driven = Arc::clone(&level);
        let line = Line::new(move |level| {
            driven.store(level, Ordering::Relaxed);
            Ok(())
        });
        (Pl061::new(line), level)
    }

    fn get(gpio: &mut Pl061, offset: u64) -> u8 {
        let mut data = [0; 4];
        gpio.read(offset, &mut data);
        data[0]
    }

    const LINE: u8 = 1 << BUTTON;
    /// Where `GPIODATA` shows the button's line alone.
    const DATA: u64 = (LINE as u64) << 2;

    #[test]
    fn a_press_and_its_end_are_an_edge_each() {
        let (mut gpio, level) = button();
        for offset in [at::BOTH_EDGES, at::ENABLE] {
            gpio.write(offset, &[LINE]);
        }
        for pressed in [true, false] {
            gpio.press(pressed);
            assert!(level.load(Ordering::Relaxed));
            assert_eq!(get(&mut gpio, DATA) != 0, pressed);
            assert_eq!(get(&mut gpio, 0), 0);
            assert_eq!(get(&mut gpio, at::MASKED), LINE);
            gpio.write(at::CLEAR, &[LINE]);
            assert!(!level.load(Ordering::Relaxed));
        }
    }

    #[test]
    fn one_edge_is_wanted_or_a_level() {
        let (mut gpio, level) = button();
        gpio.write(at::ENABLE, &[LINE]);
        gpio.press(true);
        assert!(!level.load(Ordering::Relaxed), "only falling edges are");
        gpio.press(false);
        assert!(level.load(Ordering::Relaxed));
        gpio.write(at::EVENT, &[LINE]);
        gpio.write(at::SENSE, &[LINE]);
        assert!(!level.load(Ordering::Relaxed));
        gpio.press(true);
        assert!(level.load(Ordering::Relaxed));
    }

    #[test]
    fn any_access_is_answered_and_registers_go_with_the_guest() {
        let (mut source, _) = button();
        for offset in 0..0x1000 {
            for width in [0, 1, 2, 4, 8] {
                let mut data = [0xff; 8];
                source.write(offset, &data[..width]);
                source.read(offset, &mut data[..width]);
            }
        }
        let state = source.save().unwrap();
        let (mut destination, _) = button();
        destination.load(STATE_VERSION, &state).unwrap();
        assert_eq!(destination.save().unwrap(), state);
        assert!(destination.load(STATE_VERSION, &state[1..]).is_err());
    }
}
