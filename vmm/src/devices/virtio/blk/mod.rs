//! A disk (virtio 1.2, 5.2) whose contents are a raw file or a block device.
//!
//! `request.rs` is what the driver asks for, `engine.rs` how the host does it, `lock.rs` keeps two
//! monitors from writing to one image.

mod engine;
mod lock;
mod request;

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::fd::RawFd;
use std::path::{Path, PathBuf};

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX,
    VIRTIO_BLK_F_WRITE_ZEROES,
};

use super::queue::Io;
use super::{Device, Fault, Kind};
use crate::devices::StateError;
use engine::Engine;
use lock::ImageLock;
use request::{Outcome, Request};

/// Bytes of a sector, in which disks are counted.
pub const SECTOR: u64 = 512;

/// The only queue.
const REQUESTS: usize = 0;
const QUEUE_SIZES: &[u16] = &[256];

/// Buffers of one request: the whole queue but for its header and its status.
const SEG_MAX: u32 = 254;

/// Sectors that one discard or one zeroing covers.
const RANGE_MAX: u32 = 1 << 22;

/// What the driver reads as the disk's serial number.
const ID_LEN: usize = 20;

/// How a disk is to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// The image.
    pub path: PathBuf,
    /// Whether the guest can't write.
    pub readonly: bool,
    /// What the guest reads as its serial number; at most 20 bytes.
    pub id: String,
}

/// A disk could not be opened.
#[derive(Debug, thiserror::Error)]
#[error("disk {}", path.display())]
pub struct Error {
    /// The image.
    pub path: PathBuf,
    /// Why.
    pub source: io::Error,
}

/// The disk.
pub struct Blk {
    config: [u8; CONFIG_SIZE],
    readonly: bool,
    sectors: u64,
    id: [u8; ID_LEN],
    lock: ImageLock,
    engine: Engine,
}

/// Bytes of `struct virtio_blk_config` up to the last field that is used.
const CONFIG_SIZE: usize = 60;

impl Blk {
    /// Opens the image. Its lock is left for [`Device::claim`]: on a destination the source has it.
    ///
    /// # Errors
    /// When it can't be opened, or is no file that a disk can be.
    pub fn open(options: &Options) -> Result<Self, Error> {
        let error = |source| Error {
            path: options.path.clone(),
            source,
        };
        let file = OpenOptions::new()
            .read(true)
            .write(!options.readonly)
            .open(&options.path)
            .map_err(error)?;
        let sectors = size(&file).map_err(error)? / SECTOR;
        let mut id = [0; ID_LEN];
        for (to, from) in id.iter_mut().zip(options.id.bytes()) {
            *to = from;
        }
        let lock = ImageLock::new(&file, options.readonly).map_err(error)?;
        Ok(Blk {
            config: config(sectors),
            readonly: options.readonly,
            sectors,
            id,
            lock,
            engine: Engine::new(file, QUEUE_SIZES[REQUESTS]).map_err(error)?,
        })
    }

    /// Takes requests as long as there are some and the engine has room.
    fn take_requests(&mut self, io: &mut Io) -> Result<(), Fault> {
        while !self.engine.is_full() {
            let Some(chain) = io.next(REQUESTS)? else {
                break;
            };
            let disk = request::Disk {
                sectors: self.sectors,
                readonly: self.readonly,
                id: &self.id,
            };
            match request::parse(chain, &disk)? {
                Outcome::Start(request, operation) => {
                    if let Some((request, result)) = self.engine.start(request, operation) {
                        finish(io, &request, result)?;
                    }
                }
                Outcome::Done(request, result) => finish(io, &request, result)?,
            }
        }
        self.engine
            .submit()
            .map_err(|e| Fault::Host("submitting disk requests", e))?;
        io.notify(REQUESTS)
    }

    fn take_completions(&mut self, io: &mut Io) -> Result<(), Fault> {
        while let Some((request, result)) = self.engine.completed() {
            finish(io, &request, result)?;
        }
        Ok(())
    }
}

/// Says to the driver how a request ended, and gives its buffers back.
fn finish(io: &mut Io, request: &Request, result: io::Result<()>) -> Result<(), Fault> {
    let written = request.finish(result);
    io.done(REQUESTS, request.head, written)
}

impl Device for Blk {
    fn kind(&self) -> Kind {
        Kind::Block
    }

    fn features(&self) -> u64 {
        let readonly = if self.readonly {
            1 << VIRTIO_BLK_F_RO
        } else {
            1 << VIRTIO_BLK_F_DISCARD | 1 << VIRTIO_BLK_F_WRITE_ZEROES
        };
        1 << VIRTIO_BLK_F_SEG_MAX | 1 << VIRTIO_BLK_F_FLUSH | readonly
    }

    fn queue_sizes(&self) -> &'static [u16] {
        QUEUE_SIZES
    }

    fn config(&self) -> &[u8] {
        &self.config
    }

    fn claim(&mut self) -> io::Result<()> {
        self.lock.take()
    }

    fn release(&mut self) {
        self.lock.give_up();
    }

    fn accept(&mut self, _: u64) -> io::Result<()> {
        Ok(())
    }

    fn reset(&mut self) {}

    /// All of a disk is in its file and its queue. The size goes along so that a destination with
    /// another image says so.
    fn save(&mut self) -> Result<Vec<u8>, StateError> {
        crate::devices::encode(&self.sectors)
    }

    fn load(&mut self, state: &[u8]) -> Result<(), StateError> {
        let sectors: u64 = crate::devices::decode(0, 0, state)?;
        if sectors != self.sectors {
            return Err(StateError::Invalid(format!(
                "the image has {} sectors, at the source it has {sectors}",
                self.sectors
            )));
        }
        Ok(())
    }

    fn sources(&self) -> Vec<RawFd> {
        self.engine.source().into_iter().collect()
    }

    fn start(&mut self, _: &mut Io, _: bool) -> Result<(), Fault> {
        Ok(())
    }

    fn kicked(&mut self, _: usize, io: &mut Io) -> Result<(), Fault> {
        self.take_requests(io)
    }

    fn ready(&mut self, _: usize, io: &mut Io) -> Result<(), Fault> {
        self.take_completions(io)?;
        // There may be room now for what had to wait.
        self.take_requests(io)
    }

    fn finish(&mut self, io: &mut Io) -> Result<u64, Fault> {
        let requests = self.engine.in_flight() as u64;
        while self.engine.in_flight() > 0 {
            self.engine
                .wait()
                .map_err(|e| Fault::Host("waiting for disk requests", e))?;
            self.take_completions(io)?;
        }
        io.notify(REQUESTS)?;
        Ok(requests)
    }
}

fn size(mut file: &File) -> io::Result<u64> {
    let kind = file.metadata()?.file_type();
    if kind.is_dir() {
        return Err(io::Error::from_raw_os_error(libc::EISDIR));
    }
    file.seek(SeekFrom::End(0))
}

/// `struct virtio_blk_config`.
fn config(sectors: u64) -> [u8; CONFIG_SIZE] {
    let mut config = [0; CONFIG_SIZE];
    let mut put = |at: usize, bytes: &[u8]| config[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, &sectors.to_le_bytes());
    put(12, &SEG_MAX.to_le_bytes());
    // Discards: sectors and segments of one request, alignment; then the same of write zeroes, and
    // that these may unmap.
    put(36, &RANGE_MAX.to_le_bytes());
    put(40, &1u32.to_le_bytes());
    put(44, &1u32.to_le_bytes());
    put(48, &RANGE_MAX.to_le_bytes());
    put(52, &1u32.to_le_bytes());
    put(56, &[1]);
    config
}

/// What a disk without a name is called.
pub fn default_id(path: &Path) -> String {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    name.chars()
        .filter(char::is_ascii_graphic)
        .take(ID_LEN)
        .collect()
}

#[cfg(test)]
mod tests;
