//! Linux kernels and initial RAM disks: from files into guest RAM.
//!
//! What a kernel file has inside is the architecture's business; what it may be wrapped in is
//! here: gzip, as arm64's `Image.gz`, and the EFI zboot container (`drivers/firmware/efi/libstub/
//! zboot-header.S`), which some distributions ship arm64 kernels in.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::ops::Range;
use std::path::{Path, PathBuf};

use flate2::read::GzDecoder;
use nix::sys::memfd::{MFdFlags, memfd_create};
use vm_memory::{Bytes, GuestAddress};

use crate::memory::GuestRam;
use crate::probes::Errno;

/// A kernel to boot, and what it starts from.
#[derive(Clone, Debug)]
pub struct Linux {
    /// The kernel's file.
    pub kernel: PathBuf,
    /// The initial RAM disk's file.
    pub initrd: Option<PathBuf>,
}

/// Why a kernel or its initial RAM disk can't be loaded.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file can't be opened or read.
    #[error("can't read {}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A compressed kernel is damaged.
    #[error("the compressed kernel {} is damaged", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What the decompressor said.
        source: io::Error,
    },
    /// A kernel in a form that this monitor can't load.
    #[error("the kernel {}: {problem}", path.display())]
    Foreign {
        /// The file.
        path: PathBuf,
        /// What it is, and what is wanted.
        problem: String,
    },
    /// The kernel's parts are damaged or have no place in guest RAM.
    #[error("the kernel {}", path.display())]
    Kernel {
        /// The file.
        path: PathBuf,
        /// What linux-loader said.
        source: linux_loader::loader::Error,
    },
    /// Guest RAM is too small.
    #[error("{} needs {size} bytes from guest-physical {gpa:#x} on: give the guest more memory", path.display())]
    Place {
        /// The file.
        path: PathBuf,
        /// Where it was to go.
        gpa: u64,
        /// Bytes.
        size: u64,
    },
}

impl Errno for Error {
    fn errno(&self) -> i32 {
        match self {
            Error::File { source, .. } => source.errno(),
            Error::Damaged { .. } | Error::Foreign { .. } | Error::Kernel { .. } => libc::ENOEXEC,
            Error::Place { .. } => libc::ENOMEM,
        }
    }
}

/// Opens the kernel at `path`. One that is compressed is unpacked into memory, up to `limit` bytes,
/// which is what the guest could hold.
///
/// # Errors
/// When it can't be read, is damaged, or is compressed in a way that is not known.
pub fn open_kernel(path: &Path, limit: u64) -> Result<File, Error> {
    let file_error = |source| Error::File {
        path: path.to_owned(),
        source,
    };
    let mut file = File::open(path).map_err(file_error)?;
    let mut head = Vec::new();
    file.by_ref()
        .take(HEAD)
        .read_to_end(&mut head)
        .map_err(file_error)?;
    let packed = packed(&head).map_err(|problem| Error::Foreign {
        path: path.to_owned(),
        problem,
    })?;
    let start = packed.as_ref().map_or(0, |range| range.start);
    file.seek(SeekFrom::Start(start)).map_err(file_error)?;
    let Some(range) = packed else {
        return Ok(file);
    };
    let damaged = |source| Error::Damaged {
        path: path.to_owned(),
        source,
    };
    let packed = file.take(range.end.saturating_sub(range.start));
    unpack(packed, limit).map_err(damaged)
}

/// Reads the file at `path` to where `place` says that a file of so many bytes goes, and returns the
/// range that it takes. Everything from `lowest` on would be free.
///
/// # Errors
/// When it can't be read or there is no such room.
pub fn load_initrd(
    ram: &GuestRam,
    path: &Path,
    lowest: u64,
    place: impl FnOnce(u64) -> Option<u64>,
) -> Result<Range<u64>, Error> {
    let file_error = |source| Error::File {
        path: path.to_owned(),
        source,
    };
    let mut file = File::open(path).map_err(file_error)?;
    let size = file.metadata().map_err(file_error)?.len();
    let no_room = || Error::Place {
        path: path.to_owned(),
        gpa: lowest,
        size,
    };
    let count = usize::try_from(size).map_err(|_| no_room())?;
    let gpa = place(size).ok_or_else(no_room)?;
    ram.mem()
        .read_exact_volatile_from(GuestAddress(gpa), &mut file, count)
        .map_err(|_| no_room())?;
    Ok(gpa..gpa.saturating_add(size))
}

/// Bytes of a file that say what it is.
const HEAD: u64 = 64;
const GZIP_MAGIC: &[u8] = &[0x1f, 0x8b];

/// Where in a kernel file the gzip stream lies; `None` when the file is not compressed.
fn packed(head: &[u8]) -> Result<Option<Range<u64>>, String> {
    if head.starts_with(GZIP_MAGIC) {
        return Ok(Some(0..u64::MAX));
    }
    if !head.starts_with(b"MZ") || head.get(4..8) != Some(b"zimg") {
        return Ok(None);
    }
    let number = |at: usize| {
        let bytes = head.get(at..)?.first_chunk()?;
        Some(u64::from(u32::from_le_bytes(*bytes)))
    };
    let (Some(start), Some(size), Some(method)) = (number(8), number(12), head.get(24..56)) else {
        return Err("an EFI zboot image that ends in its header".into());
    };
    let method = method.split(|&byte| byte == 0).next().unwrap_or_default();
    if method != b"gzip" {
        return Err(format!(
            "an EFI zboot image packed with {}: only gzip is known; unpack it first",
            method.escape_ascii()
        ));
    }
    Ok(Some(start..start + size))
}

/// Unpacks a gzip stream into an anonymous file that stands at its start.
fn unpack(packed: impl Read, limit: u64) -> io::Result<File> {
    let mut plain = File::from(memfd_create(c"blackout-kernel", MFdFlags::MFD_CLOEXEC)?);
    let mut stream = GzDecoder::new(packed).take(limit.saturating_add(1));
    if io::copy(&mut stream, &mut plain)? > limit {
        return Err(io::Error::other("it unpacks to more than guest RAM holds"));
    }
    plain.rewind()?;
    Ok(plain)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use flate2::Compression;
    use flate2::write::GzEncoder;

    use super::*;

    fn gzip(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    fn zboot(method: &[u8], payload: &[u8]) -> Vec<u8> {
        let mut image = b"MZ\0\0zimg".to_vec();
        image.extend(64u32.to_le_bytes());
        image.extend((payload.len() as u32).to_le_bytes());
        image.extend([0; 8]);
        image.extend(method);
        image.resize(64, 0);
        image.extend(payload);
        // The container's own code follows.
        image.extend([0xcc; 100]);
        image
    }

    fn open(bytes: &[u8], limit: u64) -> Result<Vec<u8>, Error> {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(bytes).unwrap();
        let mut plain = Vec::new();
        open_kernel(file.path(), limit)?
            .read_to_end(&mut plain)
            .unwrap();
        Ok(plain)
    }

    #[test]
    fn a_kernel_comes_out_plain_whatever_it_is_wrapped_in() {
        let kernel = vec![7; 10_000];
        for file in [
            kernel.clone(),
            gzip(&kernel),
            zboot(b"gzip", &gzip(&kernel)),
        ] {
            assert_eq!(open(&file, 10_000).unwrap(), kernel);
        }
    }

    #[test]
    fn damaged_and_foreign_kernels_are_named() {
        let packed = gzip(&[7; 10_000]);
        let rows = [
            (packed[..packed.len() - 9].to_vec(), "is damaged"),
            (zboot(b"zstd22", &packed), "packed with zstd22"),
            (zboot(b"gzip", &packed[..20]), "is damaged"),
            (zboot(b"gzip", &[])[..40].to_vec(), "ends in its header"),
        ];
        for (file, expected) in rows {
            let error = open(&file, 1 << 20).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
    }

    #[test]
    fn a_small_file_can_not_fill_the_memory() {
        let error = open(&gzip(&vec![0; 1 << 20]), 1 << 16).unwrap_err();
        let source = std::error::Error::source(&error).unwrap().to_string();
        assert!(source.contains("more than guest RAM holds"), "{source}");
    }

    #[test]
    fn an_initrd_lies_whole_in_ram() {
        let ram = GuestRam::new(&[(0x1000, 0x2000)]).unwrap();
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(&[1; 0x1000]).unwrap();
        let range = load_initrd(&ram, file.path(), 0x1000, |_| Some(0x2000)).unwrap();
        assert_eq!(range, 0x2000..0x3000);
        for place in [Some(0x2001), None] {
            let error = load_initrd(&ram, file.path(), 0x1000, |_| place).unwrap_err();
            assert_eq!(error.errno(), libc::ENOMEM);
        }
    }
}
