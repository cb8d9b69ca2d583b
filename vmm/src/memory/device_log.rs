//! What devices write to guest RAM.
//!
//! vm-memory calls this for each of their writes. There is a bit for each page, and one for each block
//! of pages, so that finding the few pages that were written does not take as long as RAM is large:
//! the last look is part of the downtime.

use std::num::NonZeroUsize;

use vm_memory::bitmap::{AtomicBitmap, Bitmap, NewBitmap, RefSlice, WithBitmapSlice};

use super::PAGE_SIZE;

/// Pages of a block: 2 MiB.
const BLOCK: usize = 512;

/// The log of one region.
#[derive(Debug, Default)]
pub struct DeviceLog {
    pages: AtomicBitmap,
    /// Set after a page of the block, and cleared before its pages are looked at, so that none is missed.
    blocks: AtomicBitmap,
}

impl DeviceLog {
    /// The numbers of the pages that were written since the last call, in order.
    pub(super) fn take(&self) -> Vec<u64> {
        let mut pages = Vec::new();
        for (index, word) in self.blocks.get_and_reset().into_iter().enumerate() {
            for bit in (0..64).filter(|bit| word >> bit & 1 == 1) {
                let first = (index * 64 + bit) * BLOCK;
                let written = (first..first + BLOCK).filter(|&page| self.pages.is_bit_set(page));
                for page in written {
                    self.pages.reset_bit(page);
                    pages.push(page as u64);
                }
            }
        }
        pages
    }
}

impl<'a> WithBitmapSlice<'a> for DeviceLog {
    type S = RefSlice<'a, Self>;
}

impl Bitmap for DeviceLog {
    fn mark_dirty(&self, offset: usize, len: usize) {
        self.pages.mark_dirty(offset, len);
        self.blocks.mark_dirty(offset, len);
    }

    fn dirty_at(&self, offset: usize) -> bool {
        self.pages.dirty_at(offset)
    }

    fn slice_at(&self, offset: usize) -> RefSlice<'_, Self> {
        RefSlice::new(self, offset)
    }
}

impl NewBitmap for DeviceLog {
    fn with_len(len: usize) -> Self {
        const PAGE: NonZeroUsize = NonZeroUsize::new(PAGE_SIZE as usize).unwrap();
        const BYTES: NonZeroUsize = NonZeroUsize::new(PAGE_SIZE as usize * BLOCK).unwrap();
        DeviceLog {
            pages: AtomicBitmap::new(len, PAGE),
            blocks: AtomicBitmap::new(len, BYTES),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: usize = PAGE_SIZE as usize;

    #[test]
    fn pages_are_told_once_and_in_order() {
        let log = DeviceLog::with_len(3 * BLOCK * PAGE + PAGE);
        assert!(log.take().is_empty());
        log.mark_dirty(3 * BLOCK * PAGE, 1);
        log.mark_dirty(BLOCK * PAGE - 1, 2);
        log.mark_dirty(5 * PAGE, 0);
        log.slice_at(PAGE).mark_dirty(8, PAGE);
        assert!(log.dirty_at(PAGE) && !log.dirty_at(0));
        let (last, middle) = (3 * BLOCK as u64, BLOCK as u64);
        assert_eq!(log.take(), [1, 2, middle - 1, middle, last]);
        assert!(log.take().is_empty());
        assert!(!log.dirty_at(PAGE));
        log.mark_dirty(0, usize::MAX);
        assert_eq!(log.take().len(), 3 * BLOCK + 1);
    }
}
