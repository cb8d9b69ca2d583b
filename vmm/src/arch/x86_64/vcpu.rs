//! A vCPU's CPUID and its whole state.
//!
//! The order of the ioctls matters, and not all of it is documented. What is known:
//! - `KVM_GET_MP_STATE` takes pending INITs and SIPIs, which changes registers: it is read first.
//!   The getters may move pending events about, so `KVM_GET_VCPU_EVENTS` is read last.
//! - CPUID says which MSRs and XSAVE components there are: it is set first.
//! - `apic_base` is in the sregs, and decides what the local APIC's registers mean: sregs, then LAPIC.
//! - The deadline MSR only arms a timer that the LAPIC has in deadline mode, and counts in the
//!   guest's TSC: LAPIC, then MSRs, with the TSC first and the deadline last.
//! - Setting sregs or registers drops pending exceptions: events are set last.
//!
//! (`arch/x86/kvm/x86.c`, Linux 6.12; QEMU's `kvm_arch_put_registers`.)

use std::ffi::{CStr, CString};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_bindings::{
    kvm_cpuid_entry2, kvm_debugregs, kvm_lapic_state, kvm_mp_state, kvm_regs, kvm_sregs,
    kvm_vcpu_events, kvm_xcrs,
};
use serde::{Deserialize, Serialize};

use super::{Error, cpuid};
use crate::devices::{DeviceState, StateError, decode, encode};
use crate::kvm::{Vcpu, Vm};

const MSR_TSC: u32 = 0x10;
const MSR_TSC_DEADLINE: u32 = 0x6e0;

/// Gives a new vCPU its CPUID. Its registers are what KVM resets a CPU to: only the first one is
/// runnable, the others wait for INIT and SIPI.
pub fn init_vcpu(vm: &Vm, vcpu: &mut Vcpu, vcpus: u32) -> Result<(), Error> {
    let index = u32::try_from(vcpu.index()).unwrap_or(u32::MAX);
    vcpu.set_cpuid(&cpuid::for_vcpu(&vm.supported_cpuid()?, index, vcpus))?;
    Ok(())
}

/// The state of `vcpu` as something that migrates. What the host can save is found out here, so
/// that a stop does not wait for it.
pub fn vcpu_state(vm: &Vm, vcpu: Arc<Mutex<Vcpu>>) -> Result<Box<dyn DeviceState>, Error> {
    let msr_indices = vm.msr_indices()?;
    let locked = lock(&vcpu);
    let state = VcpuState {
        name: CString::new(format!("cpu/{}", locked.index())).unwrap_or_default(),
        supported_cpuid: vm.supported_cpuid()?,
        cpuid: locked.cpuid()?,
        msrs: locked.readable_msrs(&msr_indices),
        tsc_khz: locked.tsc_khz(),
        xsave_words: vm.xsave_words(),
        vcpu: Arc::clone(&vcpu),
    };
    Ok(Box::new(state))
}

struct VcpuState {
    name: CString,
    vcpu: Arc<Mutex<Vcpu>>,
    /// What the host can give a guest.
    supported_cpuid: Vec<kvm_cpuid_entry2>,
    /// What the vCPU has.
    cpuid: Vec<kvm_cpuid_entry2>,
    /// The MSRs that the vCPU has.
    msrs: Vec<u32>,
    /// `None` where the host's TSC has no fixed frequency.
    tsc_khz: Option<u32>,
    xsave_words: usize,
}

const STATE_VERSION: u32 = 1;

#[derive(Serialize, Deserialize)]
struct Saved {
    cpuid: Vec<kvm_cpuid_entry2>,
    tsc_khz: Option<u32>,
    mp_state: kvm_mp_state,
    regs: kvm_regs,
    sregs: kvm_sregs,
    xsave: Vec<u32>,
    xcrs: kvm_xcrs,
    debugregs: kvm_debugregs,
    lapic: kvm_lapic_state,
    /// Index and value.
    msrs: Vec<(u32, u64)>,
    events: kvm_vcpu_events,
}

impl DeviceState for VcpuState {
    fn name(&self) -> &CStr {
        &self.name
    }

    fn version(&self) -> u32 {
        STATE_VERSION
    }

    fn save(&mut self) -> Result<Vec<u8>, StateError> {
        let vcpu = lock(&self.vcpu);
        encode(&Saved {
            cpuid: self.cpuid.clone(),
            tsc_khz: self.tsc_khz,
            mp_state: vcpu.mp_state()?,
            regs: vcpu.regs()?,
            sregs: vcpu.sregs()?,
            xsave: vcpu.xsave(self.xsave_words)?,
            xcrs: vcpu.xcrs()?,
            debugregs: vcpu.debugregs()?,
            lapic: vcpu.lapic()?,
            msrs: vcpu.msrs(&self.msrs)?,
            events: vcpu.events()?,
        })
    }

    fn load(&mut self, version: u32, state: &[u8]) -> Result<(), StateError> {
        let saved: Saved = decode(STATE_VERSION, version, state)?;
        let msrs = msrs_to_set(saved.msrs, &self.msrs)?;
        let vcpu = lock(&self.vcpu);
        if saved.cpuid != self.cpuid {
            cpuid::check(&saved.cpuid, &self.supported_cpuid)
                .map_err(|missing| StateError::Invalid(missing.to_string()))?;
            vcpu.set_cpuid(&saved.cpuid)?;
        }
        if let Some(khz) = saved.tsc_khz.filter(|_| saved.tsc_khz != self.tsc_khz) {
            vcpu.set_tsc_khz(khz)?;
        }
        vcpu.set_mp_state(saved.mp_state)?;
        vcpu.set_regs(&saved.regs)?;
        vcpu.set_sregs(&saved.sregs)?;
        vcpu.set_xsave(&saved.xsave, self.xsave_words)?;
        vcpu.set_xcrs(&saved.xcrs)?;
        vcpu.set_debugregs(&saved.debugregs)?;
        vcpu.set_lapic(&saved.lapic)?;
        vcpu.set_msrs(&msrs)?;
        Ok(vcpu.set_events(&saved.events)?)
    }
}

fn lock(vcpu: &Mutex<Vcpu>) -> MutexGuard<'_, Vcpu> {
    vcpu.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The MSRs of a saved state that are to be set, in the order in which they must be. One that this
/// host lacks is left out when it is 0: the guest has not used it.
fn msrs_to_set(saved: Vec<(u32, u64)>, here: &[u32]) -> Result<Vec<(u32, u64)>, StateError> {
    let mut msrs = saved;
    if let Some((index, value)) = msrs
        .iter()
        .find(|(index, value)| *value != 0 && !here.contains(index))
    {
        let problem = format!("the guest uses MSR {index:#x} ({value:#x}), which this host lacks");
        return Err(StateError::Invalid(problem));
    }
    msrs.retain(|(index, _)| here.contains(index));
    msrs.sort_by_key(|&(index, _)| match index {
        MSR_TSC => 0,
        MSR_TSC_DEADLINE => 2,
        _ => 1,
    });
    Ok(msrs)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_deadline_is_set_after_the_tsc_that_it_counts_in() {
        let saved = vec![(MSR_TSC_DEADLINE, 5), (0x174, 1), (MSR_TSC, 3), (0x175, 2)];
        let here = [0x174, 0x175, MSR_TSC_DEADLINE, MSR_TSC];
        let set = msrs_to_set(saved, &here).unwrap();
        assert_eq!(
            set,
            [(MSR_TSC, 3), (0x174, 1), (0x175, 2), (MSR_TSC_DEADLINE, 5)]
        );
    }

    #[test]
    fn an_msr_that_the_host_lacks_stops_only_a_guest_that_uses_it() {
        assert_eq!(msrs_to_set(vec![(0x999, 0)], &[MSR_TSC]).unwrap(), []);
        let error = msrs_to_set(vec![(0x999, 7)], &[MSR_TSC]).unwrap_err();
        assert!(error.to_string().contains("0x999"), "{error}");
    }
}
