//! The address space that exits reach: ranges, and the device behind each.

use std::sync::{Arc, Mutex, PoisonError};

use super::BusDevice;

/// A device on a bus, shared with whoever else drives it.
pub type Shared = Arc<Mutex<dyn BusDevice>>;

/// Ranges of one address space: MMIO, or I/O ports. Built once, before the vCPUs run.
#[derive(Default)]
pub struct Bus {
    ranges: Vec<Range>,
}

struct Range {
    base: u64,
    size: u64,
    device: Shared,
}

impl Bus {
    /// Puts `device` at `base`. Ranges must not overlap; `machine.rs` has the only list of them.
    pub fn insert(&mut self, base: u64, size: u64, device: Shared) {
        debug_assert!(
            self.ranges
                .iter()
                .all(|r| base >= r.base + r.size || r.base >= base + size)
        );
        self.ranges.push(Range { base, size, device });
    }

    /// A load; where no device is, it reads as all ones, as a bus with nobody on it does.
    pub fn read(&self, addr: u64, data: &mut [u8]) {
        match self.find(addr, data.len()) {
            Some((range, offset)) => {
                data.fill(0);
                range
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .read(offset, data);
            }
            None => data.fill(0xff),
        }
    }

    /// A store; where no device is, it goes nowhere.
    pub fn write(&self, addr: u64, data: &[u8]) {
        if let Some((device, offset)) = self.find(addr, data.len()) {
            device
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .write(offset, data);
        }
    }

    fn find(&self, addr: u64, len: usize) -> Option<(&Shared, u64)> {
        let end = addr.checked_add(len as u64)?;
        let inside = |r: &&Range| addr >= r.base && end <= r.base + r.size;
        self.ranges
            .iter()
            .find(inside)
            .map(|range| (&range.device, addr - range.base))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Echo;

    impl BusDevice for Echo {
        fn read(&mut self, offset: u64, data: &mut [u8]) {
            data[0] = offset as u8;
        }
        fn write(&mut self, _: u64, _: &[u8]) {}
    }

    #[test]
    fn an_access_reaches_the_device_that_holds_all_of_it() {
        let mut bus = Bus::default();
        bus.insert(0x1000, 8, Arc::new(Mutex::new(Echo)));
        for (addr, len, expected) in [
            (0x1003, 1, [3, 0xee]),
            (0x1006, 2, [6, 0]),
            (0x1007, 2, [0xff, 0xff]),
            (0xfff, 1, [0xff, 0xee]),
            (u64::MAX, 2, [0xff, 0xff]),
        ] {
            let mut data = [0xee; 2];
            bus.read(addr, &mut data[..len]);
            assert_eq!(data, expected, "{addr:#x}, {len} bytes");
        }
    }
}
