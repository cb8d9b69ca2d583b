//! What `/proc` says of a process.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::process::{Pid, PidfdFlags, pidfd_open};

use super::Error;
use crate::recording;

/// A process that lives, or has lived, while it is recorded.
#[derive(Debug)]
pub(super) struct Process {
    pub(super) pid: u32,
    /// Readable once the process has ended.
    pub(super) pidfd: OwnedFd,
    /// The file that it runs.
    program: Option<FileId>,
}

/// What tells a file from any other, even from one that got its inode's number later.
pub(super) type FileId = (u64, u64, i64, i64);

/// Of the file that `path` leads to.
pub(super) fn file_id(path: &Path) -> io::Result<FileId> {
    let file = fs::metadata(path)?;
    Ok((file.dev(), file.ino(), file.ctime(), file.ctime_nsec()))
}

impl Process {
    /// # Errors
    /// [`Error::System`] if there is no such process.
    pub(super) fn open(pid: u32) -> Result<Self, Error> {
        let what = || format!("find process {pid}");
        let number = i32::try_from(pid).ok().and_then(Pid::from_raw);
        let number = number.ok_or_else(|| Error::System {
            what: what(),
            source: io::ErrorKind::InvalidInput.into(),
        })?;
        let pidfd = pidfd_open(number, PidfdFlags::empty()).map_err(|error| Error::System {
            what: what(),
            source: error.into(),
        })?;
        let mut process = Self {
            pid,
            pidfd,
            program: None,
        };
        process.has_changed();
        Ok(process)
    }

    /// Whether it runs another program than when this was last asked.
    pub(super) fn has_changed(&mut self) -> bool {
        let program = file_id(&self.exe()).ok();
        let before = std::mem::replace(&mut self.program, program);
        program.is_some() && (before.map(inode) != program.map(inode))
    }

    /// The path that always opens the file that the process runs, even a deleted or replaced one.
    pub(super) fn exe(&self) -> PathBuf {
        PathBuf::from(format!("/proc/{}/exe", self.pid))
    }

    pub(super) fn describe(&self) -> recording::Process {
        let exe = fs::read_link(self.exe()).unwrap_or_default();
        recording::Process {
            pid: self.pid,
            comm: line(&format!("/proc/{}/comm", self.pid)),
            exe: exe.to_string_lossy().into_owned(),
        }
    }
}

/// A deleted file's change time is another than before; its inode is the same.
fn inode((device, inode, ..): FileId) -> (u64, u64) {
    (device, inode)
}

/// The processes that have a VM of KVM's open.
pub fn with_vm() -> Vec<u32> {
    all().filter(|pid| has_vm(*pid)).collect()
}

/// Whether the process has a VM of KVM's open.
pub(super) fn has_vm(pid: u32) -> bool {
    let descriptors = descriptors(pid);
    let mut links = descriptors.iter().map(|(_, link)| link.to_string_lossy());
    links.any(|link| link.starts_with("anon_inode:kvm-vm"))
}

/// The processes whose name, or whose program's file name, is `name`.
pub fn with_name(name: &str) -> Vec<u32> {
    // The kernel keeps 15 bytes of a name.
    let comm = name.get(..15).unwrap_or(name);
    let fits = |pid: &u32| {
        let exe = fs::read_link(format!("/proc/{pid}/exe")).unwrap_or_default();
        exe.file_name().is_some_and(|file| file == name)
            || line(&format!("/proc/{pid}/comm")) == comm
    };
    all().filter(fits).collect()
}

/// The processes that run the program at `path`, or ran it from there before it was deleted or
/// replaced, as an upgrade does.
///
/// # Errors
/// [`Error::Read`], if the path leads nowhere and nobody runs what was there.
pub fn with_exe(path: &Path) -> Result<Vec<u32>, Error> {
    let here = fs::canonicalize(path).or_else(|_| std::path::absolute(path));
    let read = |source| Error::Read {
        path: path.to_path_buf(),
        source,
    };
    let here = here.map_err(read)?;
    let program = file_id(&here);
    let mut deleted = here.into_os_string();
    deleted.push(" (deleted)");
    let fits = |pid: &u32| {
        let exe = PathBuf::from(format!("/proc/{pid}/exe"));
        let same = |program: &FileId| file_id(&exe).is_ok_and(|exe| inode(exe) == inode(*program));
        program.as_ref().is_ok_and(same) || fs::read_link(&exe).is_ok_and(|link| link == deleted)
    };
    let found: Vec<_> = all().filter(fits).collect();
    match program {
        Err(source) if found.is_empty() => Err(read(source)),
        _ => Ok(found),
    }
}

fn all() -> impl Iterator<Item = u32> {
    let entries = fs::read_dir("/proc").into_iter().flatten();
    entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
}

/// A thread's name; empty for one that is gone.
pub(super) fn thread_name(pid: u32, tid: u32) -> String {
    line(&format!("/proc/{pid}/task/{tid}/comm"))
}

/// The open descriptors of a process and what they are; none for one that is gone.
pub(super) fn descriptors(pid: u32) -> Vec<(u32, PathBuf)> {
    let Ok(entries) = fs::read_dir(format!("/proc/{pid}/fd")) else {
        return Vec::new();
    };
    let known = entries.filter_map(|entry| {
        let entry = entry.ok()?;
        let fd = entry.file_name().to_str()?.parse().ok()?;
        Some((fd, fs::read_link(entry.path()).ok()?))
    });
    known.collect()
}

/// What one descriptor of a process is.
pub(super) fn descriptor(pid: u32, fd: u32) -> Option<PathBuf> {
    fs::read_link(format!("/proc/{pid}/fd/{fd}")).ok()
}

/// A one-line file without its newline; empty if it cannot be read.
pub(super) fn line(path: &str) -> String {
    fs::read_to_string(Path::new(path))
        .unwrap_or_default()
        .trim_end()
        .to_string()
}
