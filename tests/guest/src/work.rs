//! What a vCPU does once the machine is set up.

use core::sync::atomic::{AtomicU64, Ordering};

use blackout_abi::guest::command;

use crate::arch;
use crate::shared::Shared;

const PAGE: u64 = 4096;

static DIRTY_BASE: AtomicU64 = AtomicU64::new(0);
static DIRTY_PAGES: AtomicU64 = AtomicU64::new(0);
static VCPUS: AtomicU64 = AtomicU64::new(1);

/// Tells the vCPUs, before they start, which region to keep dirty.
pub(crate) fn share_out(base: u64, size: u64, vcpus: usize) {
    DIRTY_BASE.store(base, Ordering::Relaxed);
    DIRTY_PAGES.store(size / PAGE, Ordering::Relaxed);
    VCPUS.store(vcpus as u64, Ordering::Release);
}

/// vCPU 0: works, and serves the mailbox.
pub(crate) fn serve(shared: Shared, machine: &mut arch::Machine) -> ! {
    let mut share = Share::of(0);
    loop {
        share.turn(shared);
        let Some(command) = shared.command() else {
            continue;
        };
        let answer = match command.command {
            command::NONE => [0; 2],
            _ => machine.command(command.command, command.argument),
        };
        shared.done(command.seq, answer);
    }
}

/// Any other vCPU: works.
pub(crate) fn run(shared: Shared, index: usize) -> ! {
    let mut share = Share::of(index);
    loop {
        share.turn(shared);
    }
}

/// vCPU 0 as one that keeps its monitor busy.
pub(crate) fn exit(shared: Shared) -> ! {
    let counter = shared.counter(0);
    loop {
        counter.fetch_add(1, Ordering::Release);
        arch::exit(shared.serial());
    }
}

/// One vCPU's part of the dirty region: every page whose number is its own modulo the vCPUs.
struct Share {
    vcpu: usize,
    base: u64,
    pages: u64,
    stride: u64,
    next: u64,
}

impl Share {
    fn of(vcpu: usize) -> Self {
        Share {
            vcpu,
            stride: VCPUS.load(Ordering::Acquire),
            base: DIRTY_BASE.load(Ordering::Relaxed),
            pages: DIRTY_PAGES.load(Ordering::Relaxed),
            next: vcpu as u64,
        }
    }

    /// Dirties one page, if there is one, and counts.
    fn turn(&mut self, shared: Shared) {
        let counter = shared.counter(self.vcpu);
        let count = counter.load(Ordering::Relaxed).wrapping_add(1);
        if self.next >= self.pages {
            self.next = self.vcpu as u64;
        }
        if self.next < self.pages {
            let word = (self.base + self.next * PAGE) as *mut u64;
            // SAFETY: the page lies in the dirty region, and in this vCPU's share of it.
            unsafe { word.write_volatile(count) };
            self.next += self.stride;
        }
        counter.store(count, Ordering::Release);
        arch::turn(self.vcpu);
    }
}
