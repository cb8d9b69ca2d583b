//! The arm64 part: GICv3 with its ITS, PSCI, exceptions, and the way in from QEMU.

mod entry;
mod gic;
mod its;
mod queue;
mod registers;
mod tree;

use blackout_abi::guest::{BootPage, command, state};

use crate::Failure;
use crate::arena::Arena;
use crate::config::Config;
use crate::shared::Shared;
use gic::Gic;
use its::Its;
use registers::{Registers, psci};

/// The machine, set up.
pub(crate) struct Machine {
    gic: Gic,
    its: Option<Its>,
    /// The vCPU and the LPI of the event that was raised while interrupts were masked.
    raised: Option<(usize, u32)>,
}

impl Machine {
    /// Sets the GIC up, and the ITS if there are devices to map.
    pub(crate) fn new(
        boot: &BootPage,
        config: &Config,
        arena: &mut Arena,
    ) -> Result<Self, Failure> {
        let gic = Gic::new(boot, config.vcpus, arena)?;
        let its = if config.its_devices > 0 {
            (0..config.vcpus).for_each(|vcpu| gic.enable_lpis(vcpu));
            Some(Its::new(boot, config, &gic, arena)?)
        } else {
            None
        };
        Gic::set_mask(false, 0);
        Ok(Machine {
            gic,
            its,
            raised: None,
        })
    }

    /// Devices and events mapped in the ITS.
    pub(crate) fn events(&self) -> (u64, u64) {
        self.its.as_ref().map_or((0, 0), Its::mapped)
    }

    /// Starts a vCPU by PSCI.
    pub(crate) fn start_vcpu(&mut self, index: usize) -> Result<(), Failure> {
        let entry = entry::secondary_start as *const () as u64;
        let arguments = [self.gic.affinity(index), entry, index as u64];
        match psci::call(psci::CPU_ON, arguments) {
            0 => Ok(()),
            _ => Err(Failure::Vcpu),
        }
    }

    /// Carries out a mailbox command. What needs an ITS answers zeros without one; when the ITS
    /// takes no commands any more, so does everything else.
    pub(crate) fn command(&mut self, command: u64, argument: u64) -> [u64; 2] {
        match command {
            command::SHUTDOWN => {
                psci::call(psci::SYSTEM_OFF, [0; 3]);
                [0; 2]
            }
            command::RESET => {
                psci::call(psci::SYSTEM_RESET, [0; 3]);
                [0; 2]
            }
            _ => self.its_command(command, argument).unwrap_or([0; 2]),
        }
    }

    fn its_command(&mut self, command: u64, argument: u64) -> Option<[u64; 2]> {
        let its = self.its.as_mut()?;
        match command {
            command::CHECK_EVENTS => its.check_events().ok(),
            command::RAISE_MASKED => {
                let (vcpu, lpi) = its.target(argument)?;
                Gic::set_mask(true, vcpu);
                Gic::forget(lpi);
                its.raise(argument).ok()?;
                self.raised = Some((vcpu, lpi));
                Some([u64::from(lpi), vcpu as u64])
            }
            command::TAKE_PENDING => {
                let (vcpu, lpi) = self.raised.take()?;
                Gic::set_mask(false, vcpu);
                let (count, _) = Gic::wait_for(lpi);
                Some([if count == 0 { 0 } else { u64::from(lpi) }, count.into()])
            }
            command::BREAK_ITS => its.break_tables(argument).ok().map(|()| [0; 2]),
            command::MEND_ITS => its.mend_tables(&self.gic).ok().map(|()| [0; 2]),
            _ => None,
        }
    }
}

/// Follows the interrupt mask that vCPU 0 asks for.
pub(crate) fn turn(vcpu: usize) {
    gic::follow_mask(vcpu);
}

/// Writes 0 to the interrupt clear register of a PL011, which clears none.
pub(crate) fn exit(serial: u64) {
    Registers(serial).write8(0x44, 0);
}

/// Writes the data register of a PL011.
pub(crate) fn put(serial: u64, byte: u8) {
    Registers(serial).write8(0, byte);
}

/// Never returns.
pub(crate) fn halt() -> ! {
    registers::wait_for_ever()
}

/// Any exception but an interrupt: this guest has no use for one.
extern "C" fn exception(syndrome: u64, pc: u64, address: u64) -> ! {
    use core::fmt::Write;
    let shared = Shared::get();
    let mut serial = crate::serial::Serial::new(shared.serial());
    let _ = writeln!(
        serial,
        "blackout-guest: exception: ESR {syndrome:#x}, PC {pc:#x}, FAR {address:#x}"
    );
    shared.set_state(state::FAILED, Failure::Exception as u64);
    halt()
}
