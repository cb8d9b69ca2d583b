//! A vCPU: how it is set up, where it starts, and its whole state.

use std::ffi::{CStr, CString};
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_bindings::{
    KVM_ARM_VCPU_POWER_OFF, KVM_ARM_VCPU_PSCI_0_2, KVM_REG_ARM_COPROC_MASK, KVM_REG_ARM_DEMUX,
    KVM_REG_ARM_FW_FEAT_BMAP, KVM_REG_ARM64_SYSREG,
};
use serde::{Deserialize, Serialize};

use super::registers::{PC, PSTATE, X0, sysreg};
use super::{Entry, Error};
use crate::devices::{DeviceState, StateError, bytes, decode, encode_with_room};
use crate::kvm::{self, REGISTER_MAX, Vcpu, VcpuEvents, Vm, register_size};

/// More bytes than what a state has besides its registers.
const REST: usize = 64;

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

/// The state of `vcpu`, `cpu/INDEX` in the stream. Which registers it has, and what is in those that
/// don't change, is found out here, so that a stop does not wait for it.
pub fn vcpu_state(_vm: &Vm, vcpu: Arc<Mutex<Vcpu>>) -> Result<Box<dyn DeviceState>, Error> {
    let locked = lock(&vcpu);
    let mut registers = Registers::new(locked.registers()?);
    registers.read(|_| true, |id, value| locked.register(id, value))?;
    let state = VcpuState {
        name: CString::new(format!("cpu/{}", locked.index())).unwrap_or_default(),
        registers,
        vcpu: Arc::clone(&vcpu),
    };
    Ok(Box::new(state))
}

struct VcpuState {
    name: CString,
    registers: Registers,
    vcpu: Arc<Mutex<Vcpu>>,
}

/// Everything that makes a vCPU what it is. The registers of the interrupt controller's CPU
/// interface are not here: KVM has them under the GIC.
#[derive(Debug, Serialize, Deserialize)]
struct State<'a> {
    mp_state: u32,
    serror_pending: bool,
    serror_has_esr: bool,
    serror_esr: u64,
    ext_dabt_pending: bool,
    /// Ids of the registers in KVM's own order, 8 bytes each, little-endian.
    #[serde(borrow, serialize_with = "bytes")]
    ids: &'a [u8],
    /// Their values, one after the other, each as long as its id says.
    #[serde(borrow, serialize_with = "bytes")]
    values: &'a [u8],
}

impl DeviceState for VcpuState {
    fn name(&self) -> &CStr {
        &self.name
    }

    fn version(&self) -> u32 {
        2
    }

    fn save(&mut self) -> Result<Vec<u8>, StateError> {
        let vcpu = lock(&self.vcpu);
        self.registers
            .read(changes, |id, value| vcpu.register(id, value))?;
        let exception = vcpu.events()?.exception;
        let Registers {
            encoded_ids,
            values,
            ..
        } = &self.registers;
        let state = State {
            mp_state: vcpu.mp_state()?,
            serror_pending: exception.serror_pending != 0,
            serror_has_esr: exception.serror_has_esr != 0,
            serror_esr: exception.serror_esr,
            ext_dabt_pending: exception.ext_dabt_pending != 0,
            ids: encoded_ids,
            values,
        };
        encode_with_room(&state, encoded_ids.len() + values.len() + REST)
    }

    /// Registers that this host's KVM does not have are refused. Those that only this host has
    /// keep their reset value, so that a guest can move to a newer kernel.
    fn load(&mut self, version: u32, state: &[u8]) -> Result<(), StateError> {
        let state: State = decode(self.version(), version, state)?;
        let vcpu = lock(&self.vcpu);
        for Loaded { id, value, place } in check(&state, &self.registers)? {
            let own = self.registers.values.get_mut(place).unwrap_or_default();
            if changes(id) || own != value {
                set_or_compare(&vcpu, id, value)?;
                own.copy_from_slice(value);
            }
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

/// The registers of a vCPU, and their values as they were read last.
struct Registers {
    /// What `KVM_GET_REG_LIST` said: the same for the life of the vCPU.
    ids: Vec<u64>,
    /// The same as [`State`] has them.
    encoded_ids: Vec<u8>,
    /// Where each is in `values`, sorted by id.
    places: Vec<(u64, Range<usize>)>,
    values: Vec<u8>,
}

impl Registers {
    fn new(ids: Vec<u64>) -> Self {
        let mut end = 0;
        let mut places = Vec::with_capacity(ids.len());
        for &id in &ids {
            let start = end;
            end += register_size(id);
            places.push((id, start..end));
        }
        places.sort_unstable_by_key(|(id, _)| *id);
        Registers {
            encoded_ids: ids.iter().flat_map(|id| id.to_le_bytes()).collect(),
            ids,
            places,
            values: vec![0; end],
        }
    }

    /// Reads those that are `wanted`.
    fn read(
        &mut self,
        wanted: impl Fn(u64) -> bool,
        get: impl Fn(u64, &mut [u8]) -> Result<(), kvm::Error>,
    ) -> Result<(), kvm::Error> {
        let mut rest = self.values.as_mut_slice();
        for &id in &self.ids {
            let (value, tail) = rest.split_at_mut(register_size(id));
            if wanted(id) {
                get(id, value)?;
            }
            rest = tail;
        }
        Ok(())
    }
}

/// Whether a register can change while the guest runs. The others, almost a third, say what the
/// vCPU is: the feature registers (`op0` 3, `op1` 0, `CRn` 0), the shapes of the caches, and which
/// hypercalls there are. A guest can't write them, and no monitor once the guest has run.
fn changes(id: u64) -> bool {
    match (id & KVM_REG_ARM_COPROC_MASK as u64) as u32 {
        KVM_REG_ARM64_SYSREG => id & 0xff80 != sysreg(3, 0, 0, 0, 0),
        KVM_REG_ARM_DEMUX | KVM_REG_ARM_FW_FEAT_BMAP => false,
        _ => true,
    }
}

/// A register of a state that came from outside.
#[derive(Debug, PartialEq, Eq)]
struct Loaded<'a> {
    id: u64,
    value: &'a [u8],
    /// Where it is in [`Registers::values`].
    place: Range<usize>,
}

/// The registers of a state that came from outside: all of them known, each at most once, and no
/// byte of their values missing or left over.
fn check<'a>(state: &State<'a>, known: &Registers) -> Result<Vec<Loaded<'a>>, StateError> {
    let invalid = |text| Err(StateError::Invalid(text));
    let mut seen = vec![false; known.places.len()];
    let mut rest = state.values;
    let (ids, odd) = state.ids.as_chunks();
    if !odd.is_empty() {
        return invalid("the list of registers is cut".into());
    }
    let mut loaded = Vec::with_capacity(seen.len());
    for &id in ids {
        let id = u64::from_le_bytes(id);
        let found = known.places.binary_search_by_key(&id, |(id, _)| *id);
        let found = found
            .ok()
            .and_then(|at| known.places.get(at).zip(seen.get_mut(at)));
        let Some(((_, place), seen)) = found else {
            return invalid(format!("register {id:#x} does not exist on this host"));
        };
        if std::mem::replace(seen, true) {
            return invalid(format!("register {id:#x} is there twice"));
        }
        let Some((value, tail)) = rest.split_at_checked(place.len()) else {
            return invalid(format!("register {id:#x} has no value"));
        };
        let place = place.clone();
        loaded.push(Loaded { id, value, place });
        rest = tail;
    }
    match rest.len() {
        0 => Ok(loaded),
        left => invalid(format!("{left} bytes belong to no register")),
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
    use crate::arch::imp::registers::{MPIDR_EL1, TIMER_CNT};

    const WORD: u64 = 0x6030_0000_0010_0000;
    const HALF: u64 = 0x6020_0000_0010_00d4;

    /// A state with these ids, and so many bytes of values: 0, 1, 2, …
    fn with_state<T>(ids: &[u64], values: usize, test: impl Fn(&State<'_>) -> T) -> T {
        let ids: Vec<u8> = ids.iter().flat_map(|id| id.to_le_bytes()).collect();
        let values: Vec<u8> = (0..values).map(|n| n as u8).collect();
        test(&State {
            mp_state: 0,
            serror_pending: false,
            serror_has_esr: false,
            serror_esr: 0,
            ext_dabt_pending: false,
            ids: &ids,
            values: &values,
        })
    }

    fn known() -> Registers {
        Registers::new(vec![WORD, HALF])
    }

    fn problem(ids: &[u64], values: usize) -> String {
        with_state(ids, values, |state| {
            check(state, &known()).unwrap_err().to_string()
        })
    }

    #[test]
    fn values_are_cut_as_the_ids_say() {
        with_state(&[HALF, WORD], 12, |state| {
            let half = Loaded {
                id: HALF,
                value: &[0, 1, 2, 3],
                place: 8..12,
            };
            let word = Loaded {
                id: WORD,
                value: &[4, 5, 6, 7, 8, 9, 10, 11],
                place: 0..8,
            };
            assert_eq!(check(state, &known()).unwrap(), [half, word]);
        });
    }

    #[test]
    fn only_what_is_wanted_is_read() {
        let mut registers = known();
        let fill = |_, value: &mut [u8]| {
            value.fill(1);
            Ok(())
        };
        registers.read(|id| id == HALF, fill).unwrap();
        assert_eq!(registers.values, [0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1]);
    }

    #[test]
    fn what_a_vcpu_is_does_not_change() {
        const CCSIDR: u64 = 0x6020_0000_0011_0000;
        const BITMAP: u64 = 0x6030_0000_0016_0000;
        const PSCI_VERSION: u64 = 0x6030_0000_0014_0000;
        const CSSELR_EL1: u64 = 0x6030_0000_0013_d000;
        const SCTLR_EL1: u64 = 0x6030_0000_0013_c080;
        const ID_AA64PFR0_EL1: u64 = 0x6030_0000_0013_c020;
        assert!(
            ![CCSIDR, BITMAP, MPIDR_EL1, ID_AA64PFR0_EL1]
                .into_iter()
                .any(changes)
        );
        let change = [WORD, PSCI_VERSION, CSSELR_EL1, SCTLR_EL1, TIMER_CNT];
        assert!(change.into_iter().all(changes));
    }

    #[test]
    fn a_register_may_be_missing_but_not_unknown_or_doubled() {
        with_state(&[WORD], 8, |state| {
            assert_eq!(check(state, &known()).unwrap().len(), 1);
        });
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
