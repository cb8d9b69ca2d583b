//! Attaching: a uprobe by `perf_event_open(2)`, and the program on it by `bpf(2)`.
#![allow(unsafe_code)]

use std::ffi::CString;
use std::fs;
use std::io::{self, ErrorKind};
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

/// The part of `union bpf_attr` that `BPF_LINK_CREATE` takes (`include/uapi/linux/bpf.h`): the
/// fields of all links, then those of one kind.
#[repr(C)]
struct LinkCreate<T> {
    program: u32,
    target: u32,
    attach_type: u32,
    flags: u32,
    own: T,
}

/// A link to a perf event.
#[repr(C)]
struct PerfEventLink {
    cookie: u64,
}

/// A link to many uprobes of one file.
#[repr(C)]
struct UprobeMultiLink {
    path: u64,
    offsets: u64,
    semaphores: u64,
    cookies: u64,
    count: u32,
    flags: u32,
    process: u32,
    reserved: u32,
}

const BPF_LINK_CREATE: libc::c_int = 28;
const BPF_PERF_EVENT: u32 = 41;
const BPF_TRACE_UPROBE_MULTI: u32 = 48;

/// Where to put a uprobe.
#[derive(Clone, Copy, Debug)]
pub struct Point {
    /// The probe's place in the file: [`Site::offset`](super::Site::offset).
    pub offset: u64,
    /// Its semaphore's: [`Site::semaphore`](super::Site::semaphore).
    pub semaphore: Option<u64>,
    /// What the program reads by `bpf_get_attach_cookie` when it runs here.
    pub cookie: u64,
}

/// The kernel's uprobes.
#[derive(Debug)]
pub struct Uprobes {
    kind: u32,
    /// Bits by which the semaphore's offset is shifted in `config`, where the kernel takes one.
    semaphore_shift: Option<u32>,
}

/// A program on the sites of one file. Dropping it detaches the program, takes the uprobes away and
/// lowers the semaphores. That may take a while: the kernel waits until no CPU can be in a uprobe
/// any more, once for a multi-link, but once for each site without one.
#[derive(Debug)]
#[must_use = "dropping it detaches the program"]
pub struct Attachment {
    // Links come before the events that they hold on to.
    _fds: Vec<OwnedFd>,
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

    /// Runs `program` whenever a thread of `process` (or of any, with `None`) reaches one of the
    /// `points` in the code of the file at `path`. While attached, the points' semaphores are
    /// raised in every process concerned.
    ///
    /// Needs CAP_PERFMON and CAP_BPF (or root), and Linux 5.15 for the cookie.
    ///
    /// # Errors
    /// [`Error::NoSemaphores`], [`Error::Path`], [`Error::Uprobe`] and [`Error::Link`].
    pub fn attach(
        &self,
        program: BorrowedFd<'_>,
        path: &Path,
        points: &[Point],
        process: Option<u32>,
    ) -> Result<Attachment, Error> {
        let name = c_path(path)?;
        let mut fds = Vec::with_capacity(2 * points.len());
        for point in points {
            let offset = point.offset;
            let failed = |source| Error::Uprobe {
                path: PathBuf::from(path),
                offset,
                source,
            };
            let process = process
                .map_or(Ok(-1), i32::try_from)
                .map_err(|_| failed(ErrorKind::InvalidInput.into()))?;
            let config = self
                .config(point)
                .map_err(failed)?
                .ok_or(Error::NoSemaphores)?;
            let event = self.open(&name, offset, config, process).map_err(failed)?;
            let own = PerfEventLink {
                cookie: point.cookie,
            };
            let link =
                link(program, event.as_raw_fd() as u32, BPF_PERF_EVENT, own).map_err(|source| {
                    Error::Link {
                        path: PathBuf::from(path),
                        offset,
                        source,
                    }
                })?;
            fds.extend([link, event]);
        }
        Ok(Attachment { _fds: fds })
    }

    /// As [`attach`](Self::attach), by one link for all points, which is much faster to take away.
    /// `program` must have been loaded with the attach type `BPF_TRACE_UPROBE_MULTI`.
    ///
    /// Needs Linux 6.6; with a `process`, 6.10: before that, only the hits of its first thread
    /// were seen.
    ///
    /// # Errors
    /// [`Error::Path`] and [`Error::Link`].
    pub fn attach_multi(
        program: BorrowedFd<'_>,
        path: &Path,
        points: &[Point],
        process: Option<u32>,
    ) -> Result<Attachment, Error> {
        let Some(first) = points.first() else {
            // The kernel takes no empty link.
            return Ok(Attachment { _fds: Vec::new() });
        };
        let name = c_path(path)?;
        let offsets: Vec<_> = points.iter().map(|point| point.offset).collect();
        let semaphores: Vec<_> = points
            .iter()
            .map(|point| point.semaphore.unwrap_or(0))
            .collect();
        let cookies: Vec<_> = points.iter().map(|point| point.cookie).collect();
        let own = UprobeMultiLink {
            path: name.as_ptr() as u64,
            offsets: offsets.as_ptr() as u64,
            semaphores: semaphores.as_ptr() as u64,
            cookies: cookies.as_ptr() as u64,
            count: points.len() as u32,
            flags: 0,
            process: process.unwrap_or(0),
            reserved: 0,
        };
        let link = link(program, 0, BPF_TRACE_UPROBE_MULTI, own).map_err(|source| Error::Link {
            path: PathBuf::from(path),
            offset: first.offset,
            source,
        })?;
        Ok(Attachment { _fds: vec![link] })
    }

    /// A uprobe's `config`; `None` if its semaphore cannot be raised.
    fn config(&self, point: &Point) -> io::Result<Option<u64>> {
        let (Some(semaphore), shift) = (point.semaphore, self.semaphore_shift) else {
            return Ok(Some(0));
        };
        let field = u32::try_from(semaphore).map_err(|_| ErrorKind::FileTooLarge)?;
        Ok(shift.map(|shift| u64::from(field) << shift))
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

/// Links a program to `target`, or to what `own` names. All that `own` points to must outlive the
/// call, with as many elements as it says: its two makers are above.
fn link<T>(program: BorrowedFd<'_>, target: u32, attach_type: u32, own: T) -> io::Result<OwnedFd> {
    let program = program.as_raw_fd() as u32;
    let attr = LinkCreate {
        program,
        target,
        attach_type,
        flags: 0,
        own,
    };
    // SAFETY: `attr` is as long as the size given and outlives the call, as does what it points to.
    let fd = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            BPF_LINK_CREATE,
            &raw const attr,
            size_of_val(&attr),
        )
    };
    owned(fd)
}

fn c_path(path: &Path) -> Result<CString, Error> {
    CString::new(path.as_os_str().as_bytes()).map_err(|_| Error::Path {
        path: PathBuf::from(path),
    })
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
