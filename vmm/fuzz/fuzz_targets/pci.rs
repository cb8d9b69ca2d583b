//! Configuration space, BARs and MSI-X: stores and loads of every width at any place.
#![no_main]

use blackout_vmm_fuzz::{BAR, Input, Machine};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let mut machine = Machine::default();
    let mut input = Input(data);
    let mut steps = 0;
    while !input.is_empty() && steps < 256 {
        steps += 1;
        let op = input.byte();
        let width = [1, 2, 4, 8][usize::from(op >> 6)];
        let mut bytes = input.bytes::<8>();
        let offset = u64::from(input.word());
        match op & 7 {
            // The five functions that are there, and some that are not.
            0 | 1 => machine.write_config(offset & 0x3_ffff, &bytes[..width]),
            2 => {
                let far = u64::from(input.word()) << 8 | offset & 0xff;
                machine.write_config(far, &bytes[..width]);
            }
            3 => machine.read_config(offset & 0x3_ffff, &mut bytes[..width]),
            // The MSI-X tables and pending bits of the devices, where they start out.
            4 | 5 => {
                let device = offset >> 13 & 3;
                let place = device * BAR + 0x4000 + (offset & 0x1fff);
                machine.write(1, place, &bytes[..width]);
            }
            6 => machine.read(usize::from(op >> 3), offset, &mut bytes[..width]),
            _ => machine.write(usize::from(op >> 3), offset, &bytes[..width]),
        }
    }
});
