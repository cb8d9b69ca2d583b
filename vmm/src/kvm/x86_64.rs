//! The ioctls that only x86-64 has.

use kvm_bindings::{
    CpuId, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE,
    KVM_MAX_CPUID_ENTRIES, KVM_PIT_SPEAKER_DUMMY, Msrs, Xsave, kvm_clock_data, kvm_cpuid_entry2,
    kvm_debugregs, kvm_irqchip, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_pit_config,
    kvm_pit_state2, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::Cap;

use super::irq::BoardRoute;
use super::{Error, Result, Vcpu, Vm};

/// 32-bit words of `struct kvm_xsave` before its flexible member.
const XSAVE_WORDS: usize = size_of::<kvm_xsave>() / size_of::<u32>();

/// Pins of the two PICs and of the I/O APIC.
const PIC_PINS: u32 = 16;
const IOAPIC_PINS: u32 = 24;

impl Vm {
    /// GSI n is pin n of the I/O APIC and, up to 15, of the PICs too, as KVM sets it up.
    pub(super) const BOARD_ROUTES: [BoardRoute; (PIC_PINS + IOAPIC_PINS) as usize] = {
        let mut routes = [(0, KVM_IRQCHIP_IOAPIC, 0); (PIC_PINS + IOAPIC_PINS) as usize];
        let mut pin = 0;
        while pin < IOAPIC_PINS {
            routes[pin as usize] = (pin, KVM_IRQCHIP_IOAPIC, pin);
            pin += 1;
        }
        let mut pin = 0;
        while pin < PIC_PINS {
            let chip = if pin < PIC_PINS / 2 {
                KVM_IRQCHIP_PIC_MASTER
            } else {
                KVM_IRQCHIP_PIC_SLAVE
            };
            routes[(IOAPIC_PINS + pin) as usize] = (pin, chip, pin % (PIC_PINS / 2));
            pin += 1;
        }
        routes
    };

    /// Creates the PICs, the I/O APIC and, with each vCPU from now on, a local APIC; and the PIT.
    /// `KVM_SET_TSS_ADDR` and `KVM_SET_IDENTITY_MAP_ADDR` first take the pages at `tss` (three)
    /// and `identity_map` (one), which Intel CPUs without unrestricted guests need for real mode;
    /// no RAM may be there.
    pub fn create_irqchip(&self, tss: u64, identity_map: u64) -> Result<()> {
        let tss = usize::try_from(tss).unwrap_or(usize::MAX);
        self.fd
            .set_identity_map_address(identity_map)
            .map_err(|e| Error::new("KVM_SET_IDENTITY_MAP_ADDR", "", e))?;
        self.fd
            .set_tss_address(tss)
            .map_err(|e| Error::new("KVM_SET_TSS_ADDR", "", e))?;
        self.fd
            .create_irq_chip()
            .map_err(|e| Error::new("KVM_CREATE_IRQCHIP", "", e))?;
        let pit = kvm_pit_config {
            flags: KVM_PIT_SPEAKER_DUMMY,
            ..Default::default()
        };
        self.fd
            .create_pit2(pit)
            .map_err(|e| Error::new("KVM_CREATE_PIT2", "", e))
    }

    /// `KVM_GET_IRQCHIP` of the chip `id`, a `KVM_IRQCHIP_*`.
    pub fn irqchip(&self, id: u32) -> Result<kvm_irqchip> {
        let mut chip = kvm_irqchip {
            chip_id: id,
            ..Default::default()
        };
        self.fd
            .get_irqchip(&mut chip)
            .map_err(|e| Error::new("KVM_GET_IRQCHIP", format!("chip {id}"), e))?;
        Ok(chip)
    }

    /// `KVM_SET_IRQCHIP`.
    pub fn set_irqchip(&self, chip: &kvm_irqchip) -> Result<()> {
        self.fd
            .set_irqchip(chip)
            .map_err(|e| Error::new("KVM_SET_IRQCHIP", format!("chip {}", chip.chip_id), e))
    }

    /// `KVM_GET_PIT2`.
    pub fn pit(&self) -> Result<kvm_pit_state2> {
        self.fd
            .get_pit2()
            .map_err(|e| Error::new("KVM_GET_PIT2", "", e))
    }

    /// `KVM_SET_PIT2`.
    pub fn set_pit(&self, pit: &kvm_pit_state2) -> Result<()> {
        self.fd
            .set_pit2(pit)
            .map_err(|e| Error::new("KVM_SET_PIT2", "", e))
    }

    /// `KVM_GET_CLOCK`: the guest's kvmclock, ns.
    pub fn clock(&self) -> Result<u64> {
        let clock = self.fd.get_clock();
        Ok(clock.map_err(|e| Error::new("KVM_GET_CLOCK", "", e))?.clock)
    }

    /// `KVM_SET_CLOCK`: kvmclock goes on from `clock` ns, whatever time has passed since it was
    /// read.
    pub fn set_clock(&self, clock: u64) -> Result<()> {
        let data = kvm_clock_data {
            clock,
            ..Default::default()
        };
        self.fd
            .set_clock(&data)
            .map_err(|e| Error::new("KVM_SET_CLOCK", format!("{clock} ns"), e))
    }

    /// `KVM_GET_SUPPORTED_CPUID`: what this host and its KVM can give a guest. The local APIC's
    /// deadline timer, which older kernels only report as a capability, is among it.
    pub fn supported_cpuid(&self) -> Result<Vec<kvm_cpuid_entry2>> {
        const ECX_TSC_DEADLINE: u32 = 1 << 24;
        let cpuid = self.kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES);
        let cpuid = cpuid.map_err(|e| Error::new("KVM_GET_SUPPORTED_CPUID", "", e))?;
        let mut entries = cpuid.as_slice().to_vec();
        if self.check_extension(Cap::TscDeadlineTimer) > 0 {
            for features in entries.iter_mut().filter(|entry| entry.function == 1) {
                features.ecx |= ECX_TSC_DEADLINE;
            }
        }
        Ok(entries)
    }

    /// `KVM_GET_MSR_INDEX_LIST`: the MSRs that make up a guest's state. A vCPU may lack some; see
    /// [`Vcpu::readable_msrs`].
    pub fn msr_indices(&self) -> Result<Vec<u32>> {
        let list = self.kvm.get_msr_index_list();
        let list = list.map_err(|e| Error::new("KVM_GET_MSR_INDEX_LIST", "", e))?;
        Ok(list.as_slice().to_vec())
    }

    /// How many 32-bit words a vCPU's XSAVE area has in this VM.
    pub fn xsave_words(&self) -> usize {
        let bytes = usize::try_from(self.fd.check_extension_int(Cap::Xsave2)).unwrap_or(0);
        bytes.div_ceil(size_of::<u32>()).max(XSAVE_WORDS)
    }
}

/// A pair of methods that read and write one struct of a vCPU's state.
macro_rules! state {
    ($($get:ident, $set:ident: $state:ty = $get_ioctl:literal $get_fd:ident, $set_ioctl:literal $set_fd:ident;)*) => {
        $(
            #[doc = concat!("`", $get_ioctl, "`.")]
            pub fn $get(&self) -> Result<$state> {
                self.fd.$get_fd().map_err(|e| self.error($get_ioctl, e))
            }

            #[doc = concat!("`", $set_ioctl, "`.")]
            pub fn $set(&self, state: &$state) -> Result<()> {
                self.fd.$set_fd(state).map_err(|e| self.error($set_ioctl, e))
            }
        )*
    };
}

impl Vm {
    /// `KVM_IRQ_LINE`: raises or lowers the line `gsi` of the PICs and the I/O APIC.
    pub fn set_irq_line(&self, gsi: u32, level: bool) -> Result<()> {
        self.fd
            .set_irq_line(gsi, level)
            .map_err(|e| Error::new("KVM_IRQ_LINE", format!("GSI {gsi}"), e))
    }
}

impl Vcpu {
    state! {
        regs, set_regs: kvm_regs = "KVM_GET_REGS" get_regs, "KVM_SET_REGS" set_regs;
        sregs, set_sregs: kvm_sregs = "KVM_GET_SREGS" get_sregs, "KVM_SET_SREGS" set_sregs;
        xcrs, set_xcrs: kvm_xcrs = "KVM_GET_XCRS" get_xcrs, "KVM_SET_XCRS" set_xcrs;
        lapic, set_lapic: kvm_lapic_state = "KVM_GET_LAPIC" get_lapic, "KVM_SET_LAPIC" set_lapic;
        debugregs, set_debugregs: kvm_debugregs =
            "KVM_GET_DEBUGREGS" get_debug_regs, "KVM_SET_DEBUGREGS" set_debug_regs;
        events, set_events: kvm_vcpu_events =
            "KVM_GET_VCPU_EVENTS" get_vcpu_events, "KVM_SET_VCPU_EVENTS" set_vcpu_events;
    }

    /// `KVM_GET_MP_STATE`. It takes a pending INIT or SIPI, so it comes before all other reads.
    pub fn mp_state(&self) -> Result<kvm_mp_state> {
        self.fd
            .get_mp_state()
            .map_err(|e| self.error("KVM_GET_MP_STATE", e))
    }

    /// `KVM_SET_MP_STATE`.
    pub fn set_mp_state(&self, state: kvm_mp_state) -> Result<()> {
        self.fd
            .set_mp_state(state)
            .map_err(|e| self.error("KVM_SET_MP_STATE", e))
    }

    /// `KVM_SET_CPUID2`. The vCPU has not run yet; KVM refuses a change after that.
    ///
    /// # Errors
    /// `E2BIG` for more than 256 entries.
    pub fn set_cpuid(&self, entries: &[kvm_cpuid_entry2]) -> Result<()> {
        let error = |e| self.error("KVM_SET_CPUID2", e);
        let cpuid = CpuId::from_entries(entries);
        let cpuid = cpuid.map_err(|_| error(kvm_ioctls::Error::new(libc::E2BIG)))?;
        self.fd.set_cpuid2(&cpuid).map_err(error)
    }

    /// `KVM_GET_CPUID2`: what [`Vcpu::set_cpuid`] set, as KVM keeps it.
    pub fn cpuid(&self) -> Result<Vec<kvm_cpuid_entry2>> {
        let cpuid = self.fd.get_cpuid2(KVM_MAX_CPUID_ENTRIES);
        let cpuid = cpuid.map_err(|e| self.error("KVM_GET_CPUID2", e))?;
        Ok(cpuid.as_slice().to_vec())
    }

    /// `KVM_GET_TSC_KHZ`; `None` where the host's TSC has no fixed frequency.
    pub fn tsc_khz(&self) -> Option<u32> {
        self.fd.get_tsc_khz().ok()
    }

    /// `KVM_SET_TSC_KHZ`: the guest's TSC counts at this frequency from now on.
    ///
    /// # Errors
    /// When it is not the host's and the CPU can't scale.
    pub fn set_tsc_khz(&self, khz: u32) -> Result<()> {
        self.fd
            .set_tsc_khz(khz)
            .map_err(|e| self.error("KVM_SET_TSC_KHZ", e))
    }

    /// Lets the TSC be `ns` further than it is. A host whose TSC has no fixed frequency leaves it.
    pub fn advance_tsc(&self, ns: u64) -> Result<()> {
        const MSR_TSC: u32 = 0x10;
        let Some(khz) = self.tsc_khz() else {
            return Ok(());
        };
        let ticks = u128::from(ns) * u128::from(khz) / 1_000_000;
        let msrs = self.msrs(&[MSR_TSC])?;
        let later = |&(index, tsc): &(u32, u64)| (index, tsc.wrapping_add(ticks as u64));
        self.set_msrs(&msrs.iter().map(later).collect::<Vec<_>>())
    }

    /// Those of `indices` that `KVM_GET_MSRS` can read on this vCPU, which has its CPUID. The
    /// index list is the host's; an MSR whose CPUID feature the vCPU lacks is refused.
    pub fn readable_msrs(&self, indices: &[u32]) -> Vec<u32> {
        let readable = |&index: &u32| {
            let entry = kvm_msr_entry {
                index,
                ..Default::default()
            };
            Msrs::from_entries(&[entry]).is_ok_and(|mut one| self.fd.get_msrs(&mut one) == Ok(1))
        };
        indices.iter().copied().filter(readable).collect()
    }

    /// `KVM_GET_MSRS` of all `indices` at once, as index and value.
    ///
    /// # Errors
    /// When one can't be read; it is named. `E2BIG` for more than 256.
    pub fn msrs(&self, indices: &[u32]) -> Result<Vec<(u32, u64)>> {
        let values = indices.iter().map(|&index| (index, 0));
        let mut msrs = self.msr_batch("KVM_GET_MSRS", values)?;
        let read = self.fd.get_msrs(&mut msrs);
        let read = read.map_err(|e| self.error("KVM_GET_MSRS", e))?;
        self.all_msrs_done("KVM_GET_MSRS", indices.get(read).copied())?;
        let value = |entry: &kvm_msr_entry| (entry.index, entry.data);
        Ok(msrs.as_slice().iter().map(value).collect())
    }

    /// `KVM_SET_MSRS` of all of them at once, in this order.
    ///
    /// # Errors
    /// When KVM refuses a value; its MSR is named. `E2BIG` for more than 256.
    pub fn set_msrs(&self, msrs: &[(u32, u64)]) -> Result<()> {
        let batch = self.msr_batch("KVM_SET_MSRS", msrs.iter().copied())?;
        let set = self.fd.set_msrs(&batch);
        let set = set.map_err(|e| self.error("KVM_SET_MSRS", e))?;
        self.all_msrs_done("KVM_SET_MSRS", msrs.get(set).map(|&(index, _)| index))
    }

    fn msr_batch(
        &self,
        ioctl: &'static str,
        values: impl Iterator<Item = (u32, u64)>,
    ) -> Result<Msrs> {
        let entry = |(index, data)| kvm_msr_entry {
            index,
            data,
            reserved: 0,
        };
        let entries: Vec<_> = values.map(entry).collect();
        Msrs::from_entries(&entries)
            .map_err(|_| self.error(ioctl, kvm_ioctls::Error::new(libc::E2BIG)))
    }

    /// The ioctl returns how many MSRs it did; `stopped_at` is the one after those.
    fn all_msrs_done(&self, ioctl: &'static str, stopped_at: Option<u32>) -> Result<()> {
        let Some(index) = stopped_at else {
            return Ok(());
        };
        let subject = format!("vCPU {} MSR {index:#x}", self.index());
        Err(Error::new(
            ioctl,
            subject,
            kvm_ioctls::Error::new(libc::EINVAL),
        ))
    }

    /// The FPU and every other XSAVE component, in as many 32-bit words as
    /// [`Vm::xsave_words`] says: `KVM_GET_XSAVE2`, or `KVM_GET_XSAVE` where there is nothing that
    /// only the newer call can hold.
    pub fn xsave(&self, words: usize) -> Result<Vec<u32>> {
        if words <= XSAVE_WORDS {
            let xsave = self.fd.get_xsave();
            let xsave = xsave.map_err(|e| self.error("KVM_GET_XSAVE", e))?;
            return Ok(xsave.region.to_vec());
        }
        let mut xsave = self.xsave_buffer("KVM_GET_XSAVE2", words)?;
        // SAFETY: the buffer has the size that KVM_CAP_XSAVE2 gave, which is what KVM writes.
        unsafe { self.fd.get_xsave2(&mut xsave) }.map_err(|e| self.error("KVM_GET_XSAVE2", e))?;
        let mut all = xsave.as_fam_struct_ref().xsave.region.to_vec();
        all.extend_from_slice(xsave.as_slice());
        Ok(all)
    }

    /// `KVM_SET_XSAVE`. `area` may be shorter than `words`, what [`Vm::xsave_words`] says of this
    /// VM: the rest is then zero.
    ///
    /// # Errors
    /// `E2BIG` when it is longer; `EINVAL` when it has components that the host lacks.
    pub fn set_xsave(&self, area: &[u32], words: usize) -> Result<()> {
        if area.len() > words.max(XSAVE_WORDS) {
            return Err(self.error("KVM_SET_XSAVE", kvm_ioctls::Error::new(libc::E2BIG)));
        }
        let mut xsave = self.xsave_buffer("KVM_SET_XSAVE", words)?;
        let (region, extra) = area.split_at(area.len().min(XSAVE_WORDS));
        xsave.as_mut_slice()[..extra.len()].copy_from_slice(extra);
        // SAFETY: only the fixed region is written; the length of the flexible member stays.
        let header = unsafe { xsave.as_mut_fam_struct() };
        header.xsave.region[..region.len()].copy_from_slice(region);
        // SAFETY: the buffer has the size that KVM_CAP_XSAVE2 gave, which is what KVM reads.
        unsafe { self.fd.set_xsave2(&xsave) }.map_err(|e| self.error("KVM_SET_XSAVE", e))
    }

    fn xsave_buffer(&self, ioctl: &'static str, words: usize) -> Result<Xsave> {
        Xsave::new(words.saturating_sub(XSAVE_WORDS))
            .map_err(|_| self.error(ioctl, kvm_ioctls::Error::new(libc::ENOMEM)))
    }

    /// `KVM_KVMCLOCK_CTRL`: tells the guest that it was stopped, so that its watchdog does not
    /// take the gap for a hang. A guest that has no kvmclock of its own is not told.
    pub fn kvmclock_ctrl(&self) -> Result<()> {
        match self.fd.kvmclock_ctrl() {
            Err(e) if e.errno() == libc::EINVAL => Ok(()),
            result => result.map_err(|e| self.error("KVM_KVMCLOCK_CTRL", e)),
        }
    }
}
