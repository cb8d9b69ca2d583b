//! `/dev/kvm` and the VM's file descriptor.

use kvm_bindings::{
    KVM_CREATE_DEVICE_TEST, KVM_MEM_LOG_DIRTY_PAGES, kvm_create_device, kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, Kvm, VmFd};

use super::{Device, Error, Result, Vcpu};

/// A capability, as `KVM_CHECK_EXTENSION` knows it.
pub use kvm_ioctls::Cap as Capability;

/// One memory slot: guest-physical memory backed by a mapping of this process.
#[derive(Clone, Copy, Debug)]
pub struct Slot {
    /// The slot's number.
    pub id: u32,
    /// Guest-physical address.
    pub gpa: u64,
    /// Bytes; a multiple of the page size.
    pub size: u64,
    /// Address of the mapping in this process.
    pub hva: u64,
}

/// A virtual machine.
#[derive(Debug)]
pub struct Vm {
    pub(super) kvm: Kvm,
    pub(super) fd: VmFd,
}

impl Vm {
    /// Opens `/dev/kvm` and creates a VM of the default type.
    ///
    /// # Errors
    /// `ENOENT` or `EACCES` when `/dev/kvm` can't be opened.
    pub fn new() -> Result<Self> {
        let kvm = Kvm::new().map_err(|e| Error::new("open", "/dev/kvm", e))?;
        let fd = kvm
            .create_vm()
            .map_err(|e| Error::new("KVM_CREATE_VM", "", e))?;
        Ok(Vm { kvm, fd })
    }

    /// `KVM_CHECK_EXTENSION`: 0 when the kernel does not have `cap`, else a number that the
    /// capability defines.
    pub fn check_extension(&self, cap: Cap) -> i32 {
        self.fd.check_extension_int(cap)
    }

    /// `KVM_SET_USER_MEMORY_REGION` for `slot`, with the dirty log on or off. Calling it again for
    /// a slot that exists only switches the log.
    ///
    /// # Safety
    /// `slot.hva` must start a mapping of `slot.size` bytes that outlives the VM and that no Rust
    /// reference other than through volatile or atomic accesses looks at while a vCPU runs.
    pub unsafe fn set_memory_slot(&self, slot: &Slot, log_dirty: bool) -> Result<()> {
        let region = kvm_userspace_memory_region {
            slot: slot.id,
            flags: if log_dirty {
                KVM_MEM_LOG_DIRTY_PAGES
            } else {
                0
            },
            guest_phys_addr: slot.gpa,
            memory_size: slot.size,
            userspace_addr: slot.hva,
        };
        // SAFETY: the caller vouches for the mapping's size and lifetime.
        unsafe { self.fd.set_user_memory_region(region) }
            .map_err(|e| Error::new("KVM_SET_USER_MEMORY_REGION", format!("slot {}", slot.id), e))
    }

    /// `KVM_GET_DIRTY_LOG`: one bit a page of `slot`, set when the page was written since the last
    /// call; the kernel's log is clear afterwards.
    pub fn dirty_log(&self, slot: &Slot) -> Result<Vec<u64>> {
        let size = usize::try_from(slot.size).unwrap_or(usize::MAX);
        self.fd
            .get_dirty_log(slot.id, size)
            .map_err(|e| Error::new("KVM_GET_DIRTY_LOG", format!("slot {}", slot.id), e))
    }

    /// `KVM_CREATE_VCPU`. On x86-64 the in-kernel interrupt controller must exist already.
    pub fn create_vcpu(&self, index: u64) -> Result<Vcpu> {
        let fd = self
            .fd
            .create_vcpu(index)
            .map_err(|e| Error::new("KVM_CREATE_VCPU", format!("vCPU {index}"), e))?;
        Ok(Vcpu::new(fd, index))
    }

    /// `KVM_CAP_MAX_VCPUS`: how many vCPUs a VM can have here.
    pub fn max_vcpus(&self) -> u32 {
        self.kvm.get_max_vcpus().try_into().unwrap_or(u32::MAX)
    }

    /// Whether `KVM_CREATE_DEVICE` knows the kind `kind`; none is made.
    pub fn has_device(&self, kind: u32) -> bool {
        let mut request = kvm_create_device {
            type_: kind,
            fd: 0,
            flags: KVM_CREATE_DEVICE_TEST,
        };
        self.fd.create_device(&mut request).is_ok()
    }

    /// `KVM_CREATE_DEVICE` of the kind `kind`, a `KVM_DEV_TYPE_*`; `name` stands in errors.
    pub fn create_device(&self, kind: u32, name: &'static str) -> Result<Device> {
        let mut request = kvm_create_device {
            type_: kind,
            fd: 0,
            flags: 0,
        };
        let fd = self
            .fd
            .create_device(&mut request)
            .map_err(|e| Error::new("KVM_CREATE_DEVICE", name, e))?;
        Ok(Device::new(fd, name))
    }
}
