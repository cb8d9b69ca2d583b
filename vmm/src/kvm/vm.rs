//! `/dev/kvm` and the VM's file descriptor.

use std::ffi::c_void;
use std::sync::Arc;

use kvm_bindings::{
    KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_CREATE_DEVICE_TEST, KVM_DIRTY_LOG_INITIALLY_SET,
    KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE, KVM_MEM_LOG_DIRTY_PAGES, KVMIO, kvm_clear_dirty_log,
    kvm_clear_dirty_log__bindgen_ty_1, kvm_create_device, kvm_enable_cap,
    kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, Kvm, VmFd};
use vmm_sys_util::errno;
use vmm_sys_util::ioctl::ioctl_with_ref;
use vmm_sys_util::ioctl_iowr_nr;

use super::{Device, DirtyRings, Error, Result, Vcpu, dirty_ring};

/// A capability, as `KVM_CHECK_EXTENSION` knows it.
pub use kvm_ioctls::Cap as Capability;

// Documentation/virt/kvm/api.rst, 4.117. kvm-ioctls does not have it.
ioctl_iowr_nr!(KVM_CLEAR_DIRTY_LOG, KVMIO, 0xc0, kvm_clear_dirty_log);

/// Bytes of the pages that a dirty log has bits for, on both architectures.
pub(super) const LOGGED_PAGE: u64 = 4096;

/// What a dirty log is to be: protected by hand, and at first with every page set.
const BY_HAND: u32 = KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | KVM_DIRTY_LOG_INITIALLY_SET;

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
    by_hand: bool,
    dirty_rings: Option<Arc<DirtyRings>>,
}

impl Vm {
    /// Opens `/dev/kvm` and creates a VM of the default type, whose vCPUs have dirty rings of so many
    /// entries if there is a number.
    ///
    /// # Errors
    /// `ENOENT` or `EACCES` when `/dev/kvm` can't be opened; `ENOTSUP`, `E2BIG` or `EINVAL` when there can be
    /// no such rings.
    pub fn new(dirty_ring_size: Option<u32>) -> Result<Self> {
        let kvm = Kvm::new().map_err(|e| Error::new("open", "/dev/kvm", e))?;
        let fd = kvm
            .create_vm()
            .map_err(|e| Error::new("KVM_CREATE_VM", "", e))?;
        let entries = dirty_ring_size;
        let dirty_rings = entries.map(|entries| DirtyRings::enable(&fd, entries).map(Arc::new));
        let dirty_rings = dirty_rings.transpose()?;
        // Pages of a ring are protected when it is reset, which a log that starts full would miss.
        let by_hand = dirty_rings.is_none() && protect_by_hand(&fd)?;
        Ok(Vm {
            kvm,
            fd,
            by_hand,
            dirty_rings,
        })
    }

    /// The rings that have what vCPUs write, instead of the dirty log, if there are any.
    pub fn dirty_rings(&self) -> Option<&DirtyRings> {
        self.dirty_rings.as_deref()
    }

    /// Whether `KVM_GET_DIRTY_LOG` protects nothing, and [`Vm::clear_dirty_log`] is there for that. The
    /// log of a slot then starts with every page set.
    pub fn protects_by_hand(&self) -> bool {
        self.by_hand
    }

    /// `KVM_CHECK_EXTENSION`: 0 when the kernel does not have `cap`, else a number that the
    /// capability defines.
    pub fn check_extension(&self, cap: Cap) -> i32 {
        self.fd.check_extension_int(cap)
    }

    /// How many entries a dirty ring can have here; 0 when there are none.
    pub fn dirty_ring_max(&self) -> u32 {
        dirty_ring::supported(&self.fd).map_or(0, |(_, entries)| entries)
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

    /// `KVM_GET_DIRTY_LOG`: one bit a page of `slot`, set when the page was written since its log was
    /// cleared last. This clears it, unless the VM [protects by hand](Vm::protects_by_hand).
    pub fn dirty_log(&self, slot: &Slot) -> Result<Vec<u64>> {
        let size = usize::try_from(slot.size).unwrap_or(usize::MAX);
        self.fd
            .get_dirty_log(slot.id, size)
            .map_err(|e| Error::new("KVM_GET_DIRTY_LOG", format!("slot {}", slot.id), e))
    }

    /// `KVM_CLEAR_DIRTY_LOG`: clears the log of the pages of `slot` whose bit is set in `bitmap`, the
    /// first of which is `first_page`, and protects them. `first_page` is a multiple of 64.
    pub fn clear_dirty_log(&self, slot: &Slot, first_page: u64, bitmap: &[u64]) -> Result<()> {
        let left = (slot.size / LOGGED_PAGE).saturating_sub(first_page);
        let pages = left.min(bitmap.len() as u64 * 64);
        let request = kvm_clear_dirty_log {
            slot: slot.id,
            num_pages: u32::try_from(pages).unwrap_or(u32::MAX),
            first_page,
            __bindgen_anon_1: kvm_clear_dirty_log__bindgen_ty_1 {
                dirty_bitmap: bitmap.as_ptr().cast_mut().cast::<c_void>(),
            },
        };
        // SAFETY: the kernel reads `pages` bits, rounded up to whole words, which `bitmap` has.
        match unsafe { ioctl_with_ref(&self.fd, KVM_CLEAR_DIRTY_LOG(), &request) } {
            0 => Ok(()),
            _ => {
                let context = format!("slot {}, page {first_page}", slot.id);
                Err(Error::new(
                    "KVM_CLEAR_DIRTY_LOG",
                    context,
                    errno::Error::last(),
                ))
            }
        }
    }

    /// `KVM_CREATE_VCPU`. On x86-64 the in-kernel interrupt controller must exist already.
    pub fn create_vcpu(&self, index: u64) -> Result<Vcpu> {
        let fd = self
            .fd
            .create_vcpu(index)
            .map_err(|e| Error::new("KVM_CREATE_VCPU", format!("vCPU {index}"), e))?;
        if let Some(rings) = &self.dirty_rings {
            rings.add(&fd, index)?;
        }
        Ok(Vcpu::new(fd, index, self.dirty_rings.clone()))
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

/// Asks for dirty logs that are protected by hand. Whether the kernel has them.
fn protect_by_hand(fd: &VmFd) -> Result<bool> {
    let capability = KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2;
    let supported = fd.check_extension_raw(capability.into());
    if supported & BY_HAND as i32 != BY_HAND as i32 {
        return Ok(false);
    }
    let mut request = kvm_enable_cap {
        cap: capability,
        ..Default::default()
    };
    request.args[0] = BY_HAND.into();
    fd.enable_cap(&request)
        .map_err(|e| Error::new("KVM_ENABLE_CAP", "KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2", e))?;
    Ok(true)
}
