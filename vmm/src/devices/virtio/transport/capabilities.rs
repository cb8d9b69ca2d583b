//! The capabilities that say where a device's structures are (virtio 1.2, 4.1.4).

use super::{BAR, at};
use crate::devices::pci::config::Config;

/// A vendor-specific capability.
const VENDOR_SPECIFIC: u8 = 0x09;

/// `cfg_type`.
const COMMON_CFG: u8 = 1;
const NOTIFY_CFG: u8 = 2;
const ISR_CFG: u8 = 3;
const DEVICE_CFG: u8 = 4;
const PCI_CFG: u8 = 5;

/// Bytes of `struct virtio_pci_cap`, and where its fields are.
const LENGTH: u8 = 16;
const CAP_BAR: u16 = 4;
const CAP_OFFSET: u16 = 8;
const CAP_LENGTH: u16 = 12;
const CAP_DATA: u16 = 16;

/// The capability by which configuration space reaches into the BAR.
pub(super) struct PciCfg {
    at: u16,
}

/// Adds all of them.
pub(super) fn add(config: &mut Config, device_config: usize) -> PciCfg {
    let mut plain = |kind, offset: u64, length: usize| {
        let body = body(kind, 0, offset, length);
        config.add_capability(VENDOR_SPECIFIC, &body, &[]);
    };
    plain(COMMON_CFG, at::COMMON, super::registers::SIZE);
    plain(ISR_CFG, at::ISR, 1);
    if device_config > 0 {
        plain(DEVICE_CFG, at::DEVICE, device_config);
    }
    let mut notify = body(NOTIFY_CFG, 4, at::NOTIFY, at::ROOM as usize);
    notify.extend((at::NOTIFY_STRIDE as u32).to_le_bytes());
    config.add_capability(VENDOR_SPECIFIC, &notify, &[]);

    let mut window = body(PCI_CFG, 4, 0, 0);
    window.extend([0; 4]);
    let mut writable = vec![0; window.len()];
    // The body starts after id and link.
    writable[usize::from(CAP_BAR) - 2] = 0xff;
    writable[usize::from(CAP_OFFSET) - 2..].fill(0xff);
    let at = config.add_capability(VENDOR_SPECIFIC, &window, &writable);
    PciCfg { at }
}

/// What follows id and link; `extra` bytes come after it.
fn body(kind: u8, extra: u8, offset: u64, length: usize) -> Vec<u8> {
    let mut body = vec![LENGTH + extra, kind, BAR as u8, 0, 0, 0];
    body.extend((offset as u32).to_le_bytes());
    body.extend((length as u32).to_le_bytes());
    body
}

impl PciCfg {
    /// Where in the BAR an access to configuration space leads, and how wide it is there; `None`
    /// when the access is not one to the data field, or the driver has not set up a valid one.
    pub(super) fn target(&self, config: &Config, offset: u16, len: usize) -> Option<(u64, usize)> {
        let data = self.at + CAP_DATA;
        if offset != data || !(1..=4).contains(&len) {
            return None;
        }
        let bar = config.dword(self.at + CAP_BAR) & 0xff;
        let target = u64::from(config.dword(self.at + CAP_OFFSET));
        let width = config.dword(self.at + CAP_LENGTH);
        let aligned = matches!(width, 1 | 2 | 4) && target.is_multiple_of(u64::from(width));
        (bar == BAR as u32 && aligned).then_some((target, width as usize))
    }
}
