//! What the monitor tells a guest at boot, and what the project's bare-metal guests tell whoever
//! looks at their RAM from outside.
//!
//! Two pages at fixed guest-physical addresses. The monitor writes the [`BootPage`] before the
//! first instruction and passes its address in the first argument register (`x0`, `rdi`); any guest
//! may read it or ignore it. The [`SharedPage`] after it belongs to the guest: the monitor never
//! touches it. Tests, the demo and the benchmarks map the guest's RAM through the monitor's memfd
//! and use it as a mailbox.

/// Where guest RAM starts, and with it the boot page, on arm64.
pub const AARCH64_RAM_BASE: u64 = 0x4000_0000;
/// Where guest RAM starts on x86-64; the boot page lies above the first 16 KiB.
pub const X86_64_RAM_BASE: u64 = 0;
/// Guest-physical address of the boot page on arm64.
pub const AARCH64_BOOT_PAGE: u64 = AARCH64_RAM_BASE;
/// Guest-physical address of the boot page on x86-64.
pub const X86_64_BOOT_PAGE: u64 = 0x4000;
/// The shared page lies this far after the boot page.
pub const SHARED_PAGE_OFFSET: u64 = 0x1000;
/// `BootPage::magic`: "BLACKOUT" read as a little-endian number.
pub const BOOT_MAGIC: u64 = u64::from_le_bytes(*b"BLACKOUT");
/// The longest command line, without its NUL.
pub const CMDLINE_MAX: usize = 2047;
/// The most vCPUs that the two pages have room for.
pub const MAX_VCPUS: usize = 32;

/// Guest parameters, written by the monitor. All numbers little-endian, addresses guest-physical;
/// an address is 0 when the machine has no such device.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct BootPage {
    /// [`BOOT_MAGIC`].
    pub magic: u64,
    /// 1.
    pub version: u32,
    /// vCPUs of the machine; all but the first are off until the guest starts them (PSCI, INIT-SIPI).
    pub vcpus: u32,
    /// First byte of RAM.
    pub ram_base: u64,
    /// Bytes of RAM. On x86-64 the first 3 GiB start at `ram_base`, the rest at 4 GiB.
    pub ram_size: u64,
    /// The serial port: an MMIO address on arm64, an I/O port on x86-64.
    pub serial: u64,
    /// GICv3 distributor, arm64.
    pub gicd: u64,
    /// First GICv3 redistributor, arm64; the others follow, 128 KiB each.
    pub gicr: u64,
    /// ITS control frame, arm64; the translation frame follows 64 KiB later.
    pub its: u64,
    /// Bytes of the command line, without its NUL.
    pub cmdline_len: u64,
    /// The command line: `key=value` words that the guest understands.
    pub cmdline: [u8; CMDLINE_MAX + 1],
}

/// `SharedPage::state`: what the guest is at.
pub mod state {
    /// Nothing written yet.
    pub const BOOTING: u64 = 0;
    /// Set up as the command line says; the counters run.
    pub const READY: u64 = 1;
    /// Setup failed; `error` says where.
    pub const FAILED: u64 = 2;
}

/// `SharedPage::command`: what an outside party can ask of the guest.
pub mod command {
    /// Nothing.
    pub const NONE: u64 = 0;
    /// Raise every mapped event once by the ITS command `INT` and check that each arrives as its
    /// own LPI: `result` is the number that arrived right, `result2` the number that did not.
    pub const CHECK_EVENTS: u64 = 1;
    /// Mask interrupts and raise the event `argument` (device × events + event): it stays pending.
    /// `result` is its INTID, `result2` the vCPU that is to take it.
    /// On x86-64, which has no ITS, vCPU 0 sends itself one of 64 interrupts.
    pub const RAISE_MASKED: u64 = 2;
    /// Unmask interrupts and wait for the pending LPI: `result` is its INTID (x86-64: its vector), 0
    /// if none came.
    pub const TAKE_PENDING: u64 = 3;
    /// Spoil the ITS so that it can't be moved (EFAULT), the way `argument` says: 1 maps a device without
    /// events whose interrupt translation table is where no RAM is, which only the restore reads; 2
    /// points GITS_BASER<1> (collections) there, which the save writes. A device table that is too small
    /// will not do: Linux 6.12.117 saves it without an error.
    pub const BREAK_ITS: u64 = 4;
    /// Undo [`BREAK_ITS`] and map everything again.
    pub const MEND_ITS: u64 = 5;
    /// Ask the machine to shut down.
    pub const SHUTDOWN: u64 = 6;
    /// Ask the machine to reset.
    pub const RESET: u64 = 7;
    /// Let a timer interrupt vCPU 0 `argument` times a second, and count that in `lpis`. x86-64.
    pub const TIMER: u64 = 8;
}

/// The guest's side: its progress, and a mailbox for commands. A command is posted by writing
/// `argument` and `command`, then adding 1 to `command_seq`; it is done when `done_seq` is equal.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct SharedPage {
    /// See [`state`].
    pub state: u64,
    /// A number that says where setup failed.
    pub error: u64,
    /// Posted by the outside party; counts commands.
    pub command_seq: u64,
    /// See [`command`].
    pub command: u64,
    /// The command's argument.
    pub argument: u64,
    /// The last command that is done.
    pub done_seq: u64,
    /// First result of the last command.
    pub result: u64,
    /// Second result of the last command.
    pub result2: u64,
    /// First byte of the region that the guest keeps dirty.
    pub dirty_base: u64,
    /// Its size in bytes.
    pub dirty_size: u64,
    /// LPIs (x86-64: interrupts) taken since boot.
    pub lpis: u64,
    /// Events mapped in the ITS.
    pub events: u64,
    /// Devices mapped in the ITS.
    pub devices: u64,
    /// Reserved; 0.
    pub reserved: [u64; 3],
    /// One per vCPU, each in a cache line of its own: grows by one for each page that the vCPU
    /// dirties, or each turn of its loop when it dirties none.
    pub counters: [Counter; MAX_VCPUS],
}

/// A vCPU's progress.
#[repr(C, align(64))]
#[derive(Clone, Copy, Debug)]
pub struct Counter {
    /// Grows, and never goes back.
    pub value: u64,
    /// When it last grew, in ticks of the vCPU's own clock (x86-64: the TSC); 0 where there is none.
    pub stamp: u64,
    /// How often it stood still for more than [`GAP_TICKS`].
    pub gap_count: u64,
    /// The last two times of that: the number `n`, counted from 0, is at `n % 2`.
    pub gaps: [Gap; 2],
}

/// Where a vCPU stood still, by its own clock.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Gap {
    /// The last [`Counter::stamp`] before.
    pub from: u64,
    /// The first one after, which may be less where the clock is another one.
    pub to: u64,
}

/// Between two stamps of a vCPU that runs are fewer ticks than these: 40 us at 5 GHz.
pub const GAP_TICKS: u64 = 200_000;

const _: () = assert!(size_of::<BootPage>() <= SHARED_PAGE_OFFSET as usize);
const _: () = assert!(size_of::<SharedPage>() <= 4096);
const _: () = assert!(core::mem::offset_of!(SharedPage, counters) == 128);
const _: () = assert!(size_of::<Counter>() == 64);
