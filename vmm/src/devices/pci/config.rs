//! A function's configuration space: a type 0 header, BARs, and capabilities.
//!
//! Each byte has a mask of the bits that the guest can write; that alone makes sizing work, since
//! the low bits of a BAR are not among them. What a write means beyond its bytes, the function says.

use serde::{Deserialize, Serialize};

use super::super::StateError;

/// Bytes of a conventional function's space. What ECAM has beyond it reads as zero.
pub const SIZE: usize = 256;

/// BARs of a type 0 header.
pub const BARS: usize = 6;

/// Offsets in the header (PCI 3.0, 6.1).
mod header {
    pub(super) const VENDOR: usize = 0x00;
    pub(super) const DEVICE: usize = 0x02;
    pub(super) const COMMAND: usize = 0x04;
    pub(super) const STATUS: usize = 0x06;
    pub(super) const REVISION: usize = 0x08;
    pub(super) const CLASS: usize = 0x09;
    pub(super) const BAR0: usize = 0x10;
    pub(super) const SUBSYSTEM_VENDOR: usize = 0x2c;
    pub(super) const SUBSYSTEM: usize = 0x2e;
    pub(super) const CAPABILITIES: usize = 0x34;
    pub(super) const INTERRUPT_LINE: usize = 0x3c;
    /// Where capabilities start.
    pub(super) const END: usize = 0x40;
}

/// Bits of the command register.
const COMMAND_MEMORY: u16 = 1 << 1;
const COMMAND_MASTER: u16 = 1 << 2;
const COMMAND_INTX_OFF: u16 = 1 << 10;

/// The status register's bit that says that there are capabilities.
const STATUS_CAPABILITIES: u16 = 1 << 4;

/// A BAR's low bits: memory, 64 bits, prefetchable.
const BAR_64_PREFETCHABLE: u32 = 0b1100;

/// Who a function is.
#[derive(Clone, Copy, Debug)]
pub struct Identity {
    /// Vendor.
    pub vendor: u16,
    /// Device.
    pub device: u16,
    /// Revision.
    pub revision: u8,
    /// Class, subclass, programming interface, as `0xCCSSPP`.
    pub class: u32,
    /// Subsystem vendor.
    pub subsystem_vendor: u16,
    /// Subsystem.
    pub subsystem: u16,
}

/// Configuration space.
#[derive(Clone, Debug)]
pub struct Config {
    bytes: [u8; SIZE],
    writable: [u8; SIZE],
    /// As built: what a reset goes back to.
    at_reset: [u8; SIZE],
    bar_sizes: [u64; BARS],
    /// Where the next capability goes.
    end: usize,
    /// Where the last capability's pointer to the next is.
    link: usize,
}

/// What migrates: the bytes that the guest can write, in place.
#[derive(Debug, Serialize, Deserialize)]
pub struct Saved {
    bytes: Vec<u8>,
}

impl Config {
    /// A function with no BARs and no capabilities.
    pub fn new(identity: &Identity) -> Self {
        let mut config = Config {
            bytes: [0; SIZE],
            writable: [0; SIZE],
            at_reset: [0; SIZE],
            bar_sizes: [0; BARS],
            end: header::END,
            link: header::CAPABILITIES,
        };
        let [class, subclass, interface] = [16, 8, 0].map(|shift| (identity.class >> shift) as u8);
        config.put(header::VENDOR, &identity.vendor.to_le_bytes());
        config.put(header::DEVICE, &identity.device.to_le_bytes());
        config.put(header::REVISION, &[identity.revision]);
        config.put(header::CLASS, &[interface, subclass, class]);
        config.put(
            header::SUBSYSTEM_VENDOR,
            &identity.subsystem_vendor.to_le_bytes(),
        );
        config.put(header::SUBSYSTEM, &identity.subsystem.to_le_bytes());
        let command = COMMAND_MEMORY | COMMAND_MASTER | COMMAND_INTX_OFF;
        config.allow(header::COMMAND, &command.to_le_bytes());
        config.allow(header::INTERRUPT_LINE, &[0xff]);
        config.at_reset = config.bytes;
        config
    }

    /// Adds a 64-bit prefetchable memory BAR of `size` bytes, a power of two, at `index` and the
    /// one after it. It decodes nothing until the guest has given it an address and switched memory
    /// on.
    pub fn add_bar(&mut self, index: usize, size: u64) {
        debug_assert!(size.is_power_of_two() && size >= 16 && index + 1 < BARS);
        let at = header::BAR0 + 4 * index;
        let mask = !(size - 1);
        self.put(at, &BAR_64_PREFETCHABLE.to_le_bytes());
        self.allow(at, &mask.to_le_bytes());
        self.bar_sizes[index] = size;
        self.at_reset = self.bytes;
    }

    /// Adds a capability; `body` is what follows its id and link, `writable` the bits of it that
    /// the guest can write. Returns its offset.
    pub fn add_capability(&mut self, id: u8, body: &[u8], writable: &[u8]) -> u16 {
        let at = self.end;
        debug_assert!(at + 2 + body.len() <= SIZE && writable.len() <= body.len());
        self.put(at, &[id, 0]);
        self.put(at + 2, body);
        self.allow(at + 2, writable);
        self.put(self.link, &[at as u8]);
        self.link = at + 1;
        self.end = (at + 2 + body.len()).next_multiple_of(4);
        self.put(header::STATUS, &STATUS_CAPABILITIES.to_le_bytes());
        self.at_reset = self.bytes;
        at as u16
    }

    /// A load; beyond [`SIZE`] everything is zero.
    pub fn read(&self, offset: u16, data: &mut [u8]) {
        for (at, byte) in (usize::from(offset)..).zip(data) {
            *byte = self.bytes.get(at).copied().unwrap_or(0);
        }
    }

    /// A store; bits that can't be written stay.
    pub fn write(&mut self, offset: u16, data: &[u8]) {
        for (at, &byte) in (usize::from(offset)..).zip(data) {
            if let (Some(old), Some(mask)) = (self.bytes.get_mut(at), self.writable.get(at)) {
                *old = *old & !mask | byte & mask;
            }
        }
    }

    /// The 16-bit register at `offset`.
    pub fn word(&self, offset: u16) -> u16 {
        let mut bytes = [0; 2];
        self.read(offset, &mut bytes);
        u16::from_le_bytes(bytes)
    }

    /// The 32-bit register at `offset`.
    pub fn dword(&self, offset: u16) -> u32 {
        let mut bytes = [0; 4];
        self.read(offset, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    /// Where each BAR decodes, as index, address and size; none while memory is switched off.
    pub fn decoded(&self) -> impl Iterator<Item = (usize, u64, u64)> {
        let on = self.word(header::COMMAND as u16) & COMMAND_MEMORY != 0;
        let sizes = self.bar_sizes.iter().enumerate();
        sizes
            .filter(move |&(_, &size)| on && size > 0)
            .map(|(index, &size)| {
                let at = (header::BAR0 + 4 * index) as u16;
                let address = u64::from(self.dword(at)) | u64::from(self.dword(at + 4)) << 32;
                (index, address & !(size - 1), size)
            })
    }

    /// Gives the BAR `index` an address before the guest runs, as firmware would.
    pub fn place_bar(&mut self, index: usize, address: u64) {
        let at = (header::BAR0 + 4 * index) as u16;
        self.write(at, &address.to_le_bytes());
        self.at_reset = self.bytes;
    }

    /// The size of the BAR `index`; 0 when there is none.
    pub fn bar_size(&self, index: usize) -> u64 {
        self.bar_sizes.get(index).copied().unwrap_or(0)
    }

    /// Back to what it was before the guest wrote.
    pub fn reset(&mut self) {
        self.bytes = self.at_reset;
    }

    /// What migrates.
    pub fn save(&self) -> Saved {
        let bytes = self.bytes.to_vec();
        Saved { bytes }
    }

    /// Takes over what the guest had written. What it can't write must be the same on both sides.
    ///
    /// # Errors
    /// When it is not.
    pub fn load(&mut self, saved: &Saved) -> Result<(), StateError> {
        if saved.bytes.len() != SIZE {
            let problem = format!("{} bytes of configuration space", saved.bytes.len());
            return Err(StateError::Invalid(problem));
        }
        let fixed = self.bytes.iter().zip(&saved.bytes).zip(&self.writable);
        if let Some(at) = fixed
            .enumerate()
            .position(|(_, ((ours, theirs), mask))| (ours ^ theirs) & !mask != 0)
        {
            return Err(StateError::Invalid(format!(
                "its configuration space differs from the source's at {at:#x}: \
                 give this device the same options on both sides"
            )));
        }
        self.bytes.copy_from_slice(&saved.bytes);
        Ok(())
    }

    fn put(&mut self, at: usize, bytes: &[u8]) {
        self.bytes[at..at + bytes.len()].copy_from_slice(bytes);
    }

    fn allow(&mut self, at: usize, mask: &[u8]) {
        self.writable[at..at + mask.len()].copy_from_slice(mask);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn function() -> Config {
        let mut config = Config::new(&Identity {
            vendor: 0x1af4,
            device: 0x1042,
            revision: 1,
            class: 0x01_80_00,
            subsystem_vendor: 0x1af4,
            subsystem: 2,
        });
        config.add_bar(0, 0x8000);
        config
    }

    #[test]
    fn a_header_says_who_it_is() {
        let config = function();
        assert_eq!(config.dword(0), 0x1042_1af4);
        assert_eq!(config.dword(8), 0x0180_0001);
        assert_eq!(config.dword(0x2c), 0x0002_1af4);
        assert_eq!(config.word(0xfff), 0);
    }

    #[test]
    fn sizing_reads_back_the_size_whatever_the_width_of_the_write() {
        for width in [1, 2, 4, 8] {
            let mut config = function();
            for offset in (0x10..0x18).step_by(width) {
                config.write(offset, &[0xff; 8][..width]);
            }
            assert_eq!(config.dword(0x10), 0xffff_800c, "width {width}");
            assert_eq!(config.dword(0x14), 0xffff_ffff);
        }
    }

    #[test]
    fn a_bar_decodes_where_it_was_put_while_memory_is_on() {
        let mut config = function();
        config.write(0x10, &0x40_1234_5678_u64.to_le_bytes());
        assert_eq!(config.decoded().count(), 0);
        config.write(4, &[0x02]);
        let decoded: Vec<_> = config.decoded().collect();
        assert_eq!(decoded, [(0, 0x40_1234_0000, 0x8000)]);
        config.reset();
        assert_eq!((config.decoded().count(), config.dword(0x10)), (0, 0xc));
    }

    #[test]
    fn capabilities_are_a_list() {
        let mut config = function();
        let first = config.add_capability(0x11, &[1, 2, 3, 4, 5], &[0, 0xc0]);
        let second = config.add_capability(0x09, &[9; 14], &[]);
        assert_eq!((first, second), (0x40, 0x48));
        assert_eq!(config.word(6) & 0x10, 0x10);
        assert_eq!(config.dword(0x34) & 0xff, 0x40);
        assert_eq!(config.word(0x40), 0x4811);
        assert_eq!(config.word(0x48), 0x0009);
        config.write(0x40, &[0xff; 8]);
        assert_eq!(config.dword(0x40), 0xc201_4811);
    }

    #[test]
    fn any_access_is_answered() {
        let mut config = function();
        for offset in 0..=u16::MAX {
            let mut data = [0xee; 8];
            config.write(offset, &data);
            config.read(offset, &mut data);
        }
        assert_eq!(config.dword(0), 0x1042_1af4);
    }

    #[test]
    fn what_the_guest_wrote_is_loaded_and_nothing_else() {
        let mut source = function();
        source.write(0x10, &[0xff; 8]);
        source.write(4, &[6, 0]);
        let mut destination = function();
        destination.load(&source.save()).unwrap();
        assert_eq!(destination.bytes, source.bytes);

        let mut other = source.save();
        other.bytes[0x2e] ^= 1;
        assert!(destination.load(&other).is_err());
        other.bytes.pop();
        assert!(destination.load(&other).is_err());
    }
}
