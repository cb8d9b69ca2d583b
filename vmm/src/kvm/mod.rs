//! Every KVM ioctl of the monitor. No other module holds a KVM file descriptor.
//!
//! The calls themselves are `kvm-ioctls`'; this layer adds what the monitor needs on top: errors
//! that name the ioctl and its subject, the kick of a running vCPU, and the spans of the device
//! ioctls on the stop path. `aarch64.rs` and `x86_64.rs` add the calls that one architecture has.
#![allow(unsafe_code)]

mod device;
mod dirty_ring;
mod irq;
mod vcpu;
mod vm;

#[cfg(target_arch = "aarch64")]
mod aarch64;
#[cfg(target_arch = "x86_64")]
mod x86_64;

#[cfg(target_arch = "aarch64")]
pub use aarch64::{REGISTER_MAX, VcpuEvents, VcpuInit, counter_frequency, register_size};
pub use device::Device;
pub use dirty_ring::{DirtyPage, DirtyRings};
pub use irq::MsiRoute;
pub use vcpu::{Exit, Kick, Vcpu};
pub use vm::{Capability, Slot, Vm};

use std::borrow::Cow;
use std::io;

use crate::probes::Errno;

/// A KVM ioctl that failed.
#[derive(Debug, thiserror::Error)]
#[error("{ioctl}{}{subject}", if subject.is_empty() { "" } else { " " })]
pub struct Error {
    /// The ioctl's name in the kernel's headers.
    pub ioctl: &'static str,
    /// What it was about, such as a register or a slot; may be empty.
    pub subject: Cow<'static, str>,
    /// The errno.
    pub source: io::Error,
}

impl Error {
    /// Names the ioctl behind an errno of `kvm-ioctls`.
    pub(crate) fn new(
        ioctl: &'static str,
        subject: impl Into<Cow<'static, str>>,
        errno: kvm_ioctls::Error,
    ) -> Self {
        let source = io::Error::from_raw_os_error(errno.errno());
        Error {
            ioctl,
            subject: subject.into(),
            source,
        }
    }
}

impl Errno for Error {
    fn errno(&self) -> i32 {
        self.source.errno()
    }
}

/// What every call of this module returns.
pub type Result<T> = std::result::Result<T, Error>;
