//! Common configuration (virtio 1.2, 4.1.4.3): pure registers, which say what a store means beyond
//! them.

use serde::{Deserialize, Serialize};

use super::super::worker::NEEDS_RESET;

/// Bytes of the structure.
pub(super) const SIZE: usize = 0x3c;

/// Device status bits.
pub(super) const FEATURES_OK: u8 = 8;
pub(super) const DRIVER_OK: u8 = 4;

/// Feature bits of queues and transport; every device has them.
pub(super) const INDIRECT_DESC: u64 = 1 << 28;
pub(super) const EVENT_IDX: u64 = 1 << 29;
pub(super) const VERSION_1: u64 = 1 << 32;
pub(super) const RING_RESET: u64 = 1 << 40;

/// No vector: nobody is interrupted.
pub(super) const NO_VECTOR: u16 = 0xffff;

/// The registers.
#[derive(Debug)]
pub(super) struct Registers {
    /// What the device offers.
    pub(super) offered: u64,
    /// Interrupt vectors of the function.
    vectors: usize,
    pub(super) driver: Driver,
}

/// What the driver has written; it migrates.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Driver {
    feature_select: u32,
    driver_feature_select: u32,
    pub(super) features: u64,
    pub(super) config_vector: u16,
    queue_select: u16,
    pub(super) queues: Vec<QueueRegisters>,
}

/// One queue's registers.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct QueueRegisters {
    pub(super) max_size: u16,
    pub(super) size: u16,
    pub(super) vector: u16,
    pub(super) enabled: bool,
    pub(super) desc: u64,
    pub(super) avail: u64,
    pub(super) used: u64,
}

/// What a store asks for.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Written {
    /// It is done.
    Nothing,
    /// This is written to the device status.
    Status(u8),
    /// The driver wants the queue to be served.
    QueueEnabled(usize),
    /// The driver wants the queue back.
    QueueReset(usize),
}

/// Offsets.
mod reg {
    pub(super) const FEATURE_SELECT: u64 = 0x00;
    pub(super) const FEATURES: u64 = 0x04;
    pub(super) const DRIVER_FEATURE_SELECT: u64 = 0x08;
    pub(super) const DRIVER_FEATURES: u64 = 0x0c;
    pub(super) const CONFIG_VECTOR: u64 = 0x10;
    pub(super) const NUM_QUEUES: u64 = 0x12;
    pub(super) const STATUS: u64 = 0x14;
    pub(super) const QUEUE_SELECT: u64 = 0x16;
    pub(super) const QUEUE_SIZE: u64 = 0x18;
    pub(super) const QUEUE_VECTOR: u64 = 0x1a;
    pub(super) const QUEUE_ENABLE: u64 = 0x1c;
    pub(super) const QUEUE_NOTIFY_OFF: u64 = 0x1e;
    pub(super) const QUEUE_DESC: u64 = 0x20;
    pub(super) const QUEUE_AVAIL: u64 = 0x28;
    pub(super) const QUEUE_USED: u64 = 0x30;
    pub(super) const QUEUE_RESET: u64 = 0x3a;
}

impl QueueRegisters {
    fn new(max_size: u16) -> Self {
        QueueRegisters {
            max_size,
            size: max_size,
            vector: NO_VECTOR,
            enabled: false,
            desc: 0,
            avail: 0,
            used: 0,
        }
    }

    /// Back to what the driver found.
    pub(super) fn reset(&mut self) {
        *self = QueueRegisters::new(self.max_size);
    }
}

impl Registers {
    /// For a device with these features and queues, on a function with `vectors` interrupts.
    pub(super) fn new(features: u64, queue_sizes: &[u16], vectors: usize) -> Self {
        let queues = queue_sizes.iter().map(|&size| QueueRegisters::new(size));
        Registers {
            offered: features | INDIRECT_DESC | EVENT_IDX | VERSION_1 | RING_RESET,
            vectors,
            driver: Driver {
                feature_select: 0,
                driver_feature_select: 0,
                features: 0,
                config_vector: NO_VECTOR,
                queue_select: 0,
                queues: queues.collect(),
            },
        }
    }

    /// What the driver finds.
    pub(super) fn reset(&mut self) {
        let sizes: Vec<_> = self.driver.queues.iter().map(|q| q.max_size).collect();
        *self = Registers::new(self.offered, &sizes, self.vectors);
    }

    /// Whether the driver's choice of features is one that can be.
    pub(super) fn features_fit(&self) -> bool {
        self.driver.features & !self.offered == 0 && self.driver.features & VERSION_1 != 0
    }

    /// A load of any width at any offset.
    pub(super) fn read(&self, offset: u64, data: &mut [u8], status: u8) {
        let image = self.image(status);
        let from = usize::try_from(offset).unwrap_or(usize::MAX);
        let bytes = image.get(from..).unwrap_or_default();
        for (byte, &value) in data.iter_mut().zip(bytes) {
            *byte = value;
        }
    }

    /// A store; one that is not as wide as its register does nothing, save that the halves of a
    /// queue's addresses can be written one by one. `status` is the device status.
    pub(super) fn write(&mut self, offset: u64, data: &[u8], status: u8) -> Written {
        let driver = &mut self.driver;
        match *data {
            [a, b, c, d] => {
                let value = u32::from_le_bytes([a, b, c, d]);
                match offset {
                    reg::FEATURE_SELECT => driver.feature_select = value,
                    reg::DRIVER_FEATURE_SELECT => driver.driver_feature_select = value,
                    reg::DRIVER_FEATURES if status & FEATURES_OK == 0 => {
                        let shift = driver.driver_feature_select.saturating_mul(32);
                        if let (Some(mask), Some(bits)) = (
                            u64::from(u32::MAX).checked_shl(shift),
                            u64::from(value).checked_shl(shift),
                        ) {
                            driver.features = driver.features & !mask | bits;
                        }
                    }
                    _ => self.write_address(offset, data),
                }
            }
            [a, b] => return self.write_word(offset, u16::from_le_bytes([a, b]), status),
            [value] if offset == reg::STATUS => return Written::Status(value),
            [_, _, _, _, _, _, _, _] => self.write_address(offset, data),
            _ => {}
        }
        Written::Nothing
    }

    fn write_word(&mut self, offset: u64, value: u16, status: u8) -> Written {
        let vectors = self.vectors;
        let known = |vector: u16| usize::from(vector) < vectors;
        let vector = if known(value) { value } else { NO_VECTOR };
        match offset {
            reg::CONFIG_VECTOR => self.driver.config_vector = vector,
            reg::QUEUE_SELECT => self.driver.queue_select = value,
            _ => {
                let index = usize::from(self.driver.queue_select);
                let reset = self.driver.features & RING_RESET != 0 && status & FEATURES_OK != 0;
                let Some(queue) = self.driver.queues.get_mut(index) else {
                    return Written::Nothing;
                };
                match offset {
                    reg::QUEUE_SIZE if !queue.enabled => queue.size = value,
                    reg::QUEUE_VECTOR => queue.vector = vector,
                    reg::QUEUE_ENABLE if value == 1 && !queue.enabled => {
                        queue.enabled = true;
                        return Written::QueueEnabled(index);
                    }
                    reg::QUEUE_RESET if value == 1 && queue.enabled && reset => {
                        return Written::QueueReset(index);
                    }
                    _ => {}
                }
            }
        }
        Written::Nothing
    }

    /// A store to a queue's address: all of it, or one half.
    fn write_address(&mut self, offset: u64, data: &[u8]) {
        let index = usize::from(self.driver.queue_select);
        let Some(queue) = self.driver.queues.get_mut(index).filter(|q| !q.enabled) else {
            return;
        };
        let address = match offset & !7 {
            reg::QUEUE_DESC => &mut queue.desc,
            reg::QUEUE_AVAIL => &mut queue.avail,
            reg::QUEUE_USED => &mut queue.used,
            _ => return,
        };
        let mut bytes = address.to_le_bytes();
        let from = (offset & 7) as usize;
        if let (true, Some(part)) = (
            from.is_multiple_of(4),
            bytes.get_mut(from..from + data.len()),
        ) {
            part.copy_from_slice(data);
            *address = u64::from_le_bytes(bytes);
        }
    }

    /// All registers, as they read now.
    fn image(&self, status: u8) -> [u8; SIZE] {
        let driver = &self.driver;
        let window = |select: u32, bits: u64| match select {
            0 => bits as u32,
            1 => (bits >> 32) as u32,
            _ => 0,
        };
        let mut image = [0; SIZE];
        let mut put = |offset: u64, bytes: &[u8]| {
            let offset = offset as usize;
            image[offset..offset + bytes.len()].copy_from_slice(bytes);
        };
        put(reg::FEATURE_SELECT, &driver.feature_select.to_le_bytes());
        let offered = window(driver.feature_select, self.offered);
        put(reg::FEATURES, &offered.to_le_bytes());
        let select = driver.driver_feature_select;
        put(reg::DRIVER_FEATURE_SELECT, &select.to_le_bytes());
        let chosen = window(select, driver.features);
        put(reg::DRIVER_FEATURES, &chosen.to_le_bytes());
        put(reg::CONFIG_VECTOR, &driver.config_vector.to_le_bytes());
        let queues = driver.queues.len() as u16;
        put(reg::NUM_QUEUES, &queues.to_le_bytes());
        put(reg::STATUS, &[status]);
        put(reg::QUEUE_SELECT, &driver.queue_select.to_le_bytes());
        // A queue that is not there has size 0.
        if let Some(queue) = driver.queues.get(usize::from(driver.queue_select)) {
            put(reg::QUEUE_SIZE, &queue.size.to_le_bytes());
            put(reg::QUEUE_VECTOR, &queue.vector.to_le_bytes());
            put(reg::QUEUE_ENABLE, &u16::from(queue.enabled).to_le_bytes());
            put(reg::QUEUE_NOTIFY_OFF, &driver.queue_select.to_le_bytes());
            put(reg::QUEUE_DESC, &queue.desc.to_le_bytes());
            put(reg::QUEUE_AVAIL, &queue.avail.to_le_bytes());
            put(reg::QUEUE_USED, &queue.used.to_le_bytes());
        }
        image
    }
}

/// The device status, as the driver sees it after it wrote `value` to `old`: bits only come, save
/// by a reset; `fits` says whether its features are accepted.
pub(super) fn next_status(old: u8, value: u8, fits: bool) -> u8 {
    let mut next = old | value & !NEEDS_RESET;
    if !fits {
        next &= !FEATURES_OK | old;
    }
    next
}

#[cfg(test)]
mod tests {
    use super::*;

    fn registers() -> Registers {
        Registers::new(1 << 5, &[256, 64], 3)
    }

    fn word(registers: &Registers, offset: u64) -> u16 {
        let mut bytes = [0; 2];
        registers.read(offset, &mut bytes, 0);
        u16::from_le_bytes(bytes)
    }

    #[test]
    fn features_are_read_and_chosen_in_halves() {
        let mut r = registers();
        let mut low = [0; 4];
        r.read(reg::FEATURES, &mut low, 0);
        assert_eq!(u32::from_le_bytes(low), 1 << 5 | 1 << 28 | 1 << 29);
        r.write(reg::FEATURE_SELECT, &1u32.to_le_bytes(), 0);
        r.read(reg::FEATURES, &mut low, 0);
        assert_eq!(u32::from_le_bytes(low), 1 | 1 << 8);
        r.write(reg::DRIVER_FEATURES, &(1u32 << 5).to_le_bytes(), 0);
        assert!(!r.features_fit());
        r.write(reg::DRIVER_FEATURE_SELECT, &1u32.to_le_bytes(), 0);
        r.write(reg::DRIVER_FEATURES, &1u32.to_le_bytes(), 0);
        assert!(r.features_fit());
        // A half that there is not, and a choice that is made already.
        r.write(reg::DRIVER_FEATURE_SELECT, &u32::MAX.to_le_bytes(), 0);
        r.write(reg::DRIVER_FEATURES, &u32::MAX.to_le_bytes(), 0);
        r.write(reg::DRIVER_FEATURE_SELECT, &0u32.to_le_bytes(), 0);
        r.write(reg::DRIVER_FEATURES, &[0xff; 4], FEATURES_OK);
        assert_eq!(r.driver.features, 1 << 5 | VERSION_1);
    }

    #[test]
    fn each_queue_has_its_own_registers_until_it_is_enabled() {
        let mut r = registers();
        r.write(reg::QUEUE_SELECT, &[1, 0], 0);
        assert_eq!(word(&r, reg::QUEUE_SIZE), 64);
        r.write(reg::QUEUE_SIZE, &[32, 0], 0);
        r.write(reg::QUEUE_DESC, &0x1_2345_6000_u64.to_le_bytes(), 0);
        r.write(reg::QUEUE_USED, &0x8000u32.to_le_bytes(), 0);
        r.write(reg::QUEUE_USED + 4, &1u32.to_le_bytes(), 0);
        r.write(reg::QUEUE_VECTOR, &[2, 0], 0);
        let enabled = r.write(reg::QUEUE_ENABLE, &[1, 0], 0);
        assert_eq!(enabled, Written::QueueEnabled(1));
        r.write(reg::QUEUE_SIZE, &[8, 0], 0);
        r.write(reg::QUEUE_DESC, &[0; 8], 0);
        let queue = &r.driver.queues[1];
        assert_eq!(
            (queue.size, queue.desc, queue.used),
            (32, 0x1_2345_6000, 0x1_0000_8000)
        );
        assert_eq!((queue.vector, r.driver.queues[0].size), (2, 256));
        r.write(reg::QUEUE_VECTOR, &[3, 0], 0);
        assert_eq!(word(&r, reg::QUEUE_VECTOR), NO_VECTOR);
        r.write(reg::QUEUE_SELECT, &[7, 0], 0);
        assert_eq!(
            (word(&r, reg::QUEUE_SIZE), word(&r, reg::NUM_QUEUES)),
            (0, 2)
        );
        assert_eq!(r.write(reg::QUEUE_ENABLE, &[1, 0], 0), Written::Nothing);
    }

    #[test]
    fn a_queue_is_reset_only_if_that_was_negotiated() {
        let mut r = registers();
        r.write(reg::QUEUE_ENABLE, &[1, 0], 0);
        let reset = |r: &mut Registers| r.write(reg::QUEUE_RESET, &[1, 0], FEATURES_OK);
        assert_eq!(reset(&mut r), Written::Nothing);
        r.driver.features = RING_RESET;
        assert_eq!(reset(&mut r), Written::QueueReset(0));
    }

    #[test]
    fn any_access_is_answered() {
        let mut r = registers();
        for offset in 0..0x1000 {
            for width in [1, 2, 3, 4, 8] {
                let mut data = [0xff; 8];
                r.write(offset, &data[..width], 0);
                r.read(offset, &mut data[..width], 0);
            }
        }
    }

    #[test]
    fn status_bits_come_and_stay() {
        assert_eq!(next_status(0, 3, false), 3);
        assert_eq!(next_status(3, 11, true), 11);
        assert_eq!(next_status(3, 11, false), 3);
        assert_eq!(next_status(11, 4, false), 15);
        assert_eq!(next_status(15, 0x80, true), 0x8f);
        assert_eq!(next_status(3, 0x40, true), 3);
    }
}
