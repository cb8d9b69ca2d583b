//! A network card (virtio 1.2, 5.1) whose other end is a tap interface of the host.
//!
//! Packets to the host go from the guest's buffers straight into the tap. Packets to the guest go
//! over one buffer, because how many of the guest's a packet needs shows only once it is read.

mod tap;

use std::fmt;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6,
    VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_MAC, VIRTIO_NET_F_MRG_RXBUF,
    VIRTIO_NET_F_STATUS, VIRTIO_NET_S_LINK_UP,
};

use super::queue::{Chain, Io};
use super::{Device, Fault, Kind};
use crate::devices::{StateError, decode, encode};
use crate::memory::transfer::PIECES_MAX;
use tap::{HEADER, Offloads, Tap};

const RX: usize = 0;
const TX: usize = 1;
const QUEUE_SIZES: &[u16] = &[256, 256];

/// The longest packet: an IP datagram with what can come before it, and its virtio header.
const PACKET_MAX: usize = 65535 + 18 + HEADER;

/// Packets that are taken from the tap before the worker looks whether it is to stop.
const BATCH: usize = 256;

/// Where the header says how many buffers a packet takes.
const NUM_BUFFERS: usize = 10;

/// Bytes of `struct virtio_net_config` up to the status.
const CONFIG_SIZE: usize = 8;

/// An Ethernet address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mac([u8; 6]);

/// How a card is to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// The tap interface's name.
    pub tap: String,
    /// The card's address.
    pub mac: Mac,
}

/// A card could not be connected.
#[derive(Debug, thiserror::Error)]
#[error("tap interface {tap}")]
pub struct Error {
    /// The interface.
    pub tap: String,
    /// Why.
    pub source: io::Error,
}

/// The end of a cable: one packet a read or write, each with its header; it never blocks.
trait Wire: Send {
    /// The file that packets go through.
    fn file(&self) -> &File;
    /// Says which packets the guest can take.
    fn set_offloads(&self, offloads: Offloads) -> io::Result<()>;
}

impl Wire for Tap {
    fn file(&self) -> &File {
        Tap::file(self)
    }

    fn set_offloads(&self, offloads: Offloads) -> io::Result<()> {
        Tap::set_offloads(self, offloads)
    }
}

/// The card.
pub struct Net {
    mac: Mac,
    config: [u8; CONFIG_SIZE],
    wire: Box<dyn Wire>,
    mergeable: bool,
    /// A packet that was read and waits for the guest to have buffers for it.
    waiting: usize,
    packet: Box<[u8; PACKET_MAX]>,
}

#[derive(Serialize, Deserialize)]
struct Saved {
    mac: Mac,
    waiting: Vec<u8>,
}

impl Net {
    /// Opens the tap interface.
    ///
    /// # Errors
    /// When it can't be opened.
    pub fn open(options: &Options) -> Result<Self, Error> {
        let error = |source| Error {
            tap: options.tap.clone(),
            source,
        };
        let tap = Tap::open(&options.tap).map_err(error)?;
        Ok(Net::new(Box::new(tap), options.mac))
    }

    fn new(wire: Box<dyn Wire>, mac: Mac) -> Self {
        let mut config = [0; CONFIG_SIZE];
        config[..6].copy_from_slice(&mac.0);
        config[6..].copy_from_slice(&(VIRTIO_NET_S_LINK_UP as u16).to_le_bytes());
        Net {
            mac,
            config,
            wire,
            mergeable: false,
            waiting: 0,
            packet: Box::new([0; PACKET_MAX]),
        }
    }

    /// Takes packets from the tap as long as there are some and the guest has buffers.
    fn receive(&mut self, io: &mut Io) -> Result<(), Fault> {
        let mut left = BATCH;
        while io.has(RX) {
            if self.waiting == 0 {
                match self.wire.file().read(&mut self.packet[..]) {
                    // Nobody else's packet is as short as its header.
                    Ok(read) if read > HEADER => self.waiting = read,
                    Ok(_) => continue,
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                    // The interface is down; a read works again when it is up.
                    Err(error) if error.raw_os_error() == Some(libc::EIO) => break,
                    Err(error) => return Err(Fault::Host("reading from the tap", error)),
                }
            }
            if !self.deliver(io)? {
                break;
            }
            self.waiting = 0;
            left -= 1;
            if left == 0 {
                // The tap says nothing again for what is there already.
                io.again(RX);
                break;
            }
        }
        io.notify(RX)
    }

    /// Puts the packet that waits into the guest's buffers; `false` when it has too few now.
    fn deliver(&mut self, io: &mut Io) -> Result<bool, Fault> {
        let mut chains: Vec<Chain> = Vec::new();
        let mut room = 0;
        while room < self.waiting {
            if !chains.is_empty() && (!self.mergeable || chains.len() == PIECES_MAX) {
                // A driver that is not to get a packet in parts has too small a buffer for it.
                break;
            }
            let Some(chain) = io.next(RX)? else {
                chains.iter().for_each(|_| io.put_back(RX));
                return Ok(false);
            };
            room += chain.writable.len();
            chains.push(chain);
        }
        let count = u16::try_from(chains.len()).unwrap_or(u16::MAX);
        self.packet[NUM_BUFFERS..HEADER].copy_from_slice(&count.to_le_bytes());
        let mut rest = self.packet.get(..self.waiting).unwrap_or_default();
        for chain in chains {
            let written = chain.writable.fill(rest);
            rest = rest.get(written..).unwrap_or_default();
            io.done(RX, chain.head, written)?;
        }
        Ok(true)
    }

    /// Gives the tap what the guest sends.
    fn transmit(&mut self, io: &mut Io) -> Result<(), Fault> {
        while let Some(chain) = io.next(TX)? {
            if chain.readable.len() <= HEADER {
                return Err(Fault::Request("a packet has no whole header"));
            }
            match chain.readable.write_to(self.wire.file(), None) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    io.put_back(TX);
                    break;
                }
                // The kernel does not take it, or the interface is down: a network loses packets.
                Err(error) => tracing::debug!("a packet is lost: {error}"),
                Ok(_) => {}
            }
            io.done(TX, chain.head, 0)?;
        }
        io.notify(TX)
    }

    /// Tells the switches of the network where the guest is now, as QEMU does: one RARP request in
    /// its name.
    fn announce(&self) {
        if let Err(error) = self.wire.file().write(&announcement(self.mac)) {
            tracing::warn!("the network is not told that the guest has moved: {error}");
        }
    }
}

/// A RARP request of `mac` for itself (RFC 903), with its virtio header.
fn announcement(Mac(mac): Mac) -> Vec<u8> {
    const RARP: [u8; 2] = [0x80, 0x35];
    const ETHERNET_IPV4_REQUEST: [u8; 8] = [0, 1, 8, 0, 6, 4, 0, 3];
    const NO_ADDRESS: [u8; 4] = [0; 4];
    const FRAME_MIN: usize = 60;
    let mut packet = vec![0; HEADER];
    packet.extend([0xff; 6]);
    packet.extend(mac);
    packet.extend(RARP);
    packet.extend(ETHERNET_IPV4_REQUEST);
    for _ in 0..2 {
        packet.extend(mac);
        packet.extend(NO_ADDRESS);
    }
    packet.resize(HEADER + FRAME_MIN, 0);
    packet
}

impl Device for Net {
    fn kind(&self) -> Kind {
        Kind::Net
    }

    fn features(&self) -> u64 {
        let bits = [
            VIRTIO_NET_F_CSUM,
            VIRTIO_NET_F_GUEST_CSUM,
            VIRTIO_NET_F_MAC,
            VIRTIO_NET_F_GUEST_TSO4,
            VIRTIO_NET_F_GUEST_TSO6,
            VIRTIO_NET_F_HOST_TSO4,
            VIRTIO_NET_F_HOST_TSO6,
            VIRTIO_NET_F_MRG_RXBUF,
            VIRTIO_NET_F_STATUS,
        ];
        bits.into_iter().fold(0, |all, bit| all | 1 << bit)
    }

    fn queue_sizes(&self) -> &'static [u16] {
        QUEUE_SIZES
    }

    fn config(&self) -> &[u8] {
        &self.config
    }

    fn claim(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn release(&mut self) {}

    fn accept(&mut self, features: u64) -> io::Result<()> {
        let has = |bit: u32| features & 1 << bit != 0;
        self.mergeable = has(VIRTIO_NET_F_MRG_RXBUF);
        self.wire.set_offloads(Offloads {
            csum: has(VIRTIO_NET_F_GUEST_CSUM),
            tso4: has(VIRTIO_NET_F_GUEST_TSO4),
            tso6: has(VIRTIO_NET_F_GUEST_TSO6),
        })
    }

    fn reset(&mut self) {
        self.waiting = 0;
    }

    fn save(&mut self) -> Result<Vec<u8>, StateError> {
        encode(&Saved {
            mac: self.mac,
            waiting: self.packet[..self.waiting].to_vec(),
        })
    }

    fn load(&mut self, state: &[u8]) -> Result<(), StateError> {
        let saved: Saved = decode(0, 0, state)?;
        if saved.mac != self.mac {
            let (theirs, ours) = (saved.mac, self.mac);
            return Err(StateError::Invalid(format!(
                "the guest's network card is {theirs}, here it is {ours}: give mac={theirs}"
            )));
        }
        let Some(packet) = self.packet.get_mut(..saved.waiting.len()) else {
            return Err(StateError::Invalid("a packet that is too long".to_owned()));
        };
        packet.copy_from_slice(&saved.waiting);
        self.waiting = saved.waiting.len();
        Ok(())
    }

    fn sources(&self) -> Vec<RawFd> {
        vec![self.wire.file().as_raw_fd()]
    }

    fn start(&mut self, _: &mut Io, arrived: bool) -> Result<(), Fault> {
        if arrived {
            self.announce();
        }
        Ok(())
    }

    fn kicked(&mut self, queue: usize, io: &mut Io) -> Result<(), Fault> {
        match queue {
            RX => self.receive(io),
            _ => self.transmit(io),
        }
    }

    fn ready(&mut self, _: usize, io: &mut Io) -> Result<(), Fault> {
        self.transmit(io)?;
        self.receive(io)
    }

    fn finish(&mut self, _: &mut Io) -> Result<u64, Fault> {
        Ok(0)
    }
}

impl Mac {
    /// An address for a card that was given none: the same for the same tap interface, and not
    /// likely another's.
    pub fn of_tap(tap: &str) -> Self {
        /// Locally administered, for one station.
        const LOCAL: u8 = 0x02;
        let [a, b, c, d] = crc32c::crc32c(tap.as_bytes()).to_be_bytes();
        Mac([LOCAL, b'B', a, b, c, d])
    }
}

impl FromStr for Mac {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("'{text}' is no address of one card, such as 52:54:00:12:34:56");
        let byte = |part: &str| match part.len() {
            2 => u8::from_str_radix(part, 16).ok(),
            _ => None,
        };
        let bytes: Option<Vec<u8>> = text.split(':').map(byte).collect();
        let mac: [u8; 6] = bytes.and_then(|b| b.try_into().ok()).ok_or_else(wrong)?;
        // The first bit is that of groups.
        if mac[0] & 1 != 0 || mac == [0; 6] {
            return Err(wrong());
        }
        Ok(Mac(mac))
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Mac([a, b, c, d, e, g]) = self;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

#[cfg(test)]
mod tests;
