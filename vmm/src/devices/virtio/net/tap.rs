//! A tap interface: the host's end of a network card. The only file outside `kvm/` that makes
//! ioctls, since no crate has these in safe form.
#![allow(unsafe_code)]

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;

/// Bytes of `struct virtio_net_hdr_v1`, which comes before every packet.
pub(super) const HEADER: usize = 12;

/// Bytes of `struct ifreq`, and of the name in it.
const IFREQ: usize = 40;
const NAME: usize = 16;

/// From `linux/if_tun.h`.
const TUNSETIFF: libc::c_ulong = 0x4004_54ca;
const TUNSETOFFLOAD: libc::c_ulong = 0x4004_54d0;
const TUNSETVNETHDRSZ: libc::c_ulong = 0x4004_54d8;
const IFF_TAP: u16 = 0x0002;
const IFF_NO_PI: u16 = 0x1000;
const IFF_VNET_HDR: u16 = 0x4000;
const OFFLOAD_CSUM: u32 = 1;
const OFFLOAD_TSO4: u32 = 2;
const OFFLOAD_TSO6: u32 = 4;

/// What the guest takes from the host without help.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Offloads {
    /// Packets without a checksum.
    pub(super) csum: bool,
    /// TCP segments longer than a frame, over IPv4 and over IPv6.
    pub(super) tso4: bool,
    pub(super) tso6: bool,
}

/// An open tap interface, which never blocks.
#[derive(Debug)]
pub(super) struct Tap {
    file: File,
}

impl Tap {
    /// Opens the interface `name`; if there is none, it is made, and goes with this process.
    ///
    /// # Errors
    /// `EBUSY` when another process has it, `EPERM` without `CAP_NET_ADMIN`, `EINVAL` when it is
    /// no tap interface.
    pub(super) fn open(name: &str) -> io::Result<Self> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK)
            .open("/dev/net/tun")?;
        let mut request = [0u8; IFREQ];
        if name.is_empty() || name.len() >= NAME || name.contains('\0') {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        request[..name.len()].copy_from_slice(name.as_bytes());
        let flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR;
        request[NAME..NAME + 2].copy_from_slice(&flags.to_ne_bytes());
        // SAFETY: TUNSETIFF reads and writes a struct ifreq, as long as `request`.
        checked(unsafe { libc::ioctl(file.as_raw_fd(), TUNSETIFF as _, request.as_mut_ptr()) })?;
        let size = HEADER as libc::c_int;
        // SAFETY: TUNSETVNETHDRSZ reads an int.
        checked(unsafe { libc::ioctl(file.as_raw_fd(), TUNSETVNETHDRSZ as _, &raw const size) })?;
        Ok(Tap { file })
    }

    /// Says which packets the guest can take.
    ///
    /// # Errors
    /// `EINVAL` when the kernel does not know one of the offloads.
    pub(super) fn set_offloads(&self, offloads: Offloads) -> io::Result<()> {
        let bit = |on, bit| if on { bit } else { 0 };
        let flags = bit(offloads.csum, OFFLOAD_CSUM)
            | bit(offloads.csum && offloads.tso4, OFFLOAD_TSO4)
            | bit(offloads.csum && offloads.tso6, OFFLOAD_TSO6);
        let flags = libc::c_ulong::from(flags);
        // SAFETY: TUNSETOFFLOAD takes its flags by value.
        checked(unsafe { libc::ioctl(self.file.as_raw_fd(), TUNSETOFFLOAD as _, flags) })
    }

    /// The file, one packet a read or write, each with its header.
    pub(super) fn file(&self) -> &File {
        &self.file
    }
}

fn checked(result: libc::c_int) -> io::Result<()> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
