//! The x86-64 part: INIT and SIPI for the other vCPUs, ports for the console and the power switch,
//! and the few interrupts that commands ask for.
//!
//! There is no ITS, so the command line's `its_` words do nothing here. A development machine may
//! emulate this guest one instruction at a time, so there is little of everything.

mod cpu;
mod entry;
mod interrupts;
mod pvh;

use core::fmt::Write;

use blackout_abi::guest::{BootPage, command, state};

use crate::Failure;
use crate::arena::Arena;
use crate::config::Config;
use crate::serial::Serial;
use crate::shared::Shared;

/// ACPI's PM1a control register, and "sleep now, in S5".
const PM1A_CONTROL: u16 = 0x604;
const SLEEP: u16 = 1 << 13;
/// The keyboard controller's command port, and "pulse the reset line".
const KEYBOARD_COMMAND: u16 = 0x64;
const PULSE_RESET: u8 = 0xfe;

/// The machine, set up.
pub(crate) struct Machine;

impl Machine {
    /// Takes the local APIC over: the other vCPUs are started by it.
    pub(crate) fn new(
        _boot: &BootPage,
        config: &Config,
        _arena: &mut Arena,
    ) -> Result<Self, Failure> {
        if !cpu::has_x2apic() {
            return Err(Failure::Controller);
        }
        interrupts::set_up();
        if config.vcpus > 1 {
            entry::install_trampoline();
        }
        Ok(Machine)
    }

    /// Devices and events mapped in the ITS, which this architecture does not have.
    pub(crate) fn events(&self) -> (u64, u64) {
        (0, 0)
    }

    /// Starts a vCPU, whose APIC id is its index.
    pub(crate) fn start_vcpu(&mut self, index: usize) -> Result<(), Failure> {
        entry::start_vcpu(index)
    }

    /// Carries out a mailbox command; one that needs an ITS answers `u64::MAX`.
    pub(crate) fn command(&mut self, command: u64, argument: u64) -> [u64; 2] {
        match command {
            command::RAISE_MASKED => return [interrupts::raise(argument), 0],
            command::TAKE_PENDING => return [interrupts::take(), 0],
            command::TIMER => interrupts::start_timer(argument),
            command::SHUTDOWN => cpu::out16(PM1A_CONTROL, SLEEP),
            command::RESET => cpu::out8(KEYBOARD_COMMAND, PULSE_RESET),
            _ => return [u64::MAX, 0],
        }
        [0; 2]
    }
}

/// A vCPU has nothing to do but its work, and to say when it did it.
pub(crate) fn turn(vcpu: usize) {
    Shared::get().stamp(vcpu, cpu::ticks());
}

/// Writes to the port of the firmware's progress codes, which no device of the machine has.
pub(crate) fn exit(_serial: u64) {
    cpu::out8(0x80, 0);
}

/// Writes the transmit register of the 16550 at an I/O port.
pub(crate) fn put(serial: u64, byte: u8) {
    cpu::out8(serial as u16, byte);
}

/// Never returns.
pub(crate) fn halt() -> ! {
    cpu::halt()
}

/// This program causes no exception on purpose.
fn exception(vector: u64) -> ! {
    let shared = Shared::get();
    let address = cpu::fault_address();
    let _ = writeln!(
        Serial::new(shared.serial()),
        "blackout-guest: exception {vector}, CR2 {address:#x}"
    );
    shared.set_state(state::FAILED, Failure::Exception as u64);
    halt()
}
