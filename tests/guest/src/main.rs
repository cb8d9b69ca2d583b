//! The bare-metal guest of the tests, the benchmarks and the demo.
//!
//! It sets the machine up as its command line says ([`config`]), shows in the
//! [shared page](blackout_abi::guest::SharedPage) that it is ready, and then works: each vCPU
//! writes to its share of the dirty region, page by page, and counts. vCPU 0 also serves the
//! shared page's mailbox. Nothing here waits for an interrupt, so the counters show from outside
//! whether, and since when, each vCPU runs.
//!
//! The common part is this folder; `aarch64/` and `x86_64/` export the same names:
//!
//! - the entry code: calls [`boot`] on vCPU 0 with the boot page's address, [`run_vcpu`] on the others;
//! - `Machine::new(&BootPage, &Config, &mut Arena) -> Result<Machine, Failure>`: interrupt
//!   controller and whatever else the command line asks for;
//! - `Machine::start_vcpu(&mut self, index) -> Result<(), Failure>`: makes that vCPU call
//!   [`run_vcpu`];
//! - `Machine::command(&mut self, command, argument) -> [u64; 2]`: the mailbox commands;
//! - `Machine::events(&self) -> (devices, events)`: what is mapped;
//! - `turn(vcpu)`: called by each vCPU in each turn of its loop;
//! - `exit(serial)`: does what the monitor has to be asked about, and has no effect;
//! - `put(serial, byte)`: writes the transmit register of the serial port;
//! - `halt() -> !`.
#![no_std]
#![no_main]
#![allow(unsafe_code)]

mod arena;
mod config;
mod serial;
mod shared;
mod work;

#[cfg(target_arch = "aarch64")]
mod aarch64;
#[cfg(target_arch = "aarch64")]
use aarch64 as arch;
#[cfg(target_arch = "x86_64")]
mod x86_64;
#[cfg(target_arch = "x86_64")]
use x86_64 as arch;

use core::fmt::Write;
use core::panic::PanicInfo;

use blackout_abi::guest::{BOOT_MAGIC, BootPage, MAX_VCPUS, state};

use arena::Arena;
use config::Config;
use serial::Serial;
use shared::Shared;

/// Why setup failed: `SharedPage::error`.
#[derive(Clone, Copy, Debug)]
#[repr(u64)]
pub(crate) enum Failure {
    /// The boot page has the wrong magic or version, or more vCPUs than this guest has room for.
    BootPage = 1,
    /// A word of the command line is unknown or has no valid number.
    CommandLine = 2,
    /// RAM is too small for what the command line asks for.
    Memory = 3,
    /// The interrupt controller is not as expected.
    Controller = 4,
    /// The ITS did not take a command in time.
    #[allow(dead_code, reason = "x86-64 has no ITS")]
    CommandQueue = 5,
    /// A vCPU did not start.
    Vcpu = 6,
    /// The CPU took an exception that no code expects.
    #[allow(
        dead_code,
        reason = "the x86-64 part has no IDT: an exception resets the machine"
    )]
    Exception = 7,
    /// This program panicked.
    Panic = 8,
}

/// vCPU 0 starts here, on a stack, with caches on and interrupts masked.
///
/// # Safety
/// `boot_page` is the address of the boot page, with the shared page behind it.
pub(crate) unsafe extern "C" fn boot(boot_page: u64) -> ! {
    // SAFETY: the caller vouches for the address; nobody writes the boot page any more.
    let boot = unsafe { &*(boot_page as *const BootPage) };
    let shared = Shared::behind(boot);
    let mut serial = Serial::new(boot.serial);
    match set_up(boot, shared, &mut serial) {
        Ok(None) => arch::halt(),
        Ok(Some(mut machine)) => work::serve(shared, &mut machine),
        Err(failure) => fail(shared, &mut serial, failure),
    }
}

/// The other vCPUs start here, on a stack of their own.
pub(crate) extern "C" fn run_vcpu(index: usize) -> ! {
    work::run(Shared::get(), index)
}

/// The machine, for vCPU 0 to serve; none if it is to be idle.
fn set_up(
    boot: &'static BootPage,
    shared: Shared,
    serial: &mut Serial,
) -> Result<Option<arch::Machine>, Failure> {
    let vcpus = boot.vcpus as usize;
    if boot.magic != BOOT_MAGIC || boot.version != 1 || !(1..=MAX_VCPUS).contains(&vcpus) {
        return Err(Failure::BootPage);
    }
    let config = Config::parse(boot)?;
    let mut arena = Arena::of(boot);
    let mut machine = arch::Machine::new(boot, &config, &mut arena)?;
    let (devices, events) = machine.events();
    let dirty = arena.take(config.dirty, 4096)?;
    shared.describe(dirty, config.dirty, devices, events);
    work::share_out(dirty, config.dirty, config.vcpus);
    for index in 1..config.vcpus {
        machine.start_vcpu(index)?;
    }
    let _ = writeln!(
        serial,
        "blackout-guest: {} vCPUs, {devices} devices, {events} events, {} bytes dirty",
        config.vcpus, config.dirty
    );
    shared.set_state(state::READY, 0);
    if config.exits {
        work::exit(shared);
    }
    Ok((!config.idle).then_some(machine))
}

fn fail(shared: Shared, serial: &mut Serial, failure: Failure) -> ! {
    let _ = writeln!(serial, "blackout-guest: setup failed: {failure:?}");
    shared.set_state(state::FAILED, failure as u64);
    arch::halt()
}

#[panic_handler]
fn panic(info: &PanicInfo) -> ! {
    let shared = Shared::get();
    let _ = writeln!(Serial::new(shared.serial()), "blackout-guest: {info}");
    shared.set_state(state::FAILED, Failure::Panic as u64);
    arch::halt()
}
