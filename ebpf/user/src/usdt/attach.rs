//! Attaching: a uprobe by `perf_event_open(2)`, and the program on it by `bpf(2)`.
#![allow(unsafe_code)]

use std::ffi::CString;
use std::fs;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use super::Error;

const PMU: &str = "/sys/bus/event_source/devices/uprobe";

/// The first 72 bytes of `struct perf_event_attr` (`include/uapi/linux/perf_event.h`), which is
/// `PERF_ATTR_SIZE_VER2`'s predecessor and all that a uprobe needs.
#[repr(C)]
#[derive(Default)]
struct PerfEventAttr {
    kind: u32,
    size: u32,
    config: u64,
    sample_period: u64,
    sample_type: u64,
    read_format: u64,
    flags: u64,
    wakeup_events: u32,
    breakpoint_type: u32,
    /// Address of the path.
    config1: u64,
    /// Offset in the file.
    config2: u64,
}

/// `PERF_FLAG_FD_CLOEXEC`
const FD_CLOEXEC: libc::c_ulong = 1 << 3;

/// The part of `union bpf_attr` that `BPF_LINK_CREATE` on a perf event takes.
#[repr(C)]
struct LinkCreate {
    program: u32,
    target: u32,
    attach_type: u32,
    flags: u32,
    cookie: u64,
}

const BPF_LINK_CREATE: libc::c_int = 28;
const BPF_PERF_EVENT: u32 = 41;

/// The kernel's uprobes.
#[derive(Debug)]
pub struct Uprobes {
    kind: u32,
    /// Bits by which the semaphore's offset is shifted in `config`, where the kernel takes one.
    semaphore_shift: Option<u32>,
}

/// A program on a site. Dropping it detaches the program, takes the uprobe away and lowers the
/// semaphore.
#[derive(Debug)]
#[must_use = "dropping it detaches the program"]
pub struct Attachment {
    // Dropped in this order: the link holds on to the event.
    _link: OwnedFd,
    _event: OwnedFd,
}

impl Uprobes {
    /// Asks the kernel what it offers.
    ///
    /// # Errors
    /// [`Error::NoUprobes`].
    pub fn discover() -> Result<Self, Error> {
        let path = Path::new(PMU).join("type");
        let failed = |source| Error::NoUprobes {
            path: path.clone(),
            source,
        };
        let kind = fs::read_to_string(&path).map_err(failed)?;
        let kind = kind
            .trim()
            .parse()
            .map_err(|error| failed(io::Error::other(error)))?;
        let format = fs::read_to_string(Path::new(PMU).join("format/ref_ctr_offset"));
        Ok(Self {
            kind,
            semaphore_shift: format.ok().as_deref().and_then(first_bit),
        })
    }

    /// Whether the kernel raises semaphores (Linux 4.20 and later).
    pub fn raises_semaphores(&self) -> bool {
        self.semaphore_shift.is_some()
    }

    /// Runs `program` whenever a thread of `process` (or of any, with `None`) reaches the code at
    /// `offset` of the file at `path`. The program reads `cookie` by `bpf_get_attach_cookie`. While
    /// attached, the semaphore at file offset `semaphore` is raised in every process concerned.
    ///
    /// Needs CAP_PERFMON and CAP_BPF (or root), and Linux 5.15 for the cookie.
    ///
    /// # Errors
    /// [`Error::NoSemaphores`], [`Error::Path`], [`Error::Uprobe`] and [`Error::Link`].
    pub fn attach(
        &self,
        program: BorrowedFd<'_>,
        path: &Path,
        offset: u64,
        semaphore: Option<u64>,
        process: Option<u32>,
        cookie: u64,
    ) -> Result<Attachment, Error> {
        let failed = |source| Error::Uprobe {
            path: PathBuf::from(path),
            offset,
            source,
        };
        let config = match (semaphore, self.semaphore_shift) {
            (None, _) => 0,
            (Some(_), None) => return Err(Error::NoSemaphores),
            (Some(semaphore), Some(shift)) => {
                let field = u32::try_from(semaphore)
                    .map_err(|_| failed(io::ErrorKind::FileTooLarge.into()))?;
                u64::from(field) << shift
            }
        };
        let name = CString::new(path.as_os_str().as_bytes()).map_err(|_| Error::Path {
            path: PathBuf::from(path),
        })?;
        let process = process
            .map_or(Ok(-1), i32::try_from)
            .map_err(|_| failed(io::ErrorKind::InvalidInput.into()))?;
        let event = self.open(&name, offset, config, process).map_err(failed)?;
        let link = link(program, &event, cookie).map_err(|source| Error::Link {
            path: PathBuf::from(path),
            offset,
            source,
        })?;
        Ok(Attachment {
            _link: link,
            _event: event,
        })
    }

    fn open(&self, name: &CString, offset: u64, config: u64, process: i32) -> io::Result<OwnedFd> {
        let attr = PerfEventAttr {
            kind: self.kind,
            size: size_of::<PerfEventAttr>() as u32,
            config,
            config1: name.as_ptr() as u64,
            config2: offset,
            ..Default::default()
        };
        // An event of every process has to be on some CPU; its uprobe fires on all of them.
        let cpu = if process == -1 { 0 } else { -1 };
        // SAFETY: `attr` is as long as its `size` says and outlives the call, as does the
        // NUL-terminated path that `config1` points to.
        let fd = unsafe {
            libc::syscall(
                libc::SYS_perf_event_open,
                &raw const attr,
                process,
                cpu,
                -1,
                FD_CLOEXEC,
            )
        };
        owned(fd)
    }
}

fn link(program: BorrowedFd<'_>, event: &OwnedFd, cookie: u64) -> io::Result<OwnedFd> {
    let attr = LinkCreate {
        program: program.as_raw_fd() as u32,
        target: event.as_raw_fd() as u32,
        attach_type: BPF_PERF_EVENT,
        flags: 0,
        cookie,
    };
    // SAFETY: `attr` is as long as the size given and outlives the call; both descriptors are open.
    let fd = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            BPF_LINK_CREATE,
            &raw const attr,
            size_of::<LinkCreate>(),
        )
    };
    owned(fd)
}

/// The descriptor that a system call returned.
fn owned(fd: libc::c_long) -> io::Result<OwnedFd> {
    let Some(fd) = i32::try_from(fd).ok().filter(|fd| *fd >= 0) else {
        return Err(io::Error::last_os_error());
    };
    // SAFETY: the kernel just made it for this call, so nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// The first bit of a field of a PMU's config: `config:32-63` begins at 32.
fn first_bit(format: &str) -> Option<u32> {
    let bits = format.trim().strip_prefix("config:")?;
    let first = bits.split('-').next()?.parse().ok()?;
    (first < u64::BITS).then_some(first)
}
