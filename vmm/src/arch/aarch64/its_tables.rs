//! Counts what an ITS maps, in the tables that it wrote to guest RAM.
//!
//! KVM has no call that tells, and the stop path has no time to count: this runs when the guest is
//! the other side's already. The layout is KVM's ABI 0
//! (`Documentation/virt/kvm/devices/arm-vgic-its.rst`, "ITS Table ABI REV0"): 8-byte entries, each
//! of which says how far it is to the next one that is valid.
//!
//! The tables are a guest's, so nothing in them is believed: reads outside RAM end the count, and
//! so does [`READS_MAX`].

use super::super::Mapped;
use crate::memory::GuestRam;

/// Bytes of every entry.
const ENTRY: u64 = 8;
/// Bytes of a page of the device table, which KVM always takes as 64 KiB.
const PAGE: u64 = 0x1_0000;
/// Entries that are read at most: 16 times the LPIs that there are.
const READS_MAX: u32 = 1 << 20;

/// Devices and events in the tables below `baser`, the `GITS_BASER<n>` of the device table.
pub(super) fn count(ram: &GuestRam, baser: u64) -> Mapped {
    let mut walk = Walk {
        ram,
        reads: READS_MAX,
        mapped: Mapped::default(),
    };
    // None of the fields is anything while the register is not valid.
    if baser >> 63 == 1 {
        let base = baser & 0xffff_ffff_0000 | (baser >> 12 & 0xf) << 48;
        let size = ((baser & 0xff) + 1) * PAGE;
        if baser >> 62 & 1 == 1 {
            walk.two_levels(base, size);
        } else {
            walk.devices(base, size);
        }
    }
    walk.mapped
}

struct Walk<'a> {
    ram: &'a GuestRam,
    reads: u32,
    mapped: Mapped,
}

impl Walk<'_> {
    /// A first level, each of whose valid entries leads to a page of devices.
    fn two_levels(&mut self, base: u64, size: u64) {
        for offset in (0..size).step_by(ENTRY as usize) {
            let Some(entry) = self.read(base, offset) else {
                return;
            };
            if entry >> 63 == 1 {
                self.devices(entry & 0xf_ffff_ffff_0000, PAGE);
            }
        }
    }

    fn devices(&mut self, base: u64, size: u64) {
        let mut offset = 0;
        while offset < size {
            let Some(entry) = self.read(base, offset) else {
                return;
            };
            let mut next = 1;
            if entry >> 63 == 1 {
                self.mapped.devices += 1;
                let itt = (entry >> 5 & 0xfff_ffff_ffff) << 8;
                self.events(itt, ENTRY << ((entry & 0x1f) + 1));
                next = entry >> 49 & 0x3fff;
            }
            if next == 0 {
                return;
            }
            offset += next * ENTRY;
        }
    }

    fn events(&mut self, itt: u64, size: u64) {
        let mut offset = 0;
        while offset < size {
            let Some(entry) = self.read(itt, offset) else {
                return;
            };
            let mut next = 1;
            if entry >> 16 & 0xffff_ffff != 0 {
                self.mapped.events += 1;
                next = entry >> 48;
            }
            if next == 0 {
                return;
            }
            offset += next * ENTRY;
        }
    }

    fn read(&mut self, base: u64, offset: u64) -> Option<u64> {
        self.reads = self.reads.checked_sub(1)?;
        let mut entry = [0; ENTRY as usize];
        let gpa = base.checked_add(offset)?;
        self.ram.read(gpa, &mut entry).ok()?;
        Some(u64::from_le_bytes(entry))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BASE: u64 = 0x4000_0000;
    const VALID: u64 = 1 << 63;

    /// RAM with entries at addresses.
    fn ram(entries: &[(u64, u64)]) -> GuestRam {
        let ram = GuestRam::new(&[(BASE, 4 * PAGE)]).unwrap();
        for (gpa, entry) in entries {
            ram.write(*gpa, &entry.to_le_bytes()).unwrap();
        }
        ram
    }

    /// A device whose events are at `itt`.
    fn device(next: u64, itt: u64, bits: u64) -> u64 {
        VALID | next << 49 | (itt >> 8) << 5 | (bits - 1)
    }

    fn event(next: u64, lpi: u64) -> u64 {
        next << 48 | lpi << 16
    }

    fn counted(ram: &GuestRam, baser: u64) -> (u64, u64) {
        let Mapped { devices, events } = count(ram, baser);
        (devices, events)
    }

    #[test]
    fn entries_lead_to_the_next_one() {
        let itt = BASE + PAGE;
        let ram = ram(&[
            // Devices 1 and 5; the stale one between them is skipped.
            (BASE + 8, device(4, itt, 2)),
            (BASE + 3 * 8, device(1, itt, 2)),
            (BASE + 5 * 8, device(0, itt + 0x100, 5)),
            (itt, event(3, 8192)),
            (itt + 3 * 8, event(0, 8193)),
            (itt + 0x100 + 31 * 8, event(0, 8194)),
        ]);
        assert_eq!(counted(&ram, VALID | BASE), (2, 3));
        assert_eq!(counted(&ram, BASE), (0, 0));
    }

    #[test]
    fn two_levels_lead_to_pages_of_devices() {
        let (first, second) = (BASE + PAGE, BASE + 2 * PAGE);
        let ram = ram(&[
            (BASE, VALID | first),
            (BASE + 8, first),
            (BASE + 16, VALID | second),
            (first, device(0, BASE + 3 * PAGE, 1)),
            (second + 16, device(0, BASE + 3 * PAGE, 1)),
            (BASE + 3 * PAGE, event(0, 8192)),
        ]);
        let baser = VALID | 1 << 62 | BASE;
        assert_eq!(counted(&ram, baser), (2, 2));
    }

    #[test]
    fn hostile_tables_end_the_count() {
        // A device table and an ITT that are the same memory, which says that all of it is valid.
        let endless = device(1, BASE, 31);
        let entries: Vec<_> = (0..4 * PAGE / 8).map(|n| (BASE + n * 8, endless)).collect();
        let (devices, events) = counted(&ram(&entries), VALID | BASE | 0xff);
        assert!(devices + events <= u64::from(READS_MAX));
        // Tables where no RAM is.
        assert_eq!(counted(&ram(&[]), VALID | 0xffff_ffff_0000), (0, 0));
        assert_eq!(
            counted(&ram(&[(BASE, device(1, 0, 31))]), VALID | BASE),
            (1, 0)
        );
    }
}
