//! The RAM behind the program, given out once and never taken back.

use blackout_abi::guest::BootPage;

use crate::Failure;

unsafe extern "C" {
    /// First byte behind the program and its stacks; the linker script sets it.
    static __end: u8;
}

/// What is left of RAM.
pub(crate) struct Arena {
    next: u64,
    end: u64,
}

impl Arena {
    /// All RAM behind the program.
    pub(crate) fn of(boot: &BootPage) -> Self {
        Arena {
            next: (&raw const __end).addr() as u64,
            end: boot.ram_base.saturating_add(boot.ram_size),
        }
    }

    /// `size` zeroed bytes at a multiple of `align`, a power of two.
    pub(crate) fn take(&mut self, size: u64, align: u64) -> Result<u64, Failure> {
        let start = self.next.checked_next_multiple_of(align);
        let start = start.ok_or(Failure::Memory)?;
        let end = start.checked_add(size).ok_or(Failure::Memory)?;
        if end > self.end {
            return Err(Failure::Memory);
        }
        self.next = end;
        // SAFETY: the range is RAM behind the program that was never given out before.
        unsafe { core::ptr::write_bytes(start as *mut u8, 0, size as usize) };
        Ok(start)
    }
}
