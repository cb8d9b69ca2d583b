//! A vCPU: how it is set up, where it starts, and its whole state.

use std::ffi::{CStr, CString};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_bindings::{KVM_ARM_VCPU_POWER_OFF, KVM_ARM_VCPU_PSCI_0_2};
use serde::{Deserialize, Serialize};

use super::registers::{PC, PSTATE, X0};
use super::{Entry, Error};
use crate::devices::{DeviceState, StateError, decode, encode};
use crate::kvm::{REGISTER_MAX, Vcpu, VcpuEvents, Vm, register_size};

/// `PSTATE` at the entry: EL1 on its own stack, all interrupts masked.
const EL1H_MASKED: u64 = 0x3c5;

/// Gives a vCPU its model and features: the host's own, with PSCI. All but the first are off until
/// the guest switches them on.
pub fn init_vcpu(vm: &Vm, vcpu: &mut Vcpu, _vcpus: u32) -> Result<(), Error> {
    let mut init = vm.preferred_target()?;
    init.features[0] |= 1 << KVM_ARM_VCPU_PSCI_0_2;
    if vcpu.index() > 0 {
        init.features[0] |= 1 << KVM_ARM_VCPU_POWER_OFF;
    }
    Ok(vcpu.init(&init)?)
}

/// Puts the first vCPU at `entry`.
pub fn set_entry(vcpu: &mut Vcpu, entry: &Entry) -> Result<(), Error> {
    vcpu.set_register64(PSTATE, EL1H_MASKED)?;
    vcpu.set_register64(PC, entry.pc)?;
    Ok(vcpu.set_register64(X0, entry.x0)?)
}

/// The state of `vcpu`, `cpu/INDEX` in the stream. Which registers it has is found out here, so
/// that a stop does not wait for it.
pub fn vcpu_state(_vm: &Vm, vcpu: Arc<Mutex<Vcpu>>) -> Result<Box<dyn DeviceState>, Error> {
    let locked = lock(&vcpu);
    let state = VcpuState {
        name: CString::new(format!("cpu/{}", locked.index())).unwrap_or_default(),
        registers: locked.registers()?,
        vcpu: Arc::clone(&vcpu),
    };
    Ok(Box::new(state))
}

struct VcpuState {
    name: CString,
    /// What `KVM_GET_REG_LIST` said: the same for the life of the vCPU.
    registers: Vec<u64>,
    vcpu: Arc<Mutex<Vcpu>>,
}

/// Everything that makes a vCPU what it is. The registers of the interrupt controller's CPU
/// interface are not here: KVM has them under the GIC.
#[derive(Debug, Serialize, Deserialize)]
struct State {
    mp_state: u32,
    serror_pending: bool,
    serror_has_esr: bool,
    serror_esr: u64,
    ext_dabt_pending: bool,
    /// Ids of the registers, in KVM's own order.
    ids: Vec<u64>,
    /// Their values, one after the other, each as long as its id says.
    values: Vec<u8>,
}

impl DeviceState for VcpuState {
    fn name(&self) -> &CStr {
        &self.name
    }

    fn version(&self) -> u32 {
        1
    }

    fn save(&mut self) -> Result<Vec<u8>, StateError> {
        let vcpu = lock(&self.vcpu);
        let ids = self.registers.as_slice();
        let mut values = vec![0; ids.iter().map(|&id| register_size(id)).sum()];
        let mut rest = values.as_mut_slice();
        for &id in ids {
            let (value, tail) = rest.split_at_mut(register_size(id));
            vcpu.register(id, value)?;
            rest = tail;
        }
        let exception = vcpu.events()?.exception;
        encode(&State {
            mp_state: vcpu.mp_state()?,
            serror_pending: exception.serror_pending != 0,
            serror_has_esr: exception.serror_has_esr != 0,
            serror_esr: exception.serror_esr,
            ext_dabt_pending: exception.ext_dabt_pending != 0,
            ids: ids.to_vec(),
            values,
        })
    }

    /// Registers that this host's KVM does not have are refused. Those that only this host has
    /// keep their reset value, so that a guest can move to a newer kernel.
    fn load(&mut self, version: u32, state: &[u8]) -> Result<(), StateError> {
        let state: State = decode(self.version(), version, state)?;
        let vcpu = lock(&self.vcpu);
        for (id, value) in check(&state, &self.registers)? {
            set_or_compare(&vcpu, id, value)?;
        }
        vcpu.set_mp_state(state.mp_state)?;
        let mut events = VcpuEvents::default();
        events.exception.serror_pending = state.serror_pending.into();
        events.exception.serror_has_esr = state.serror_has_esr.into();
        events.exception.serror_esr = state.serror_esr;
        events.exception.ext_dabt_pending = state.ext_dabt_pending.into();
        Ok(vcpu.set_events(&events)?)
    }
}

fn lock(vcpu: &Mutex<Vcpu>) -> MutexGuard<'_, Vcpu> {
    vcpu.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The registers of a state that came from outside, each with its value: all of them known, each
/// at most once, and no byte of their values missing or left over.
fn check<'a>(state: &'a State, known: &[u64]) -> Result<Vec<(u64, &'a [u8])>, StateError> {
    let mut missing: Vec<u64> = known.to_vec();
    missing.sort_unstable();
    let mut seen = vec![false; missing.len()];
    let mut rest = state.values.as_slice();
    let mut registers = Vec::with_capacity(missing.len());
    for &id in &state.ids {
        let place = missing.binary_search(&id);
        let seen = place.ok().and_then(|place| seen.get_mut(place));
        let Some(seen) = seen else {
            let text = format!("register {id:#x} does not exist on this host");
            return Err(StateError::Invalid(text));
        };
        if std::mem::replace(seen, true) {
            return Err(StateError::Invalid(format!(
                "register {id:#x} is there twice"
            )));
        }
        let Some((value, tail)) = rest.split_at_checked(register_size(id)) else {
            return Err(StateError::Invalid(format!(
                "register {id:#x} has no value"
            )));
        };
        registers.push((id, value));
        rest = tail;
    }
    match rest.len() {
        0 => Ok(registers),
        left => Err(StateError::Invalid(format!(
            "{left} bytes belong to no register"
        ))),
    }
}

/// Sets a register. Some can't be set, since they say what the host is: those must have the value
/// already.
fn set_or_compare(vcpu: &Vcpu, id: u64, value: &[u8]) -> Result<(), StateError> {
    let Err(refused) = vcpu.set_register(id, value) else {
        return Ok(());
    };
    let mut own = [0; REGISTER_MAX];
    vcpu.register(id, &mut own)?;
    if own.starts_with(value) {
        return Ok(());
    }
    tracing::error!(
        "register {id:#x} is {} on the source and {} on this host, which can't change it",
        hex(value),
        hex(own.get(..value.len()).unwrap_or_default()),
    );
    Err(refused.into())
}

/// A register's value as a number, whatever its width.
fn hex(little_endian: &[u8]) -> String {
    let digits = little_endian.iter().rev().map(|byte| format!("{byte:02x}"));
    digits.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const WORD: u64 = 0x6030_0000_0010_0000;
    const HALF: u64 = 0x6020_0000_0010_00d4;

    fn state(ids: &[u64], values: usize) -> State {
        State {
            mp_state: 0,
            serror_pending: false,
            serror_has_esr: false,
            serror_esr: 0,
            ext_dabt_pending: false,
            ids: ids.to_vec(),
            values: (0..values).map(|n| n as u8).collect(),
        }
    }

    fn problem(ids: &[u64], values: usize) -> String {
        let state = state(ids, values);
        check(&state, &[WORD, HALF]).unwrap_err().to_string()
    }

    #[test]
    fn values_are_cut_as_the_ids_say() {
        let state = state(&[HALF, WORD], 12);
        let registers = check(&state, &[WORD, HALF]).unwrap();
        let bytes = state.values.as_slice();
        assert_eq!(registers, [(HALF, &bytes[..4]), (WORD, &bytes[4..])]);
    }

    #[test]
    fn a_register_may_be_missing_but_not_unknown_or_doubled() {
        assert_eq!(check(&state(&[WORD], 8), &[WORD, HALF]).unwrap().len(), 1);
        assert!(problem(&[WORD + 1], 8).contains("does not exist"));
        assert!(problem(&[HALF, HALF], 8).contains("twice"));
    }

    #[test]
    fn no_byte_is_missing_or_left_over() {
        assert!(problem(&[HALF, WORD], 11).contains("has no value"));
        assert!(problem(&[HALF], 5).contains("1 bytes belong to no register"));
    }

    #[test]
    fn a_value_is_shown_as_a_number() {
        assert_eq!(hex(&[0x21, 0x43]), "4321");
    }
}
