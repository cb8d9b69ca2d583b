//! KVM's dirty rings (`KVM_CAP_DIRTY_LOG_RING`): what each vCPU writes, as a list.
//!
//! A dirty log has a bit for each page of a slot, so that reading it takes as long as the guest is large,
//! and the last time that is part of the downtime. A ring has an entry for each page that was written,
//! and takes as long as the guest writes. It is off unless it is asked for: small guests do better
//! without, as a ring that is full makes its vCPU wait.
//!
//! KVM stops a vCPU while its ring has a few entries left for what it writes on the way out. A KVM that
//! writes more than that overwrites entries that nobody has seen, or that were given back and whose pages are
//! not protected yet. So a ring of which every entry is taken, or that the kernel does not reset to where it
//! was emptied, may have lost some, and what was written is not known any more. The guest goes on all the
//! same.
//!
//! Documentation/virt/kvm/api.rst, 8.29.

mod ring;

use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::{Mutex, MutexGuard, PoisonError};

use kvm_bindings::{
    KVM_CAP_DIRTY_LOG_RING, KVM_CAP_DIRTY_LOG_RING_ACQ_REL, KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP,
    KVMIO, kvm_enable_cap,
};
use kvm_ioctls::{VcpuFd, VmFd};
use vmm_sys_util::errno;
use vmm_sys_util::ioctl::ioctl;
use vmm_sys_util::ioctl_io_nr;

use self::ring::{ENTRY, Ring};
use super::{Error, Result};

// Documentation/virt/kvm/api.rst, 4.129. kvm-ioctls does not have it.
ioctl_io_nr!(KVM_RESET_DIRTY_RINGS, KVMIO, 0xc7);

/// A list that is longer than this may have pages many times, and is looked through for them.
const LIST: usize = 1 << 20;

/// A page that was written: the number of its slot, and its own in that.
pub type DirtyPage = (u32, u64);

/// The rings of all vCPUs of a VM.
#[derive(Debug)]
pub struct DirtyRings {
    vm: OwnedFd,
    /// Entries of each.
    entries: u32,
    /// Whether what the kernel writes by itself, and not for a vCPU, is in the dirty log.
    with_log: bool,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    rings: Vec<Ring>,
    /// What was in them.
    pages: Vec<DirtyPage>,
    /// Something was in them that was overwritten.
    overflowed: bool,
    /// How long `pages` may get before it is looked through again.
    most: usize,
}

impl DirtyRings {
    /// Asks for a ring of so many `entries`, a power of 2, for each vCPU. There must be none yet, and no
    /// slot.
    ///
    /// # Errors
    /// `ENOTSUP` when the kernel has no rings, `E2BIG` when it has none that long, and `EINVAL` when the
    /// number is none that it takes.
    pub(super) fn enable(vm: &VmFd, entries: u32) -> Result<Self> {
        let failed = |errno| {
            let subject = format!("KVM_CAP_DIRTY_LOG_RING, {entries} entries");
            Error::new("KVM_ENABLE_CAP", subject, errno)
        };
        let found = supported(vm);
        let (capability, most) = found.ok_or_else(|| failed(errno::Error::new(libc::ENOTSUP)))?;
        if entries > most {
            return Err(failed(errno::Error::new(libc::E2BIG)));
        }
        let bytes = u64::from(entries) * ENTRY as u64;
        enable(vm, capability, bytes).map_err(failed)?;
        let bitmap = KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP;
        let with_log = vm.check_extension_raw(bitmap.into()) > 0;
        if with_log {
            let name = "KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP";
            enable(vm, bitmap, 0).map_err(|e| Error::new("KVM_ENABLE_CAP", name, e))?;
        }
        // SAFETY: the descriptor is `vm`'s and open.
        let vm = unsafe { BorrowedFd::borrow_raw(std::os::fd::AsRawFd::as_raw_fd(vm)) };
        let vm = vm.try_clone_to_owned().map_err(|source| Error {
            ioctl: "dup",
            subject: "the VM's descriptor".into(),
            source,
        })?;
        Ok(DirtyRings {
            vm,
            entries,
            with_log,
            state: Mutex::default(),
        })
    }

    /// Adds the ring of a new vCPU.
    pub(super) fn add(&self, vcpu: &VcpuFd, index: u64) -> Result<()> {
        // SAFETY: the descriptor is `vcpu`'s and open.
        let fd = unsafe { BorrowedFd::borrow_raw(std::os::fd::AsRawFd::as_raw_fd(vcpu)) };
        let ring = Ring::map(fd, self.entries).map_err(|source| Error {
            ioctl: "mmap",
            subject: format!("the dirty ring of vCPU {index}").into(),
            source,
        })?;
        self.lock().rings.push(ring);
        Ok(())
    }

    /// Whether what the kernel writes by itself, such as the tables of an ITS, is in the dirty log. If not,
    /// it writes nothing by itself.
    pub fn with_log(&self) -> bool {
        self.with_log
    }

    /// Empties the rings, so that vCPUs have room to go on, and protects the pages that were in them.
    /// Whoever runs the vCPU `index` calls this when the kernel says that its ring is full.
    pub fn collect(&self, index: u64) -> Result<()> {
        let mut state = self.lock();
        self.collect_into(&mut state)?;
        let State {
            rings, overflowed, ..
        } = &mut *state;
        let ring = usize::try_from(index).ok().and_then(|at| rings.get_mut(at));
        if let Some(ring) = ring
            && ring.is_full_of_nothing()
        {
            // What the kernel counts was overwritten, and without it the vCPU would never run again.
            *overflowed = true;
            ring.find_again(|| self.reset())?;
        }
        Ok(())
    }

    /// The pages that vCPUs wrote since the last call, in order, each once. They are protected again, so
    /// whoever reads them does so after this.
    ///
    /// # Errors
    /// `EOVERFLOW` when more was written than is known.
    pub fn take(&self) -> Result<Vec<DirtyPage>> {
        let mut state = self.lock();
        self.collect_into(&mut state)?;
        state.tidy();
        if state.overflowed {
            let subject = format!(
                "vCPUs overran their {} entries: use a larger --dirty-ring-size, or none",
                self.entries
            );
            let error = errno::Error::new(libc::EOVERFLOW);
            return Err(Error::new("KVM_RESET_DIRTY_RINGS", subject, error));
        }
        Ok(std::mem::take(&mut state.pages))
    }

    /// Forgets what was written so far.
    pub fn clear(&self) -> Result<()> {
        let mut state = self.lock();
        self.collect_into(&mut state)?;
        (state.pages, state.overflowed) = (Vec::new(), false);
        Ok(())
    }

    fn collect_into(&self, state: &mut State) -> Result<()> {
        let State { rings, pages, .. } = state;
        let taken: Vec<_> = rings.iter_mut().map(|ring| ring.empty(pages)).collect();
        if taken.iter().all(|&taken| taken == 0) {
            return Ok(());
        }
        self.reset()?;
        let State { rings, .. } = state;
        let lost = rings
            .iter()
            .zip(&taken)
            .any(|(ring, &taken)| taken == self.entries || (taken > 0 && !ring.was_reset()));
        state.overflowed |= lost;
        if state.pages.len() > state.most.max(LIST) {
            state.tidy();
            state.most = 2 * state.pages.len();
        }
        Ok(())
    }

    /// `KVM_RESET_DIRTY_RINGS`. A signal for this thread may come in between, but no page is to be handed on
    /// before it is protected.
    fn reset(&self) -> Result<()> {
        loop {
            // SAFETY: the call takes no argument.
            if unsafe { ioctl(&self.vm, KVM_RESET_DIRTY_RINGS()) } >= 0 {
                return Ok(());
            }
            let error = errno::Error::last();
            if error.errno() != libc::EINTR {
                return Err(Error::new("KVM_RESET_DIRTY_RINGS", "", error));
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn tidy(&mut self) {
        self.pages.sort_unstable();
        self.pages.dedup();
    }
}

/// The capability that this kernel has for rings, and how many entries one can have; none if it has none.
pub(super) fn supported(vm: &VmFd) -> Option<(u32, u32)> {
    let capabilities = [KVM_CAP_DIRTY_LOG_RING_ACQ_REL, KVM_CAP_DIRTY_LOG_RING];
    capabilities.into_iter().find_map(|capability| {
        let bytes = usize::try_from(vm.check_extension_raw(capability.into())).ok()?;
        let entries = u32::try_from(bytes / ENTRY)
            .ok()
            .filter(|&entries| entries > 0)?;
        Some((capability, entries))
    })
}

fn enable(vm: &VmFd, cap: u32, argument: u64) -> std::result::Result<(), errno::Error> {
    let mut request = kvm_enable_cap {
        cap,
        ..Default::default()
    };
    request.args[0] = argument;
    vm.enable_cap(&request)
}
