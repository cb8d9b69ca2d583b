//! The shared page, as atomics: the guest's vCPUs and whoever looks at guest RAM from outside use
//! it at the same time.

use core::ptr;
use core::sync::atomic::{AtomicPtr, AtomicU64, Ordering};

#[cfg(target_arch = "x86_64")]
use blackout_abi::guest::GAP_TICKS;
use blackout_abi::guest::{BootPage, MAX_VCPUS, SHARED_PAGE_OFFSET, SharedPage};

static BOOT: AtomicPtr<BootPage> = AtomicPtr::new(ptr::null_mut());

/// The page behind the boot page.
#[derive(Clone, Copy)]
pub(crate) struct Shared {
    page: *mut SharedPage,
}

/// A command from the mailbox.
#[derive(Clone, Copy)]
pub(crate) struct Command {
    /// Its number in `command_seq`.
    pub(crate) seq: u64,
    /// One of `blackout_abi::guest::command`.
    pub(crate) command: u64,
    /// Its argument.
    pub(crate) argument: u64,
}

macro_rules! field {
    ($self:ident, $($place:tt)+) => {
        // SAFETY: the page lies in RAM behind the boot page for as long as the guest runs, and all
        // its users take its fields as 64-bit atomics.
        unsafe { AtomicU64::from_ptr(&raw mut (*$self.page).$($place)+) }
    };
}

impl Shared {
    /// The shared page behind `boot`; remembers where, for [`Shared::get`].
    pub(crate) fn behind(boot: &'static BootPage) -> Self {
        BOOT.store(ptr::from_ref(boot).cast_mut(), Ordering::Release);
        Shared::get()
    }

    /// The shared page of the boot page that [`Shared::behind`] was given.
    pub(crate) fn get() -> Self {
        let boot = BOOT.load(Ordering::Acquire);
        let page = boot.wrapping_byte_add(SHARED_PAGE_OFFSET as usize).cast();
        Shared { page }
    }

    /// The boot page's serial port.
    pub(crate) fn serial(self) -> u64 {
        // SAFETY: `Shared::behind` got the pointer from a reference that lives for ever.
        unsafe { (*BOOT.load(Ordering::Acquire)).serial }
    }

    /// Shows what the guest works with.
    pub(crate) fn describe(self, dirty_base: u64, dirty_size: u64, devices: u64, events: u64) {
        field!(self, dirty_base).store(dirty_base, Ordering::Relaxed);
        field!(self, dirty_size).store(dirty_size, Ordering::Relaxed);
        field!(self, devices).store(devices, Ordering::Relaxed);
        field!(self, events).store(events, Ordering::Relaxed);
    }

    /// Shows what the guest is at, after all that was shown before.
    pub(crate) fn set_state(self, state: u64, error: u64) {
        field!(self, error).store(error, Ordering::Relaxed);
        field!(self, state).store(state, Ordering::Release);
    }

    /// The command that waits, if one does.
    pub(crate) fn command(self) -> Option<Command> {
        let seq = field!(self, command_seq).load(Ordering::Acquire);
        if seq == field!(self, done_seq).load(Ordering::Relaxed) {
            return None;
        }
        Some(Command {
            seq,
            command: field!(self, command).load(Ordering::Relaxed),
            argument: field!(self, argument).load(Ordering::Relaxed),
        })
    }

    /// Answers the command `seq`.
    pub(crate) fn done(self, seq: u64, [result, result2]: [u64; 2]) {
        field!(self, result).store(result, Ordering::Relaxed);
        field!(self, result2).store(result2, Ordering::Relaxed);
        field!(self, done_seq).store(seq, Ordering::Release);
    }

    /// Counts an LPI, or whatever interrupt the architecture has instead.
    pub(crate) fn count_lpi(self) {
        field!(self, lpis).fetch_add(1, Ordering::Relaxed);
    }

    /// The progress counter of a vCPU.
    pub(crate) fn counter(self, vcpu: usize) -> &'static AtomicU64 {
        assert!(vcpu < MAX_VCPUS);
        field!(self, counters[vcpu].value)
    }

    /// Shows when a vCPU did a turn of its loop, in ticks of its clock, and where it stood still.
    #[cfg(target_arch = "x86_64")]
    pub(crate) fn stamp(self, vcpu: usize, ticks: u64) {
        assert!(vcpu < MAX_VCPUS);
        let stamp = field!(self, counters[vcpu].stamp);
        let last = stamp.load(Ordering::Relaxed);
        if last != 0 && ticks.wrapping_sub(last) > GAP_TICKS {
            let count = field!(self, counters[vcpu].gap_count);
            let number = count.load(Ordering::Relaxed);
            let place = (number % 2) as usize;
            field!(self, counters[vcpu].gaps[place].from).store(last, Ordering::Relaxed);
            field!(self, counters[vcpu].gaps[place].to).store(ticks, Ordering::Relaxed);
            count.store(number + 1, Ordering::Release);
        }
        stamp.store(ticks, Ordering::Release);
    }
}
