//! The transport and the devices: a driver that sets queues up and fills rings with anything.
#![no_main]

use blackout_vmm_fuzz::{BAR, Input, Machine, RAM};
use libfuzzer_sys::fuzz_target;

/// Where the rings of the driver's queues are.
const DESC: u64 = 0x1000;
const AVAIL: u64 = 0x2000;
const USED: u64 = 0x3000;
const STRIDE: u64 = 0x4000;

fn register(machine: &mut Machine, device: u64, offset: u64, data: &[u8]) {
    machine.write(1, device * BAR + offset, data);
}

/// What every driver does, so that the fuzzer need not find it out.
fn set_up(machine: &mut Machine, device: u64, features: u32) {
    machine.write_config((device + 1) << 15 | 4, &[6, 0]);
    for status in [0u8, 3] {
        register(machine, device, 0x14, &[status]);
    }
    register(machine, device, 0x08, &0u32.to_le_bytes());
    register(machine, device, 0x0c, &features.to_le_bytes());
    register(machine, device, 0x08, &1u32.to_le_bytes());
    register(machine, device, 0x0c, &(1u32 | 1 << 8).to_le_bytes());
    register(machine, device, 0x14, &[11]);
    for queue in 0..3u16 {
        let base = u64::from(queue) * STRIDE;
        register(machine, device, 0x16, &queue.to_le_bytes());
        register(machine, device, 0x18, &16u16.to_le_bytes());
        for (offset, ring) in [(0x20, DESC), (0x28, AVAIL), (0x30, USED)] {
            register(machine, device, offset, &(base + ring).to_le_bytes());
        }
        register(machine, device, 0x1c, &1u16.to_le_bytes());
    }
    register(machine, device, 0x14, &[15]);
}

fuzz_target!(|data: &[u8]| {
    let mut machine = Machine::default();
    let mut input = Input(data);
    let device = u64::from(input.byte() & 3);
    // Indirect descriptors and event indices, or not.
    let features = u32::from(input.byte() & 3) << 28;
    set_up(&mut machine, device, features);
    machine.stop_and_start();
    let mut steps = 0;
    while !input.is_empty() && steps < 64 {
        steps += 1;
        let op = input.byte();
        let queue = u64::from(op >> 3 & 3);
        let base = queue * STRIDE;
        match op & 7 {
            0 | 1 => {
                let slot = u64::from(input.byte() & 15);
                let mut descriptor = input.bytes::<16>();
                // Most addresses are in RAM, most lengths small.
                if op & 0x80 == 0 {
                    descriptor[2] &= 0x0f;
                    descriptor[3..8].fill(0);
                    descriptor[9] &= 0x1f;
                    descriptor[10..12].fill(0);
                    descriptor[13] = 0;
                    descriptor[14] &= 15;
                    descriptor[15] = 0;
                }
                let _ = machine.ram.write(base + DESC + 16 * slot, &descriptor);
            }
            2 => {
                let (place, head) = (u64::from(input.byte() & 15), input.word());
                let _ = machine
                    .ram
                    .write(base + AVAIL + 4 + 2 * place, &head.to_le_bytes());
            }
            3 => {
                let index = input.word().to_le_bytes();
                let _ = machine.ram.write(base + AVAIL + 2, &index);
                register(&mut machine, device, 0x3000 + 4 * queue, &[0, 0]);
            }
            4 => {
                let at = u64::from(input.word()) << 4 & (RAM - 1);
                let _ = machine.ram.write(at, &input.bytes::<16>());
            }
            5 => {
                let (offset, bytes) = (u64::from(input.byte() & 0x3f), input.bytes::<4>());
                let width = [1, 2, 4][usize::from(op >> 6) % 3];
                register(&mut machine, device, offset, &bytes[..width]);
            }
            6 => machine.stop_and_start(),
            _ => set_up(&mut machine, device, features),
        }
    }
    machine.stop_and_start();
});
