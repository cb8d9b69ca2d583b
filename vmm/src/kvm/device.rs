//! An in-kernel device (GIC, ITS) and its attributes.

use kvm_bindings::kvm_device_attr;
use kvm_ioctls::DeviceFd;
use std::os::fd::AsRawFd;

use super::{Error, Result};
use crate::probes::{self, Guarded};

/// A device that `KVM_CREATE_DEVICE` made. `Documentation/virt/kvm/devices/` names its groups and
/// attributes.
#[derive(Debug)]
pub struct Device {
    fd: DeviceFd,
    name: &'static str,
}

impl Device {
    pub(super) fn new(fd: DeviceFd, name: &'static str) -> Self {
        Device { fd, name }
    }

    /// The same as [`Device::set`] with no value, inside the span `kvm_device_access`: a command
    /// on the stop path, such as `KVM_DEV_ARM_ITS_SAVE_TABLES`. Registers, of which a stop reads
    /// hundreds, go through [`Device::get`] and [`Device::set`] with no span of their own.
    pub fn command(&self, group: u32, attr: u64) -> Result<()> {
        let fd = u64::from(self.fd.as_raw_fd().unsigned_abs());
        probes::kvm_device_access(fd, u64::from(group), attr, 1)
            .run(|_| self.set_addr(group, attr, 0))
    }

    /// `KVM_SET_DEVICE_ATTR` with a value of 32 or 64 bits, as the attribute defines.
    pub fn set<T: Value>(&self, group: u32, attr: u64, value: T) -> Result<()> {
        self.set_addr(group, attr, (&raw const value).addr() as u64)
    }

    /// `KVM_GET_DEVICE_ATTR` of a value of 32 or 64 bits, as the attribute defines.
    pub fn get<T: Value>(&self, group: u32, attr: u64) -> Result<T> {
        let mut value = T::default();
        let addr = (&raw mut value).expose_provenance() as u64;
        let mut request = kvm_device_attr {
            flags: 0,
            group,
            attr,
            addr,
        };
        // SAFETY: `addr` points at `value`, and `Value` is only for the widths that the kernel
        // writes for the groups this crate uses.
        unsafe { self.fd.get_device_attr(&mut request) }
            .map_err(|e| self.error("KVM_GET_DEVICE_ATTR", group, attr, e))?;
        Ok(value)
    }

    /// `KVM_HAS_DEVICE_ATTR`.
    pub fn has(&self, group: u32, attr: u64) -> bool {
        let request = kvm_device_attr {
            flags: 0,
            group,
            attr,
            addr: 0,
        };
        self.fd.has_device_attr(&request).is_ok()
    }

    fn set_addr(&self, group: u32, attr: u64, addr: u64) -> Result<()> {
        let request = kvm_device_attr {
            flags: 0,
            group,
            attr,
            addr,
        };
        self.fd
            .set_device_attr(&request)
            .map_err(|e| self.error("KVM_SET_DEVICE_ATTR", group, attr, e))
    }

    fn error(&self, ioctl: &'static str, group: u32, attr: u64, e: kvm_ioctls::Error) -> Error {
        Error::new(
            ioctl,
            format!("{} group {group} attr {attr:#x}", self.name),
            e,
        )
    }
}

/// The widths of a device attribute's value.
pub trait Value: Default + Copy + sealed::Sealed {}
impl Value for u32 {}
impl Value for u64 {}

mod sealed {
    pub trait Sealed {}
    impl Sealed for u32 {}
    impl Sealed for u64 {}
}
