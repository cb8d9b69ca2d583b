//! Sockets between guest and host (virtio 1.2, 5.10), which lead to unix sockets of the host.
//!
//! `packet.rs` is what is in the queues, `connection.rs` one stream with its credit, `hub.rs` all of
//! them. The kernel's vhost-vsock would do the same, but its connections and its writes to guest
//! RAM can't be seen from here, and so not be migrated. What does not migrate are connections: they
//! have an end on the source's host. The guest is told on the destination, and its programs connect
//! again.

mod connection;
mod hub;
mod packet;

use std::io;
use std::os::fd::RawFd;
use std::path::PathBuf;

use super::queue::Io;
use super::{Device, Fault, Kind};
use crate::devices::{StateError, decode, encode};
use hub::Hub;
use packet::Header;

const RX: usize = 0;
const TX: usize = 1;
const EVENT: usize = 2;
const QUEUE_SIZES: &[u16] = &[256, 256, 16];

/// Packets for the guest before the worker looks whether it is to stop.
const BATCH: usize = 128;

/// The most data of one packet to the guest.
const DATA_MAX: usize = 64 << 10;

/// `VIRTIO_VSOCK_EVENT_TRANSPORT_RESET`.
const TRANSPORT_RESET: [u8; 4] = [0; 4];

/// How a vsock is to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// The guest's address: above the host's, which is 2.
    pub cid: u32,
    /// The socket for connections to the guest; those from it lead to sockets of this name with
    /// an underscore and the port behind it.
    pub path: PathBuf,
}

/// The device.
pub struct Vsock {
    cid: u64,
    config: [u8; 8],
    hub: Hub,
    /// Connections were lost in a migration, and the guest is to know.
    lost: bool,
    data: Vec<u8>,
}

impl Vsock {
    /// A vsock that listens once it has claimed its socket.
    ///
    /// # Errors
    /// When the host has no descriptors left.
    pub fn new(options: &Options) -> io::Result<Self> {
        let cid = u64::from(options.cid);
        Ok(Vsock {
            cid,
            config: cid.to_le_bytes(),
            hub: Hub::new(&options.path)?,
            lost: false,
            data: vec![0; DATA_MAX],
        })
    }

    /// Packets from the guest, as long as their answers find room.
    fn transmit(&mut self, io: &mut Io) -> Result<(), Fault> {
        while self.hub.has_room() {
            let Some(mut chain) = io.next(TX)? else {
                break;
            };
            if let Some(header) = Header::from_guest(&mut chain.readable, self.cid) {
                self.hub.receive(&header, &chain.readable);
            }
            io.done(TX, chain.head, 0)?;
        }
        io.notify(TX)
    }

    /// Packets for the guest, as long as it has buffers.
    fn receive(&mut self, io: &mut Io) -> Result<(), Fault> {
        let mut left = BATCH;
        while self.hub.has_next() {
            let Some(mut chain) = io.next(RX)? else {
                break;
            };
            let Some(room) = chain.writable.len().checked_sub(packet::SIZE) else {
                return Err(Fault::Request("a vsock buffer has no room for a header"));
            };
            let room = self.data.get_mut(..room.min(DATA_MAX)).unwrap_or_default();
            let Some(header) = self.hub.next(room) else {
                io.put_back(RX);
                continue;
            };
            let place = chain.writable.split_to(packet::SIZE);
            place.fill(&header.to_guest(self.cid));
            let len = usize::try_from(header.len).unwrap_or(usize::MAX);
            let data = self.data.get(..len).unwrap_or_default();
            let written = packet::SIZE + chain.writable.fill(data);
            io.done(RX, chain.head, written)?;
            left -= 1;
            if left == 0 {
                io.again(RX);
                break;
            }
        }
        io.notify(RX)
    }

    /// Tells the guest that its connections are gone.
    fn tell_lost(&mut self, io: &mut Io) -> Result<(), Fault> {
        if self.lost
            && let Some(chain) = io.next(EVENT)?
        {
            let written = chain.writable.fill(&TRANSPORT_RESET);
            io.done(EVENT, chain.head, written)?;
            self.lost = false;
        }
        io.notify(EVENT)
    }
}

impl Device for Vsock {
    fn kind(&self) -> Kind {
        Kind::Vsock
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &'static [u16] {
        QUEUE_SIZES
    }

    fn config(&self) -> &[u8] {
        &self.config
    }

    /// The socket: source and destination may be given the same one on one host.
    fn claim(&mut self) -> io::Result<()> {
        self.hub.listen()
    }

    fn release(&mut self) {
        self.hub.close();
    }

    fn accept(&mut self, _: u64) -> io::Result<()> {
        Ok(())
    }

    fn reset(&mut self) {
        self.hub.reset();
        self.lost = false;
    }

    fn save(&mut self) -> Result<Vec<u8>, StateError> {
        encode(&self.cid)
    }

    fn load(&mut self, state: &[u8]) -> Result<(), StateError> {
        let cid: u64 = decode(0, 0, state)?;
        if cid != self.cid {
            let ours = self.cid;
            let problem = format!("the guest's cid is {cid}, here it is {ours}: give cid={cid}");
            return Err(StateError::Invalid(problem));
        }
        self.hub.reset();
        self.lost = true;
        Ok(())
    }

    fn sources(&self) -> Vec<RawFd> {
        vec![self.hub.fd()]
    }

    fn start(&mut self, _: &mut Io, _: bool) -> Result<(), Fault> {
        Ok(())
    }

    fn kicked(&mut self, queue: usize, io: &mut Io) -> Result<(), Fault> {
        match queue {
            EVENT => self.tell_lost(io),
            TX => {
                self.transmit(io)?;
                self.receive(io)
            }
            _ => {
                self.receive(io)?;
                // Answers that filled up may have made way.
                self.transmit(io)
            }
        }
    }

    fn ready(&mut self, _: usize, io: &mut Io) -> Result<(), Fault> {
        self.hub
            .wake()
            .map_err(|e| Fault::Host("waiting for sockets", e))?;
        self.receive(io)
    }

    fn finish(&mut self, _: &mut Io) -> Result<u64, Fault> {
        Ok(0)
    }
}

#[cfg(test)]
mod tests;
