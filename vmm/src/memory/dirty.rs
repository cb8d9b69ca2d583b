//! The dirty log: which pages of guest RAM were written.
//!
//! There are two: KVM's, of what the guest writes, and the map's own, of what devices write
//! (`device_log.rs`). [`GuestRam::dirty`] reads both. KVM's is a bitmap for each slot, or, if the VM was made
//! with them, a [ring](crate::kvm::DirtyRings) for each vCPU.
//!
//! The bitmap starts with every page set, where it can (`KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2` with
//! `KVM_DIRTY_LOG_INITIALLY_SET`): a migration begins without write-protecting all of a large guest at
//! once. A page is protected, and its bit cleared, right before it is sent. So what is written between
//! the look at the log and the sending is not sent twice, and the last look, with the guest stopped,
//! protects nothing.

use vm_memory::GuestMemoryBackend;

use super::{Error, GuestRam, PAGE_SIZE, PageRun};
use crate::kvm::{DirtyPage, Slot, Vm};

impl GuestRam {
    /// Switches the dirty log of every slot. Switched on, it has every page until that is
    /// [protected](GuestRam::protect), or none where KVM can't do that. What devices write is logged at
    /// all times: that costs them less than to ask.
    pub fn set_dirty_log(&self, vm: &Vm, on: bool) -> Result<(), Error> {
        if let Some(rings) = vm.dirty_rings().filter(|_| on) {
            // What is left of the last time, while nothing is added.
            rings.clear()?;
        }
        for slot in self.slots.iter() {
            // SAFETY: the mapping of `slot` is `self.mem`'s, which machine.rs keeps alive as long
            // as the VM; it is only ever reached through vm-memory's volatile accesses.
            unsafe { vm.set_memory_slot(slot, on) }?;
        }
        for region in self.mem.iter().filter(|_| on) {
            region.get_mmap().bitmap().take();
        }
        Ok(())
    }

    /// The pages written since they were protected last, in address order. Where KVM protects by itself,
    /// since the last call: the log is clear afterwards. What devices wrote is told once.
    ///
    /// If the VM has dirty rings, what KVM writes by itself, which it does when devices are saved, comes
    /// when the guest is `stopped`.
    pub fn dirty(&self, vm: &Vm, stopped: bool) -> Result<Vec<PageRun>, Error> {
        let mut runs = Vec::new();
        if vm
            .dirty_rings()
            .is_none_or(|rings| rings.with_log() && stopped)
        {
            for slot in self.slots.iter() {
                let bitmap = vm.dirty_log(slot)?;
                push_runs(&mut runs, slot.gpa, slot.size / PAGE_SIZE, &bitmap);
            }
        }
        let mut more = match vm.dirty_rings() {
            Some(rings) => self.ring_runs(&rings.take()?),
            None => Vec::new(),
        };
        for (slot, region) in self.slots.iter().zip(self.mem.iter()) {
            let by_devices = region.get_mmap().bitmap().take();
            more.extend(by_devices.into_iter().map(|page| run(slot, page)));
        }
        Ok(match more.is_empty() {
            true => runs,
            false => merge(runs, more),
        })
    }

    /// Pages of rings, those that there are: the kernel's word is not taken for it.
    fn ring_runs(&self, pages: &[DirtyPage]) -> Vec<PageRun> {
        let slot = |id: u32| self.slots.iter().find(|slot| slot.id == id);
        let known = pages
            .iter()
            .filter_map(|&(id, page)| Some((slot(id)?, page)));
        known
            .filter(|(slot, page)| *page < slot.size / PAGE_SIZE)
            .map(|(slot, page)| run(slot, page))
            .collect()
    }

    /// Clears the log of these pages, which are in address order: it says of each whether it is written
    /// from now on. Whoever sends them reads them after this.
    pub fn protect(&self, vm: &Vm, runs: &[PageRun]) -> Result<(), Error> {
        if !vm.protects_by_hand() {
            return Ok(());
        }
        for slot in self.slots.iter() {
            let within = runs.iter().filter_map(|&run| clip(run, slot));
            let Some((first_word, bitmap)) = bitmap(within) else {
                continue;
            };
            vm.clear_dirty_log(slot, first_word * 64, &bitmap)?;
        }
        Ok(())
    }
}

/// One page of a slot.
fn run(slot: &Slot, page: u64) -> PageRun {
    PageRun {
        gpa: slot.gpa + page * PAGE_SIZE,
        pages: 1,
    }
}

/// The pages of both lists, each once, in address order.
pub fn merge(mut runs: Vec<PageRun>, more: Vec<PageRun>) -> Vec<PageRun> {
    runs.extend(more);
    runs.sort_unstable_by_key(|run| run.gpa);
    let mut merged: Vec<PageRun> = Vec::with_capacity(runs.len());
    for run in runs {
        let end = run.gpa + run.pages * PAGE_SIZE;
        match merged.last_mut() {
            Some(last) if run.gpa <= last.gpa + last.pages * PAGE_SIZE => {
                let pages = end.saturating_sub(last.gpa) / PAGE_SIZE;
                last.pages = last.pages.max(pages);
            }
            _ => merged.push(run),
        }
    }
    merged
}

/// The part of a run that lies in `slot`, as pages of it: the first, and one past the last.
fn clip(run: PageRun, slot: &Slot) -> Option<(u64, u64)> {
    let start = run.gpa.max(slot.gpa);
    let end = (run.gpa + run.pages * PAGE_SIZE).min(slot.gpa + slot.size);
    let page = |gpa: u64| (gpa - slot.gpa) / PAGE_SIZE;
    (start < end).then(|| (page(start), page(end)))
}

/// Ranges of pages, in order, as a bitmap of whole words: the number of its first word, and the words.
fn bitmap(ranges: impl Iterator<Item = (u64, u64)>) -> Option<(u64, Vec<u64>)> {
    let mut ranges = ranges.peekable();
    let first_word = ranges.peek()?.0 / 64;
    let mut words = Vec::new();
    for (start, end) in ranges {
        let length = usize::try_from(end.div_ceil(64) - first_word).ok()?;
        words.resize(length.max(words.len()), 0);
        let mut page = start;
        while page < end {
            let (word, bit) = (page / 64 - first_word, page % 64);
            let count = (end - page).min(64 - bit);
            let ones = u64::MAX >> (64 - count) << bit;
            *words.get_mut(usize::try_from(word).ok()?)? |= ones;
            page += count;
        }
    }
    Some((first_word, words))
}

/// Appends the runs of set bits of one slot's bitmap; bits past `pages` are ignored.
fn push_runs(runs: &mut Vec<PageRun>, base: u64, pages: u64, bitmap: &[u64]) {
    let first = runs.len();
    for (index, &word) in (0u64..).zip(bitmap) {
        let mut rest = word;
        while rest != 0 {
            let bit = u64::from(rest.trailing_zeros());
            let length = u64::from((rest >> bit).trailing_ones());
            rest &= u64::MAX.checked_shl((bit + length) as u32).unwrap_or(0);
            let page = index * 64 + bit;
            if page >= pages {
                return;
            }
            let (gpa, length) = (base + page * PAGE_SIZE, length.min(pages - page));
            match runs[first..].last_mut() {
                Some(last) if last.gpa + last.pages * PAGE_SIZE == gpa => last.pages += length,
                _ => runs.push(PageRun { gpa, pages: length }),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn runs(pages: u64, bitmap: &[u64]) -> Vec<(u64, u64)> {
        let mut runs = Vec::new();
        push_runs(&mut runs, 0, pages, bitmap);
        runs.iter()
            .map(|run| (run.gpa / PAGE_SIZE, run.pages))
            .collect()
    }

    #[test]
    fn set_bits_become_runs_of_pages() {
        assert_eq!(runs(128, &[0, 0]), []);
        assert_eq!(runs(128, &[0b1011, 0]), [(0, 2), (3, 1)]);
        assert_eq!(runs(128, &[1 << 63, 0b11]), [(63, 3)]);
        assert_eq!(runs(128, &[u64::MAX, u64::MAX]), [(0, 128)]);
        assert_eq!(runs(65, &[1 << 63, u64::MAX]), [(63, 2)]);
        assert_eq!(runs(64, &[0, 1]), []);
    }

    #[test]
    fn neighbouring_slots_stay_apart() {
        let mut all = Vec::new();
        push_runs(&mut all, 0, 1, &[1]);
        push_runs(&mut all, PAGE_SIZE, 1, &[1]);
        assert_eq!(all.len(), 2);
    }

    #[test]
    fn runs_become_a_bitmap_of_whole_words() {
        let of = |ranges: &[(u64, u64)]| bitmap(ranges.iter().copied());
        assert_eq!(of(&[]), None);
        assert_eq!(of(&[(0, 1)]), Some((0, vec![1])));
        assert_eq!(of(&[(63, 65)]), Some((0, vec![1 << 63, 1])));
        assert_eq!(of(&[(64, 128)]), Some((1, vec![u64::MAX])));
        let two = vec![0b110, 0, 0b1000];
        assert_eq!(of(&[(129, 131), (259, 260)]), Some((2, two)));
        let all = vec![u64::MAX; 3];
        assert_eq!(of(&[(64, 100), (100, 256)]), Some((1, all)));
    }

    #[test]
    fn runs_are_cut_at_the_ends_of_a_slot() {
        let slot = Slot {
            id: 0,
            gpa: 0x10_0000,
            size: 0x10_000,
            hva: 0,
        };
        let clip = |gpa, pages| clip(PageRun { gpa, pages }, &slot);
        assert_eq!(clip(0x10_0000, 16), Some((0, 16)));
        assert_eq!(clip(0xf_e000, 3), Some((0, 1)));
        assert_eq!(clip(0x10_f000, 9), Some((15, 16)));
        assert_eq!(clip(0x11_0000, 1), None);
        assert_eq!(clip(0xf_0000, 16), None);
    }

    #[test]
    fn a_page_that_is_dirty_twice_is_sent_once() {
        let cases: [(&[_], &[_], &[_]); 5] = [
            (&[], &[], &[]),
            (&[(1, 2)], &[], &[(1, 2)]),
            (
                &[(1, 2), (9, 1)],
                &[(3, 1), (5, 2)],
                &[(1, 3), (5, 2), (9, 1)],
            ),
            (&[(1, 8)], &[(2, 1), (8, 4)], &[(1, 11)]),
            (&[(4, 1)], &[(4, 1)], &[(4, 1)]),
        ];
        for (first, second, merged) in cases {
            assert_eq!(merge(list(first), list(second)), list(merged));
        }
    }

    fn list(runs: &[(u64, u64)]) -> Vec<PageRun> {
        let run = |&(page, pages)| PageRun {
            gpa: page * PAGE_SIZE,
            pages,
        };
        runs.iter().map(run).collect()
    }
}
