//! The probe that calibration hits.
#![allow(unsafe_code)]

/// Its provider and name.
pub(super) const PROBE: (&str, &str) = ("blackout", "calibrate");

/// Fires it, with two arguments, as many of this project's probes have.
#[inline(never)]
pub(super) fn hit(first: u64, second: u64) {
    probe::probe!(blackout, calibrate, first, second);
}
