//! What the driver asks a disk for, read from a chain of buffers: pure, but for guest RAM.

use std::io;

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD,
    VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};

use super::{ID_LEN, RANGE_MAX, SECTOR};
use crate::devices::virtio::Fault;
use crate::devices::virtio::queue::Chain;
use crate::memory::ring::Operation;
use crate::memory::transfer::Pieces;

/// Bytes of a request's header, and of the range that a discard or a zeroing names.
const HEADER: usize = 16;
const RANGE: usize = 16;

/// What a request is held against.
pub(super) struct Disk<'a> {
    pub(super) sectors: u64,
    pub(super) readonly: bool,
    pub(super) id: &'a [u8; ID_LEN],
}

/// A request that is under way.
#[derive(Debug)]
pub(super) struct Request {
    pub(super) head: u16,
    /// Where its status goes.
    status: Pieces,
    /// Bytes that it writes to guest RAM if it succeeds.
    writes: usize,
}

/// What is to be done about a request.
#[derive(Debug)]
pub(super) enum Outcome {
    /// The file has to.
    Start(Request, Operation),
    /// Nothing any more.
    Done(Request, io::Result<()>),
}

impl Request {
    /// Writes the status; returns how many bytes of the chain are written then.
    pub(super) fn finish(&self, result: io::Result<()>) -> usize {
        let (status, written) = match result {
            Ok(()) => (VIRTIO_BLK_S_OK, self.writes),
            Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => {
                (VIRTIO_BLK_S_UNSUPP, 0)
            }
            Err(error) => {
                tracing::warn!("a disk request failed: {error}");
                (VIRTIO_BLK_S_IOERR, 0)
            }
        };
        self.status.fill(&[status as u8]);
        written + 1
    }
}

/// Reads the request that `chain` is.
///
/// # Errors
/// When it has no header or no room for a status: there is no way to answer it then.
pub(super) fn parse(mut chain: Chain, disk: &Disk<'_>) -> Result<Outcome, Fault> {
    let mut header = [0; HEADER];
    if chain.readable.split_to(HEADER).copy_to(&mut header) < HEADER {
        return Err(Fault::Request("a disk request has no whole header"));
    }
    let status = chain.writable.split_off(1);
    if status.is_empty() {
        return Err(Fault::Request("a disk request has no room for its status"));
    }
    let [k0, k1, k2, k3, _, _, _, _, sector @ ..] = header;
    let (kind, sector) = (
        u32::from_le_bytes([k0, k1, k2, k3]),
        u64::from_le_bytes(sector),
    );
    let mut request = Request {
        head: chain.head,
        status,
        writes: 0,
    };
    let operation = match kind {
        VIRTIO_BLK_T_IN => {
            request.writes = chain.writable.len();
            place(sector, chain.writable.len() as u64, disk)
                .map(|offset| Operation::Read(chain.writable, offset))
        }
        VIRTIO_BLK_T_OUT if disk.readonly => Err(code(libc::EROFS)),
        VIRTIO_BLK_T_OUT => place(sector, chain.readable.len() as u64, disk)
            .map(|offset| Operation::Write(chain.readable, offset)),
        VIRTIO_BLK_T_FLUSH => Ok(Operation::Sync),
        VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES if disk.readonly => Err(code(libc::EROFS)),
        VIRTIO_BLK_T_DISCARD => range(&chain.readable, disk, true),
        VIRTIO_BLK_T_WRITE_ZEROES => range(&chain.readable, disk, false),
        VIRTIO_BLK_T_GET_ID => {
            request.writes = chain.writable.fill(disk.id);
            return Ok(Outcome::Done(request, Ok(())));
        }
        _ => Err(code(libc::EOPNOTSUPP)),
    };
    Ok(match operation {
        // With nothing to move there is nothing to do.
        Ok(Operation::Read(pieces, _) | Operation::Write(pieces, _)) if pieces.is_empty() => {
            Outcome::Done(request, Ok(()))
        }
        Ok(operation) => Outcome::Start(request, operation),
        Err(error) => Outcome::Done(request, Err(error)),
    })
}

/// The file offset of `len` bytes from `sector` on, if they are whole sectors of the disk.
fn place(sector: u64, len: u64, disk: &Disk<'_>) -> io::Result<u64> {
    let end = sector.checked_add(len / SECTOR);
    if !len.is_multiple_of(SECTOR) || end.is_none_or(|end| end > disk.sectors) {
        return Err(code(libc::EINVAL));
    }
    Ok(sector * SECTOR)
}

/// The `fallocate` that a discard or a zeroing is.
fn range(readable: &Pieces, disk: &Disk<'_>, discard: bool) -> io::Result<Operation> {
    let mut bytes = [0; RANGE];
    if readable.len() != RANGE || readable.copy_to(&mut bytes) < RANGE {
        return Err(code(libc::EINVAL));
    }
    let [
        s0,
        s1,
        s2,
        s3,
        s4,
        s5,
        s6,
        s7,
        n0,
        n1,
        n2,
        n3,
        f0,
        f1,
        f2,
        f3,
    ] = bytes;
    let sector = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]);
    let count = u32::from_le_bytes([n0, n1, n2, n3]);
    let flags = u32::from_le_bytes([f0, f1, f2, f3]);
    let unmap = flags & VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0;
    if flags & !VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0 || discard && unmap {
        return Err(code(libc::EOPNOTSUPP));
    }
    if count == 0 || count > RANGE_MAX {
        return Err(code(libc::EINVAL));
    }
    let len = u64::from(count) * SECTOR;
    let offset = place(sector, len, disk)?;
    // What is punched out of a file reads as zeroes too.
    let how = if discard || unmap {
        libc::FALLOC_FL_PUNCH_HOLE
    } else {
        libc::FALLOC_FL_ZERO_RANGE
    };
    Ok(Operation::Allocate {
        mode: how | libc::FALLOC_FL_KEEP_SIZE,
        offset,
        len,
    })
}

fn code(errno: i32) -> io::Error {
    io::Error::from_raw_os_error(errno)
}
