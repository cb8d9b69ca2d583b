//! One ring, which is memory that is shared with the kernel.

use std::io;
use std::mem;
use std::os::fd::AsFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, Ordering};

use kvm_bindings::{KVM_DIRTY_LOG_PAGE_OFFSET, kvm_dirty_gfn};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

use super::DirtyPage;
use crate::kvm::vm::LOGGED_PAGE;

// include/uapi/linux/kvm.h; kvm-bindings has only the mask of both.
const KVM_DIRTY_GFN_F_DIRTY: u32 = 1;
const KVM_DIRTY_GFN_F_RESET: u32 = 2;
/// The bytes of an entry.
pub(super) const ENTRY: usize = size_of::<kvm_dirty_gfn>();

/// A vCPU's ring, which the kernel fills and this process empties.
#[derive(Debug)]
pub(super) struct Ring {
    entries: NonNull<kvm_dirty_gfn>,
    count: u32,
    /// The number of the next entry to be filled, from the beginning of time.
    next: u32,
    /// Entries from there on may be empty for good.
    has_gap: bool,
    /// The kernel said that it is full, and nothing was in it, and nothing was taken out since.
    is_stuck: bool,
}

// SAFETY: the mapping is the process's; nothing in it belongs to a thread.
unsafe impl Send for Ring {}

impl Ring {
    pub(super) fn map(vcpu: impl AsFd, count: u32) -> io::Result<Ring> {
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
            is_stuck: false,
        })
    }

    /// Appends what the ring holds to `pages`, and gives the entries back to the kernel, which takes them
    /// at the next `KVM_RESET_DIRTY_RINGS`. Returns how many there were.
    pub(super) fn empty(&mut self, pages: &mut Vec<DirtyPage>) -> u32 {
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
        self.is_stuck &= taken == 0;
        taken
    }

    /// Whether the kernel, which says that this ring is full after it was [emptied](Ring::empty), is right
    /// with nothing in it. Once may be late, as somebody else may have emptied it since the kernel looked;
    /// twice is not.
    pub(super) fn is_full_of_nothing(&mut self) -> bool {
        !self.is_dirty(0) && mem::replace(&mut self.is_stuck, true)
    }

    /// Forgets what is in the ring, finds the entry that the kernel waits for, and has it take that one by
    /// `reset`, which is `KVM_RESET_DIRTY_RINGS`. The ring has to be full, and the vCPU not running.
    ///
    /// The kernel takes entries in order as long as they are given back. It must never take one that it has
    /// not filled yet, as the ring then counts as full for ever. In a full one, it has filled the one that it
    /// waits for; where those end that it has filled is not known.
    pub(super) fn find_again<E>(&mut self, reset: impl Fn() -> Result<(), E>) -> Result<(), E> {
        for ahead in 0..self.count {
            self.entry(ahead).1.store(0, Ordering::Release);
        }
        for _ in 0..self.count {
            let flags = self.entry(0).1;
            flags.store(KVM_DIRTY_GFN_F_RESET, Ordering::Release);
            let done = reset();
            let is_taken = flags.swap(0, Ordering::AcqRel) == 0;
            done?;
            self.next = self.next.wrapping_add(1);
            if is_taken {
                break;
            }
        }
        self.has_gap = true;
        Ok(())
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
    pub(super) fn was_reset(&self) -> bool {
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
    use std::cell::RefCell;
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

    /// The kernel's side of a ring, as virt/kvm/dirty_ring.c has it.
    struct Kernel {
        file: File,
        dirty_index: u32,
        reset_index: u32,
    }

    impl Kernel {
        fn push(&mut self, page: u64) {
            put(&self.file, self.dirty_index, KVM_DIRTY_GFN_F_DIRTY, page);
            self.dirty_index += 1;
        }

        fn is_full(&self) -> bool {
            self.dirty_index.wrapping_sub(self.reset_index) >= COUNT - 64
        }

        fn reset(&mut self) {
            let flags_at = |index| {
                let offset = u64::from(KVM_DIRTY_LOG_PAGE_OFFSET) * LOGGED_PAGE;
                offset + u64::from(index % COUNT) * ENTRY as u64
            };
            let mut flags = [0; 4];
            loop {
                let at = flags_at(self.reset_index);
                self.file.read_exact_at(&mut flags, at).unwrap();
                if u32::from_le_bytes(flags) & KVM_DIRTY_GFN_F_RESET == 0 {
                    return;
                }
                self.file.write_all_at(&[0; 4], at).unwrap();
                self.reset_index += 1;
            }
        }
    }

    /// Whatever a kernel overwrites, and whenever: its vCPU runs again, and what is lost is noticed.
    #[test]
    fn a_vcpu_runs_again_however_its_ring_was_overrun() {
        let mut random = 1_u64;
        let mut below = |limit: u64| {
            random = random
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            (random >> 33) % limit
        };
        for _ in 0..100 {
            let (mut ring, file) = ring();
            let kernel = RefCell::new(Kernel {
                file,
                dirty_index: 0,
                reset_index: 0,
            });
            let reset = || {
                kernel.borrow_mut().reset();
                Ok::<_, ()>(())
            };
            let (mut seen, mut lost) = (Vec::new(), false);
            let (mut written, mut exits, mut behind) = (0, 0, 0);
            while written < 4_000 {
                let is_full = kernel.borrow().is_full();
                if is_full {
                    exits += 1;
                    let kernel = kernel.borrow();
                    behind = behind.max(kernel.dirty_index - kernel.reset_index);
                    assert!(exits < behind + 4, "the vCPU never runs again");
                } else {
                    (exits, behind) = (0, 0);
                    let burst = match below(8) {
                        0 => below(4 * u64::from(COUNT)),
                        _ => below(80),
                    };
                    for _ in 0..burst {
                        kernel.borrow_mut().push(written);
                        written += 1;
                        // Another thread empties the ring meanwhile, and the kernel goes on in between.
                        if below(100) == 0 {
                            let taken = ring.empty(&mut seen);
                            for _ in 0..below(3) * below(u64::from(COUNT)) {
                                kernel.borrow_mut().push(written);
                                written += 1;
                            }
                            kernel.borrow_mut().reset();
                            lost |= taken == COUNT || (taken > 0 && !ring.was_reset());
                        }
                    }
                }
                // Another thread may be first to empty it.
                for _ in 0..=below(2) {
                    let taken = ring.empty(&mut seen);
                    kernel.borrow_mut().reset();
                    lost |= taken == COUNT || (taken > 0 && !ring.was_reset());
                }
                if is_full && ring.is_full_of_nothing() {
                    lost = true;
                    ring.find_again(reset).unwrap();
                }
                let kernel = kernel.borrow();
                assert!(
                    kernel.reset_index <= kernel.dirty_index,
                    "it took one too many"
                );
            }
            seen.sort_unstable();
            seen.dedup();
            let all = seen.len() as u64 == written;
            assert!(all || lost, "{} of {written}", seen.len());
        }
    }
}
