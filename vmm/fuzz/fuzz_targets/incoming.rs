//! What a hostile source sends to a destination: the monitor stays up, ends the migration, and runs no
//! guest that has not arrived.
#![no_main]

use blackout_vmm_fuzz::Input;
use libfuzzer_sys::fuzz_target;
use vmm::migration::fuzz::{Step, take_in, take_in_file, take_in_lanes};
use vmm_sys_util::signal::register_signal_handler;

// Rust's own start of a program does this, and libFuzzer's does not: who writes to a peer that is gone
// gets an error.
fuzz_target!(init: {
    extern "C" fn ignore(_: i32, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}
    register_signal_handler(libc::SIGPIPE, ignore).expect("a handler for SIGPIPE");
}, |data: &[u8]| {
    let mut input = Input(data);
    let how = input.byte();
    let mut steps = Vec::new();
    while !input.is_empty() {
        let step = match input.byte() % 6 {
            0 => {
                let kind = input.byte();
                Step::Frame(kind, take(&mut input))
            }
            1 => {
                let [round, pages, last, sum] = input.bytes();
                let sum = (sum > 200).then_some(u32::from(sum));
                Step::RoundEnd(round.into(), pages.into(), last & 1 == 1, sum)
            }
            2 => {
                let number = input.byte();
                Step::Device(number, take(&mut input))
            }
            3 => Step::Frame(5, pages(&mut input)),
            4 => Step::End,
            _ => Step::Raw(take(&mut input)),
        };
        steps.push(step);
    }
    if how & 4 == 4 {
        let pages = [how >> 3, how >> 5, how >> 6];
        let half = steps.split_off(steps.len() / 2);
        return take_in_lanes(&[steps, half], &pages);
    }
    if how & 0x82 == 0x82 {
        let at = u64::from(how >> 3 & 3) << 12;
        return take_in_file(if how & 1 == 1 { at } else { u64::MAX - at }, &steps);
    }
    take_in(how & 1 == 1, how & 2 == 0, (how >> 3) / 8, &steps);
});

/// CRC-32C of a page of zeroes.
const ZEROES: [u8; 4] = 0x98f9_4189_u32.to_le_bytes();

/// The next bytes, as many as the first of them says.
fn take(input: &mut Input<'_>) -> Vec<u8> {
    let length = usize::from(input.byte()).min(input.0.len());
    (0..length).map(|_| input.byte()).collect()
}

/// Records of pages, zeroes most of them, at places that may be.
fn pages(input: &mut Input<'_>) -> Vec<u8> {
    let [round, records] = input.bytes();
    let mut payload = u32::from(round).to_le_bytes().to_vec();
    for _ in 0..records % 8 {
        let [page, count, content, fill] = input.bytes();
        payload.extend((u64::from(page) * 4096).to_le_bytes());
        payload.extend(u32::from(count).to_le_bytes());
        payload.extend(u32::from(content % 4).to_le_bytes());
        match content % 4 {
            1 => payload.resize(payload.len() + usize::from(count % 4) * 4096, fill),
            // The checksum of a page of zeroes, or of none.
            2 if fill < 200 => (0..count).for_each(|_| payload.extend(ZEROES)),
            2 => payload.resize(payload.len() + usize::from(count) * 4, fill),
            _ => {}
        }
    }
    payload
}
