//! The packets of a vsock (virtio 1.2, 5.10.6).

use crate::memory::transfer::Pieces;

/// The host's address.
pub(super) const HOST: u64 = 2;

/// Bytes of `struct virtio_vsock_hdr`.
pub(super) const SIZE: usize = 44;

/// A stream, the only type that is offered.
const STREAM: u16 = 1;

/// `SHUTDOWN`'s flags: the sender will not receive, will not send.
pub(super) const NO_RECEIVE: u32 = 1;
pub(super) const NO_SEND: u32 = 2;

/// What a packet is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Op {
    Request,
    Response,
    Reset,
    Shutdown,
    Data,
    CreditUpdate,
    CreditRequest,
}

/// A connection: the guest's port, the host's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct Ports {
    pub(super) guest: u32,
    pub(super) host: u32,
}

/// A packet's header. Which side sent it is known from the queue it is in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) ports: Ports,
    pub(super) len: u32,
    /// `None`: unknown.
    pub(super) op: Option<Op>,
    pub(super) flags: u32,
    pub(super) buf_alloc: u32,
    pub(super) fwd_cnt: u32,
}

impl Op {
    const ALL: [(u16, Op); 7] = [
        (1, Op::Request),
        (2, Op::Response),
        (3, Op::Reset),
        (4, Op::Shutdown),
        (5, Op::Data),
        (6, Op::CreditUpdate),
        (7, Op::CreditRequest),
    ];

    fn from_wire(value: u16) -> Option<Self> {
        let all = Op::ALL.into_iter();
        all.into_iter()
            .find(|(number, _)| *number == value)
            .map(|(_, op)| op)
    }

    fn to_wire(self) -> u16 {
        let all = Op::ALL.into_iter();
        all.into_iter()
            .find(|(_, op)| *op == self)
            .map_or(0, |(number, _)| number)
    }
}

impl Header {
    /// Reads what the guest `cid` sends to the host; `None` when the packet is too short, from
    /// somebody else or to somebody else. Takes the header off `pieces`. A packet of another type
    /// than a stream's has no known purpose.
    pub(super) fn from_guest(pieces: &mut Pieces, cid: u64) -> Option<Header> {
        let mut bytes = [0; SIZE];
        if pieces.split_to(SIZE).copy_to(&mut bytes) < SIZE {
            return None;
        }
        let u16_at = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let u32_at = |at: usize| u32::from(u16_at(at)) | u32::from(u16_at(at + 2)) << 16;
        let u64_at = |at: usize| u64::from(u32_at(at)) | u64::from(u32_at(at + 4)) << 32;
        if u64_at(0) != cid || u64_at(8) != HOST {
            return None;
        }
        Some(Header {
            ports: Ports {
                guest: u32_at(16),
                host: u32_at(20),
            },
            len: u32_at(24),
            op: Op::from_wire(u16_at(30)).filter(|_| u16_at(28) == STREAM),
            flags: u32_at(32),
            buf_alloc: u32_at(36),
            fwd_cnt: u32_at(40),
        })
    }

    /// As the guest `cid` reads it from the host.
    pub(super) fn to_guest(self, cid: u64) -> [u8; SIZE] {
        let mut bytes = [0; SIZE];
        let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
        put(0, &HOST.to_le_bytes());
        put(8, &cid.to_le_bytes());
        put(16, &self.ports.host.to_le_bytes());
        put(20, &self.ports.guest.to_le_bytes());
        put(24, &self.len.to_le_bytes());
        put(28, &STREAM.to_le_bytes());
        put(30, &self.op.map_or(0, Op::to_wire).to_le_bytes());
        put(32, &self.flags.to_le_bytes());
        put(36, &self.buf_alloc.to_le_bytes());
        put(40, &self.fwd_cnt.to_le_bytes());
        bytes
    }
}
