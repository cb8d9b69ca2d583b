//! Damaged recordings: an error or a report, but no panic, and no overflow, which debug builds
//! check for.

use blackout::analysis::{self, Loaded};
use blackout::export::{chrome, csv, folded, perfetto, speedscope};
use blackout::recording::{Error, Reader};
use blackout::report::schema::Report;
use blackout::report::text;
use blackout::sets::{self, collect::Collector};

use crate::{TESTBED, scenarios};

/// Everything that the tool makes of a recording.
fn all(bytes: &[u8]) -> Result<(), Error> {
    let name = || "damaged.rec".to_owned();
    let recordings = Loaded::read(name(), Reader::new(name(), bytes)?)?;
    let migrations = analysis::find(&recordings);
    let mut out = Vec::new();
    text::write(&mut out, &recordings, &migrations).unwrap();
    let report = Report::new(&migrations);
    serde_json::to_writer(&mut out, &report).unwrap();
    chrome::write(&mut out, &recordings, &migrations).unwrap();
    perfetto::write(&mut out, &recordings, &migrations).unwrap();
    speedscope::write(&mut out, &migrations).unwrap();
    folded::write(&mut out, &migrations).unwrap();
    csv::write(&mut out, &report).unwrap();
    let mut set = Collector::new(true);
    for migration in &report.migrations {
        set.add(migration).unwrap();
    }
    sets::text::write(&mut out, &set.finish(None)).unwrap();
    Ok(())
}

/// How many of the recordings that `damage` makes of one, a byte at a time, are read and refused.
fn damaged(whole: &[u8], step: usize, damage: impl Fn(usize, &mut Vec<u8>)) -> (usize, usize) {
    let (mut read, mut refused) = (0, 0);
    for at in (0..whole.len()).step_by(step) {
        let mut bytes = whole.to_vec();
        damage(at, &mut bytes);
        match all(&bytes) {
            Ok(()) => read += 1,
            Err(_) => refused += 1,
        }
    }
    (read, refused)
}

#[test]
fn a_flipped_bit_is_refused_or_read() {
    let flip = |at: usize, bytes: &mut Vec<u8>| bytes[at] ^= 1 << (at % 8);
    let (read, refused) = damaged(&scenarios::completed().bytes(), 7, flip);
    assert!(
        read > 100 && refused > 100,
        "{read} read, {refused} refused"
    );
    let (read, refused) = damaged(TESTBED, 101, flip);
    assert!(read > 100 && refused > 10, "{read} read, {refused} refused");
}

#[test]
fn the_largest_numbers_are_refused_or_read() {
    // Ten bytes of a varint's largest value, over whatever stood there.
    let largest = |at: usize, bytes: &mut Vec<u8>| {
        for byte in bytes.iter_mut().skip(at).take(9) {
            *byte = 0xff;
        }
        if let Some(byte) = bytes.get_mut(at + 9) {
            *byte = 1;
        }
    };
    let (read, refused) = damaged(&scenarios::completed().bytes(), 7, largest);
    assert!(
        read + refused > 400 && refused > 100,
        "{read} read, {refused} refused"
    );
}

#[test]
fn a_cut_anywhere_is_read() {
    let cut = |at: usize, bytes: &mut Vec<u8>| bytes.truncate(at);
    let (read, refused) = damaged(&scenarios::completed().bytes(), 7, cut);
    // Only a file without a whole head is refused.
    assert!(refused <= 4 && read > 400, "{read} read, {refused} refused");
}

#[test]
fn impossible_times_are_read() {
    let warps: [fn(u64) -> u64; 6] = [
        |_| 0,
        |_| u64::MAX,
        |ns| u64::MAX - ns,
        |ns| ns.wrapping_mul(0x9e37_79b9_7f4a_7c15),
        |ns| if ns % 2_000 == 0 { 0 } else { u64::MAX },
        |ns| ns + i64::MAX.cast_unsigned(),
    ];
    for warp in warps {
        all(&scenarios::completed().warp(warp).bytes()).unwrap();
        all(&scenarios::its_save_fails().warp(warp).bytes()).unwrap();
    }
}
