//! The ioctls that only arm64 has.

use kvm_bindings::{
    KVM_ARM_IRQ_TYPE_SHIFT, KVM_ARM_IRQ_TYPE_SPI, KVM_REG_SIZE_MASK, KVM_REG_SIZE_SHIFT, RegList,
    kvm_mp_state,
};

use super::irq::BoardRoute;
use super::{Error, Result, Vcpu, Vm};

pub use kvm_bindings::{kvm_vcpu_events as VcpuEvents, kvm_vcpu_init as VcpuInit};

/// The longest list that `kvm-bindings` makes room for; without SVE a vCPU has fewer registers.
const REGISTERS_MAX: usize = 500;

/// Bytes of the register `id`, as the id itself says. None is longer than [`REGISTER_MAX`].
pub fn register_size(id: u64) -> usize {
    1 << ((id & KVM_REG_SIZE_MASK) >> KVM_REG_SIZE_SHIFT).min(8)
}

/// Hz of the virtual counter: the host's, which the guest has, too.
pub fn counter_frequency() -> u64 {
    let frequency: u64;
    // SAFETY: the register can be read at EL0 on Linux, and reading it has no effect.
    unsafe {
        std::arch::asm!("mrs {}, cntfrq_el0", out(reg) frequency, options(nomem, nostack, preserves_flags));
    }
    frequency
}

/// Bytes of the longest register that an id can name: 2048 bits.
pub const REGISTER_MAX: usize = 256;

/// Shared interrupts that KVM gives GSIs of their own numbers: those of the smallest GIC.
const SHARED: usize = 32;

impl Vm {
    /// GSI n is pin n of the GIC's shared interrupts, as KVM sets it up.
    pub(super) const BOARD_ROUTES: [BoardRoute; SHARED] = {
        let mut routes = [(0, 0, 0); SHARED];
        let mut pin = 0;
        while pin < SHARED {
            routes[pin] = (pin as u32, 0, pin as u32);
            pin += 1;
        }
        routes
    };

    /// `KVM_ARM_PREFERRED_TARGET`: the vCPU model of this host, with no feature switched on.
    pub fn preferred_target(&self) -> Result<VcpuInit> {
        let mut init = VcpuInit::default();
        self.fd
            .get_preferred_target(&mut init)
            .map_err(|e| Error::new("KVM_ARM_PREFERRED_TARGET", "", e))?;
        Ok(init)
    }
}

impl Vm {
    /// `KVM_IRQ_LINE`: raises or lowers the line of the shared interrupt `spi`, counted from 0. The
    /// GIC must be initialised.
    pub fn set_spi(&self, spi: u32, level: bool) -> Result<()> {
        // The field has the interrupt's number as the GIC counts, private ones included.
        let irq = KVM_ARM_IRQ_TYPE_SPI << KVM_ARM_IRQ_TYPE_SHIFT | (spi + 32);
        self.fd
            .set_irq_line(irq, level)
            .map_err(|e| Error::new("KVM_IRQ_LINE", format!("SPI {spi}"), e))
    }
}

impl Vcpu {
    /// `KVM_ARM_VCPU_INIT`: chooses model and features, and resets the vCPU.
    pub fn init(&mut self, init: &VcpuInit) -> Result<()> {
        self.fd
            .vcpu_init(init)
            .map_err(|e| self.error("KVM_ARM_VCPU_INIT", e))
    }

    /// `KVM_GET_REG_LIST`: the ids of all registers that make up this vCPU's state. Fixed once the
    /// vCPU is initialised.
    pub fn registers(&self) -> Result<Vec<u64>> {
        let error = |errno| self.error("KVM_GET_REG_LIST", kvm_ioctls::Error::new(errno));
        let mut list = RegList::new(REGISTERS_MAX).map_err(|_| error(libc::ENOMEM))?;
        self.fd
            .get_reg_list(&mut list)
            .map_err(|e| error(e.errno()))?;
        Ok(list.as_slice().to_vec())
    }

    /// `KVM_GET_ONE_REG`: reads the register `id` into the first [`register_size`] bytes of `value`.
    pub fn register(&self, id: u64, value: &mut [u8]) -> Result<()> {
        self.fd
            .get_one_reg(id, value)
            .map(drop)
            .map_err(|e| self.register_error("KVM_GET_ONE_REG", id, e))
    }

    /// `KVM_SET_ONE_REG` with the first [`register_size`] bytes of `value`.
    pub fn set_register(&self, id: u64, value: &[u8]) -> Result<()> {
        self.fd
            .set_one_reg(id, value)
            .map(drop)
            .map_err(|e| self.register_error("KVM_SET_ONE_REG", id, e))
    }

    /// [`Vcpu::register`] of 64 bits.
    pub fn register64(&self, id: u64) -> Result<u64> {
        let mut value = [0; 8];
        self.register(id, &mut value)?;
        Ok(u64::from_ne_bytes(value))
    }

    /// [`Vcpu::set_register`] of 64 bits.
    pub fn set_register64(&self, id: u64, value: u64) -> Result<()> {
        self.set_register(id, &value.to_ne_bytes())
    }

    /// `KVM_GET_MP_STATE`: whether PSCI has the vCPU on.
    pub fn mp_state(&self) -> Result<u32> {
        let state = self.fd.get_mp_state();
        Ok(state
            .map_err(|e| self.error("KVM_GET_MP_STATE", e))?
            .mp_state)
    }

    /// `KVM_SET_MP_STATE`.
    pub fn set_mp_state(&self, mp_state: u32) -> Result<()> {
        self.fd
            .set_mp_state(kvm_mp_state { mp_state })
            .map_err(|e| self.error("KVM_SET_MP_STATE", e))
    }

    /// `KVM_GET_VCPU_EVENTS`: exceptions that wait to be taken.
    pub fn events(&self) -> Result<VcpuEvents> {
        self.fd
            .get_vcpu_events()
            .map_err(|e| self.error("KVM_GET_VCPU_EVENTS", e))
    }

    /// `KVM_SET_VCPU_EVENTS`.
    pub fn set_events(&self, events: &VcpuEvents) -> Result<()> {
        self.fd
            .set_vcpu_events(events)
            .map_err(|e| self.error("KVM_SET_VCPU_EVENTS", e))
    }

    fn register_error(&self, ioctl: &'static str, id: u64, errno: kvm_ioctls::Error) -> Error {
        Error::new(
            ioctl,
            format!("vCPU {} register {id:#x}", self.index()),
            errno,
        )
    }
}
