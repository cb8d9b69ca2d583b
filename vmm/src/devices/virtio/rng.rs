//! A source of randomness (virtio 1.2, 5.4): the host's.

use std::io;
use std::os::fd::RawFd;

use super::queue::Io;
use super::{Device, Fault, Kind};
use crate::devices::StateError;

const REQUESTS: usize = 0;
const QUEUE_SIZES: &[u16] = &[64];

/// The most bytes that one chain gets; a driver that wants more asks again.
const CHUNK: usize = 4096;

/// The device; it has no state.
#[derive(Debug, Default)]
pub struct Rng;

impl Device for Rng {
    fn kind(&self) -> Kind {
        Kind::Entropy
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &'static [u16] {
        QUEUE_SIZES
    }

    fn config(&self) -> &[u8] {
        &[]
    }

    fn claim(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn release(&mut self) {}

    fn accept(&mut self, _: u64) -> io::Result<()> {
        Ok(())
    }

    fn reset(&mut self) {}

    fn save(&mut self) -> Result<Vec<u8>, StateError> {
        Ok(Vec::new())
    }

    fn load(&mut self, state: &[u8]) -> Result<(), StateError> {
        if state.is_empty() {
            return Ok(());
        }
        Err(StateError::Invalid("an rng has no state".to_owned()))
    }

    fn sources(&self) -> Vec<RawFd> {
        Vec::new()
    }

    fn start(&mut self, _: &mut Io, _: bool) -> Result<(), Fault> {
        Ok(())
    }

    fn kicked(&mut self, _: usize, io: &mut Io) -> Result<(), Fault> {
        while let Some(chain) = io.next(REQUESTS)? {
            if chain.writable.is_empty() {
                return Err(Fault::Request("a request for randomness has no buffer"));
            }
            let mut bytes = [0; CHUNK];
            let len = chain.writable.len().min(CHUNK);
            getrandom::fill(&mut bytes[..len])
                .map_err(|e| Fault::Host("reading the host's randomness", e.into()))?;
            let written = chain.writable.fill(&bytes[..len]);
            io.done(REQUESTS, chain.head, written)?;
        }
        io.notify(REQUESTS)
    }

    fn ready(&mut self, _: usize, _: &mut Io) -> Result<(), Fault> {
        Ok(())
    }

    fn finish(&mut self, _: &mut Io) -> Result<u64, Fault> {
        Ok(0)
    }
}
