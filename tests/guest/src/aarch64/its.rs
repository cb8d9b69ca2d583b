//! The ITS: devices × events, each mapped to an LPI, spread over the vCPUs.

use blackout_abi::guest::BootPage;

use super::gic::{FIRST_LPI, Gic, LPIS};
use super::queue::{self, Queue};
use super::registers::Registers;
use crate::Failure;
use crate::arena::Arena;
use crate::config::Config;

/// The unit in which KVM takes the device and collection tables.
const TABLE_PAGE: u64 = 0x1_0000;
/// Devices that one page of the device table has room for, with entries of 8 bytes.
const DEVICES_PER_PAGE: u32 = (TABLE_PAGE / ENTRY) as u32;
const ENTRY: u64 = 8;
/// The smallest interrupt translation table: its address is a multiple of this.
const ITT_ALIGN: u64 = 256;

mod gits {
    pub(crate) const CTLR: u64 = 0x0;
    pub(crate) const ENABLED: u32 = 1;
    pub(crate) const TYPER: u64 = 0x8;
    pub(crate) const BASER: u64 = 0x100;
    pub(crate) const BASER_TYPE_DEVICES: u64 = 1;
    pub(crate) const BASER_TYPE_COLLECTIONS: u64 = 4;
    pub(crate) const BASER_INDIRECT: u64 = 1 << 62;
    /// Valid, inner-shareable, write-back, pages of 64 KiB.
    pub(crate) const BASER_FLAGS: u64 = 1 << 63 | 7 << 59 | 1 << 10 | 2 << 8;
    /// The bits of a `GITS_BASER` that only the ITS sets: entry size and type.
    pub(crate) const BASER_FIXED: u64 = 0x1f << 48 | 7 << 56;
}

/// One of `GITS_BASER<n>`.
#[derive(Clone, Copy)]
struct Baser {
    offset: u64,
    value: u64,
}

/// An ITS that is on, with everything mapped.
pub(crate) struct Its {
    registers: Registers,
    queue: Queue,
    devices: u32,
    events: u32,
    vcpus: usize,
    device_table: Baser,
    collection_table: Baser,
    /// First interrupt translation table, and the bytes of each.
    itts: u64,
    itt_size: u64,
    /// An address with neither RAM nor a device.
    nowhere: u64,
}

impl Its {
    /// Turns the ITS on and maps what the command line asks for.
    pub(crate) fn new(
        boot: &BootPage,
        config: &Config,
        gic: &Gic,
        arena: &mut Arena,
    ) -> Result<Self, Failure> {
        if boot.its == 0 {
            return Err(Failure::Controller);
        }
        let registers = Registers(boot.its);
        let itt_entry = (registers.read64(gits::TYPER) >> 4 & 0xf) + 1;
        let itt_size = (itt_entry << event_bits(config.its_events)).max(ITT_ALIGN);
        let device_table = device_table(registers, config, arena)?;
        let collections = find_baser(registers, gits::BASER_TYPE_COLLECTIONS)?;
        let mut its = Its {
            registers,
            queue: Queue::new(registers, arena)?,
            devices: config.its_devices,
            events: config.its_events,
            vcpus: config.vcpus,
            device_table,
            collection_table: Baser {
                value: gits::BASER_FLAGS | arena.take(TABLE_PAGE, TABLE_PAGE)?,
                ..collections
            },
            itts: arena.take(itt_size * u64::from(config.its_devices), ITT_ALIGN)?,
            itt_size,
            nowhere: boot.ram_base + boot.ram_size.next_multiple_of(1 << 30) + (1 << 30),
        };
        its.enable();
        its.map(gic)?;
        Ok(its)
    }

    /// Devices and events mapped.
    pub(crate) fn mapped(&self) -> (u64, u64) {
        let devices = u64::from(self.devices);
        (devices, devices * u64::from(self.events))
    }

    /// Maps collections, devices and events.
    pub(crate) fn map(&mut self, gic: &Gic) -> Result<(), Failure> {
        for vcpu in 0..self.vcpus {
            let processor = gic.processor_number(vcpu);
            self.queue.push(queue::mapc(vcpu as u64, processor))?;
        }
        for device in 0..self.devices {
            self.map_device(device, device)?;
            for event in 0..self.events {
                let index = self.index(device, event);
                let collection = self.vcpu_of(index) as u64;
                self.queue
                    .push(queue::mapti(device, event, lpi_of(index), collection))?;
            }
        }
        for vcpu in 0..self.vcpus {
            self.queue.push(queue::invall(vcpu as u64))?;
            self.queue.push(queue::sync(gic.processor_number(vcpu)))?;
        }
        self.queue.flush()
    }

    /// Raises each event once, a device at a time: how many came as their own LPI to their own
    /// vCPU, and how many did not.
    pub(crate) fn check_events(&mut self) -> Result<[u64; 2], Failure> {
        let (mut right, mut wrong) = (0, 0);
        for device in 0..self.devices {
            let first = self.index(device, 0);
            let indices = first..first + u64::from(self.events);
            indices.clone().map(lpi_of).for_each(Gic::forget);
            for event in 0..self.events {
                self.queue.push(queue::int(device, event))?;
            }
            self.queue.flush()?;
            for index in indices {
                if Gic::wait_for(lpi_of(index)) == (1, self.vcpu_of(index)) {
                    right += 1;
                } else {
                    wrong += 1;
                }
            }
        }
        Ok([right, wrong])
    }

    /// The vCPU and the LPI of the event number `index`, devices × events.
    pub(crate) fn target(&self, index: u64) -> Option<(usize, u32)> {
        (index < self.mapped().1).then(|| (self.vcpu_of(index), lpi_of(index)))
    }

    /// Raises the event number `index`.
    pub(crate) fn raise(&mut self, index: u64) -> Result<(), Failure> {
        let events = u64::from(self.events);
        self.queue
            .push(queue::int((index / events) as u32, (index % events) as u32))?;
        self.queue.flush()
    }

    /// Leaves the ITS so that its tables can't be moved: with a device without events whose interrupt
    /// translation table is where no RAM is, or with a collection table there.
    pub(crate) fn break_tables(&mut self, how: u64) -> Result<(), Failure> {
        if how == 1 {
            let (device, bits) = (self.spare_device(), event_bits(self.events));
            self.queue.push(queue::mapd(device, self.nowhere, bits))?;
            return self.queue.flush();
        }
        self.registers.write(gits::CTLR, 0);
        self.write_baser(Baser {
            value: gits::BASER_FLAGS | self.nowhere,
            ..self.collection_table
        });
        self.registers.write(gits::CTLR, gits::ENABLED);
        Ok(())
    }

    /// Undoes [`Its::break_tables`] and maps everything again.
    pub(crate) fn mend_tables(&mut self, gic: &Gic) -> Result<(), Failure> {
        self.registers.write(gits::CTLR, 0);
        self.enable();
        self.queue.push(queue::unmap_device(self.spare_device()))?;
        self.map(gic)
    }

    fn enable(&mut self) {
        self.write_baser(self.device_table);
        self.write_baser(self.collection_table);
        self.registers.write(gits::CTLR, gits::ENABLED);
    }

    fn write_baser(&self, baser: Baser) {
        self.registers.write64(baser.offset, baser.value);
    }

    fn map_device(&mut self, device: u32, itt: u32) -> Result<(), Failure> {
        let address = self.itts + u64::from(itt) * self.itt_size;
        let bits = event_bits(self.events);
        self.queue.push(queue::mapd(device, address, bits))
    }

    /// A DeviceID in the last page of the device table that no device has.
    fn spare_device(&self) -> u32 {
        self.devices.next_multiple_of(DEVICES_PER_PAGE)
    }

    fn index(&self, device: u32, event: u32) -> u64 {
        u64::from(device) * u64::from(self.events) + u64::from(event)
    }

    fn vcpu_of(&self, index: u64) -> usize {
        (index % self.vcpus as u64) as usize
    }
}

/// The LPI of the event number `index`. There are fewer LPIs than events can be mapped: they are
/// given out in turn, and again from the first.
fn lpi_of(index: u64) -> u32 {
    FIRST_LPI + (index % u64::from(LPIS)) as u32
}

fn event_bits(events: u32) -> u32 {
    events.next_power_of_two().trailing_zeros().max(1)
}

/// A device table with room for all devices and a page more, for [`Its::break_tables`]. With two
/// levels, the first is one page that leads to the others.
fn device_table(
    registers: Registers,
    config: &Config,
    arena: &mut Arena,
) -> Result<Baser, Failure> {
    let baser = find_baser(registers, gits::BASER_TYPE_DEVICES)?;
    let pages = u64::from(config.its_devices.div_ceil(DEVICES_PER_PAGE)) + 1;
    if pages > 256 {
        return Err(Failure::CommandLine);
    }
    let table = arena.take(pages * TABLE_PAGE, TABLE_PAGE)?;
    let mut value = gits::BASER_FLAGS | table | (pages - 1);
    if config.its_indirect {
        let first = arena.take(TABLE_PAGE, TABLE_PAGE)?;
        for page in 0..pages {
            let entry = (first + page * ENTRY) as *mut u64;
            // SAFETY: the arena just gave this page out.
            unsafe { entry.write_volatile(1 << 63 | (table + page * TABLE_PAGE)) };
        }
        value = gits::BASER_FLAGS | gits::BASER_INDIRECT | first;
    }
    registers.write64(baser.offset, value);
    let fixed = gits::BASER_FIXED | gits::BASER_FLAGS;
    if registers.read64(baser.offset) & !fixed != value & !fixed {
        return Err(Failure::Controller);
    }
    Ok(Baser { value, ..baser })
}

fn find_baser(registers: Registers, kind: u64) -> Result<Baser, Failure> {
    (0..8)
        .map(|n| gits::BASER + n * 8)
        .find(|&offset| registers.read64(offset) >> 56 & 7 == kind)
        .map(|offset| Baser { offset, value: 0 })
        .ok_or(Failure::Controller)
}
