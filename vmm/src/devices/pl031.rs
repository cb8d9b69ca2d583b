//! The arm64 clock of the day: a PL031 (vm-superio's), which counts the seconds of this host.
//!
//! Its alarm is not there, so it needs no interrupt. A guest that moves gets the time of the
//! host that it moves to.

use std::ffi::CStr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use vm_superio::Rtc;
use vm_superio::rtc_pl031::{NoEvents, RtcState};

use super::{BusDevice, DeviceState, StateError, decode, encode};

/// The clock. Clones share it: one is on the bus, one is what migrates.
#[derive(Clone, Debug)]
pub struct Pl031 {
    rtc: Arc<Mutex<Rtc<NoEvents>>>,
}

#[derive(Serialize, Deserialize)]
struct Saved {
    load: u32,
    /// Seconds that the guest's clock is ahead of the host's.
    offset: i64,
    match_: u32,
    mask: u32,
    raw: u32,
}

const STATE_VERSION: u32 = 1;

impl Default for Pl031 {
    /// A clock that shows the host's time.
    fn default() -> Self {
        Pl031 {
            rtc: Arc::new(Mutex::new(Rtc::new())),
        }
    }
}

impl Pl031 {
    fn lock(&self) -> MutexGuard<'_, Rtc<NoEvents>> {
        self.rtc.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Registers are 32 bits wide; other accesses read as 0 and go nowhere.
impl BusDevice for Pl031 {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        if let (Ok(data), Ok(offset)) = (data.try_into(), offset.try_into()) {
            self.lock().read(offset, data);
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let (Ok(data), Ok(offset)) = (data.try_into(), offset.try_into()) {
            self.lock().write(offset, data);
        }
    }
}

impl DeviceState for Pl031 {
    fn name(&self) -> &CStr {
        c"rtc"
    }

    fn version(&self) -> u32 {
        STATE_VERSION
    }

    fn save(&mut self) -> Result<Vec<u8>, StateError> {
        let state = self.lock().state();
        encode(&Saved {
            load: state.lr,
            offset: state.offset,
            match_: state.mr,
            mask: state.imsc,
            raw: state.ris,
        })
    }

    fn load(&mut self, version: u32, state: &[u8]) -> Result<(), StateError> {
        let saved: Saved = decode(STATE_VERSION, version, state)?;
        let state = RtcState {
            lr: saved.load,
            offset: saved.offset,
            mr: saved.match_,
            imsc: saved.mask,
            ris: saved.raw,
        };
        *self.lock() = Rtc::from_state(&state, NoEvents);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DATA: u64 = 0;
    const LOAD: u64 = 8;

    fn seconds(rtc: &mut Pl031) -> u32 {
        let mut data = [0; 4];
        rtc.read(DATA, &mut data);
        u32::from_le_bytes(data)
    }

    #[test]
    fn a_guest_that_set_its_clock_keeps_it_when_it_moves() {
        let mut source = Pl031::default();
        let host = seconds(&mut source);
        source.write(LOAD, &(host + 1000).to_le_bytes());
        let state = source.save().unwrap();
        let mut destination = Pl031::default();
        destination.load(STATE_VERSION, &state).unwrap();
        assert!((1000..1060).contains(&(seconds(&mut destination) - host)));
    }

    #[test]
    fn any_access_and_any_state_is_answered() {
        let mut rtc = Pl031::default();
        for offset in 0..0x1000 {
            for width in [0, 1, 2, 4, 8] {
                let mut data = [0xff; 8];
                rtc.write(offset, &data[..width]);
                rtc.read(offset, &mut data[..width]);
            }
        }
        let saved = Saved {
            load: 0,
            offset: i64::MAX,
            match_: 0,
            mask: 0,
            raw: 0,
        };
        rtc.load(STATE_VERSION, &encode(&saved).unwrap()).unwrap();
        seconds(&mut rtc);
    }
}
