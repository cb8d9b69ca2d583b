//! A vCPU's file descriptor, and the way to get its thread out of it.

use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use kvm_ioctls::VcpuFd;

use super::{DirtyRings, Error, Result};

/// Why `KVM_RUN` returned; the slices lie in the vCPU's `kvm_run` page.
pub use kvm_ioctls::VcpuExit as Exit;

/// One vCPU.
#[derive(Debug)]
pub struct Vcpu {
    pub(super) fd: VcpuFd,
    index: u64,
    dirty_rings: Option<Arc<DirtyRings>>,
}

impl Vcpu {
    pub(super) fn new(fd: VcpuFd, index: u64, dirty_rings: Option<Arc<DirtyRings>>) -> Self {
        Vcpu {
            fd,
            index,
            dirty_rings,
        }
    }

    /// The rings that have what it writes, if there are any. They have to be emptied
    /// after `KVM_EXIT_DIRTY_RING_FULL`.
    pub fn dirty_rings(&self) -> Option<Arc<DirtyRings>> {
        self.dirty_rings.clone()
    }

    /// The number that it was created with.
    pub fn index(&self) -> u64 {
        self.index
    }

    /// `KVM_RUN`: enters the guest until something needs the monitor.
    ///
    /// # Errors
    /// `EINTR` when a signal or [`Kick`] ended it: no exit is to be handled, and an exit handed
    /// out before is complete now. `EAGAIN` when the vCPU is not runnable yet.
    pub fn run(&mut self) -> Result<Exit<'_>> {
        let index = self.index;
        self.fd
            .run()
            .map_err(|e| Error::new("KVM_RUN", format!("vCPU {index}"), e))
    }

    pub(super) fn error(&self, ioctl: &'static str, errno: kvm_ioctls::Error) -> Error {
        Error::new(ioctl, format!("vCPU {}", self.index), errno)
    }
}

/// Sets a vCPU's `immediate_exit` from any thread, while its own thread may be in `KVM_RUN`.
#[derive(Clone, Debug)]
pub struct Kick {
    immediate_exit: &'static AtomicU8,
    /// Keeps the `kvm_run` page mapped that `immediate_exit` points into.
    _vcpu: Arc<Mutex<Vcpu>>,
}

impl Kick {
    /// Takes hold of the vCPU's `kvm_run` page. The vCPU must not be running yet.
    pub fn new(vcpu: &Arc<Mutex<Vcpu>>) -> Self {
        let mut guard = vcpu.lock().unwrap_or_else(PoisonError::into_inner);
        let byte = &raw mut guard.fd.get_kvm_run().immediate_exit;
        // SAFETY: the byte lies in the kvm_run mapping, which lives as long as the VcpuFd, which
        // the Arc beside the reference keeps. The kernel and this process only ever load and store
        // it whole.
        let immediate_exit = unsafe { AtomicU8::from_ptr(byte) };
        Kick {
            immediate_exit,
            _vcpu: Arc::clone(vcpu),
        }
    }

    /// Makes the next `KVM_RUN` return `EINTR` before it enters the guest, until [`Kick::clear`].
    /// A `KVM_RUN` that is under way needs a signal besides.
    pub fn set(&self) {
        self.immediate_exit.store(1, Ordering::SeqCst);
    }

    /// Lets the next `KVM_RUN` enter the guest.
    pub fn clear(&self) {
        self.immediate_exit.store(0, Ordering::SeqCst);
    }
}
