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
//! was emptied, may have lost some, and what was written is not known any more.
//!
//! Documentation/virt/kvm/api.rst, 8.29.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use kvm_bindings::{
    KVM_CAP_DIRTY_LOG_RING, KVM_CAP_DIRTY_LOG_RING_ACQ_REL, KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP,
    KVM_DIRTY_LOG_PAGE_OFFSET, KVMIO, kvm_dirty_gfn, kvm_enable_cap,
};
use kvm_ioctls::{VcpuFd, VmFd};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};
use vmm_sys_util::errno;
use vmm_sys_util::ioctl::ioctl;
use vmm_sys_util::ioctl_io_nr;

use super::vm::LOGGED_PAGE;
use super::{Error, Result};

// Documentation/virt/kvm/api.rst, 4.129. kvm-ioctls does not have it.
ioctl_io_nr!(KVM_RESET_DIRTY_RINGS, KVMIO, 0xc7);

// include/uapi/linux/kvm.h; kvm-bindings has only the mask of both.
const KVM_DIRTY_GFN_F_DIRTY: u32 = 1;
const KVM_DIRTY_GFN_F_RESET: u32 = 2;
const ENTRY: usize = size_of::<kvm_dirty_gfn>();
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
    /// Whoever runs a vCPU calls this when its ring is full.
    pub fn collect(&self) -> Result<()> {
        self.collect_into(&mut self.lock())
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

/// A vCPU's ring, which the kernel fills and this process empties.
#[derive(Debug)]
struct Ring {
    entries: NonNull<kvm_dirty_gfn>,
    count: u32,
    /// The number of the next entry to be filled, from the beginning of time.
    next: u32,
    /// Entries from there on may be empty for good.
    has_gap: bool,
}

// SAFETY: the mapping is the process's; nothing in it belongs to a thread.
unsafe impl Send for Ring {}

impl Ring {
    fn map(vcpu: impl AsFd, count: u32) -> io::Result<Ring> {
        let offset = u64::from(KVM_DIRTY_LOG_PAGE_OFFSET) * LOGGED_PAGE;
        let (protection, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED);
        let len = count as usize * ENTRY;
        // SAFETY: a new mapping at a place that the kernel chooses, which nothing else uses.
        let start = unsafe { mmap(std::ptr::null_mut(), len, protection, flags, vcpu, offset) }?;
        let entries = NonNull::new(start.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Ring {
            entries,
            count,
            next: 0,
            has_gap: false,
        })
    }

    /// Appends what the ring holds to `pages`, and gives the entries back to the kernel, which takes them
    /// at the next `KVM_RESET_DIRTY_RINGS`. Returns how many there were.
    fn empty(&mut self, pages: &mut Vec<DirtyPage>) -> u32 {
        let mut taken = 0;
        if self.has_gap && !self.is_dirty(0) {
            taken += self.leave_gap(pages);
        }
        while taken < self.count && self.is_dirty(0) {
            pages.push(self.give_back());
            taken += 1;
        }
        // What was overwritten is missing where the kernel thinks that it is.
        self.has_gap |= taken == self.count;
        taken
    }

    /// Gives back the entries in which nothing ever comes, up to one in which something has.
    fn leave_gap(&mut self, pages: &mut Vec<DirtyPage>) -> u32 {
        let Some(gap) = (0..self.count).find(|&ahead| self.is_dirty(ahead)) else {
            return 0;
        };
        for _ in 0..gap {
            // The kernel fills them in order: one that was empty may have been filled since.
            let is_dirty = self.is_dirty(0);
            let page = self.give_back();
            pages.extend(is_dirty.then_some(page));
        }
        self.has_gap = false;
        gap
    }

    /// The entry that is so many behind the next one, and its flags. The numbers wrap, so that `u32::MAX` is
    /// the one before.
    fn entry(&self, ahead: u32) -> (*mut kvm_dirty_gfn, &AtomicU32) {
        let index = self.next.wrapping_add(ahead) % self.count;
        // SAFETY: `index` is below `count`, for which the mapping has room. The kernel and this process
        // only load and store flags whole.
        unsafe {
            let entry = self.entries.add(index as usize).as_ptr();
            (entry, AtomicU32::from_ptr(&raw mut (*entry).flags))
        }
    }

    fn is_dirty(&self, ahead: u32) -> bool {
        self.entry(ahead).1.load(Ordering::Acquire) & KVM_DIRTY_GFN_F_DIRTY != 0
    }

    /// Whether the kernel has taken the entry that was given back last, and with it all before.
    fn was_reset(&self) -> bool {
        let last = self.entry(u32::MAX).1;
        last.load(Ordering::Acquire) & KVM_DIRTY_GFN_F_RESET == 0
    }

    /// Gives the next entry back, and returns what is in it.
    fn give_back(&mut self) -> DirtyPage {
        let (entry, flags) = self.entry(0);
        // SAFETY: an entry of the mapping. The kernel wrote these before the flags, and leaves them alone
        // until it finds the entry given back.
        let page = unsafe {
            let (slot, offset) = (&raw const (*entry).slot, &raw const (*entry).offset);
            (slot.read_volatile(), offset.read_volatile())
        };
        flags.store(KVM_DIRTY_GFN_F_RESET, Ordering::Release);
        self.next = self.next.wrapping_add(1);
        page
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        // SAFETY: the mapping is this ring's, and nobody has a pointer into it any more. It can't fail:
        // its start and length are those that it was made with.
        let _ = unsafe { munmap(self.entries.as_ptr().cast(), self.count as usize * ENTRY) };
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::fs::FileExt;

    use super::*;

    const COUNT: u32 = 256;

    /// A ring that a file stands in for, which this fills as the kernel does.
    fn ring() -> (Ring, File) {
        let file = tempfile::tempfile().unwrap();
        let offset = u64::from(KVM_DIRTY_LOG_PAGE_OFFSET) * LOGGED_PAGE;
        file.set_len(offset + u64::from(COUNT) * ENTRY as u64)
            .unwrap();
        (Ring::map(&file, COUNT).unwrap(), file)
    }

    fn put(file: &File, index: u32, flags: u32, page: u64) {
        let offset = u64::from(KVM_DIRTY_LOG_PAGE_OFFSET) * LOGGED_PAGE;
        let entry = [flags.to_le_bytes(), 3u32.to_le_bytes()].concat();
        let entry = [entry, page.to_le_bytes().to_vec()].concat();
        file.write_all_at(&entry, offset + u64::from(index % COUNT) * ENTRY as u64)
            .unwrap();
    }

    #[test]
    fn entries_come_in_order_once_each_around_the_end_of_the_ring() {
        let (mut ring, file) = ring();
        let mut pages = Vec::new();
        ring.empty(&mut pages);
        assert_eq!(pages, []);
        for round in 0..3 {
            let first = round * 200;
            for index in first..first + 200 {
                put(&file, index, KVM_DIRTY_GFN_F_DIRTY, index.into());
            }
            pages.clear();
            ring.empty(&mut pages);
            let expected: Vec<_> = (first..first + 200).map(|page| (3, page.into())).collect();
            assert_eq!(pages, expected);
            // Given back, and not taken again before the kernel has had them.
            pages.clear();
            ring.empty(&mut pages);
            assert_eq!(pages, []);
            for index in first..first + 200 {
                put(&file, index, 0, 0);
            }
        }
    }

    #[test]
    fn a_ring_that_is_full_is_emptied_once_around() {
        let (mut ring, file) = ring();
        for index in 0..COUNT {
            put(&file, index, KVM_DIRTY_GFN_F_DIRTY, 9);
        }
        let mut pages = Vec::new();
        assert_eq!(ring.empty(&mut pages), COUNT);
        assert_eq!(pages.len(), COUNT as usize);
    }

    #[test]
    fn a_ring_is_reset_when_its_last_entry_is() {
        let (mut ring, file) = ring();
        for index in 0..5 {
            put(&file, index, KVM_DIRTY_GFN_F_DIRTY, 9);
        }
        assert_eq!(ring.empty(&mut Vec::new()), 5);
        assert!(!ring.was_reset());
        for index in 0..4 {
            put(&file, index, 0, 0);
        }
        assert!(
            !ring.was_reset(),
            "the kernel has stopped before the last one"
        );
        put(&file, 4, 0, 0);
        assert!(ring.was_reset());
    }

    #[test]
    fn a_ring_that_was_overrun_goes_on_behind_what_was_lost() {
        let (mut ring, file) = ring();
        let mut pages = Vec::new();
        // The last 10 took the places of the first 10.
        for index in 10..COUNT + 10 {
            put(&file, index, KVM_DIRTY_GFN_F_DIRTY, index.into());
        }
        assert_eq!(ring.empty(&mut pages), COUNT);
        for index in 0..COUNT {
            put(&file, index, 0, 0);
        }
        pages.clear();
        assert_eq!(ring.empty(&mut pages), 0);
        let after = COUNT + 10..COUNT + 20;
        for index in after.clone() {
            put(&file, index, KVM_DIRTY_GFN_F_DIRTY, index.into());
        }
        assert_eq!(ring.empty(&mut pages), 20, "10 of them are the gap");
        let expected: Vec<_> = after.map(|page| (3, page.into())).collect();
        assert_eq!(pages, expected);
    }
}
