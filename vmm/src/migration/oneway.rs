//! Streams without a way back: pipes, files and commands. Nobody answers, so the source alone says
//! when the guest is handed over; `ARCHITECTURE.md` has the rule.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::fs::{FlockOperation, OFlags, fcntl_getfl, fcntl_setfl, flock};

use crate::probes::Errno;

/// How often a command that is to end is looked at.
const LOOK: Duration = Duration::from_millis(5);
/// How long a command that is told to end has before it is killed.
const GRACE: Duration = Duration::from_secs(1);
/// How much of a device that can't be cut is overwritten to take a guest back.
const PREFACE_LEN: usize = 8;

/// The source can't tell that all of the guest was taken.
#[derive(Debug, thiserror::Error)]
pub(crate) enum FinishError {
    /// It is not certain that the disk has it.
    #[error("saving the guest")]
    Sync(#[source] io::Error),
    /// The command can't be waited for.
    #[error("waiting for the command that takes the guest")]
    Wait(#[source] io::Error),
    /// The command failed after it had got everything.
    #[error("the command that takes the guest ended with {0}")]
    Command(ExitStatus),
    /// The command does not end.
    #[error("the command that takes the guest has not ended {} s after its input", .0.as_secs())]
    Endless(Duration),
}

impl Errno for FinishError {
    fn errno(&self) -> i32 {
        match self {
            FinishError::Sync(source) | FinishError::Wait(source) => source.errno(),
            FinishError::Command(_) => libc::EREMOTEIO,
            FinishError::Endless(_) => libc::ETIMEDOUT,
        }
    }
}

/// A pipe, a file or a command's input or output.
#[derive(Debug)]
pub(super) struct OneWay {
    way: Mutex<Way>,
    /// Readable once this is given up.
    given_up: OwnedFd,
}

#[derive(Debug)]
struct Way {
    /// `None` once the other side has been told that nothing more comes.
    file: Option<File>,
    kind: Kind,
    silence: Duration,
}

#[derive(Debug)]
enum Kind {
    Pipe,
    /// A regular file or a block device, in which the stream starts here.
    File(u64),
    Command(Child),
}

/// Which end of a command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Direction {
    /// The stream goes to its standard input.
    Out,
    /// The stream comes from its standard output.
    In,
}

impl OneWay {
    /// Takes what somebody has opened: a file from where it stands, or a pipe.
    pub(super) fn new(mut file: File) -> io::Result<Self> {
        let kind = file.metadata()?.file_type();
        if kind.is_file() || kind.is_block_device() {
            let start = file.stream_position()?;
            return OneWay::with(file, Kind::File(start));
        }
        pipe(file, Kind::Pipe)
    }

    /// Opens the file `path` and goes to `offset`. A file that is written to is made if it is not
    /// there, and cut off at `offset`; nobody else can open it that way until this is dropped.
    pub(super) fn open(path: &Path, offset: u64, direction: Direction) -> io::Result<Self> {
        let mut file = match direction {
            Direction::In => File::open(path)?,
            Direction::Out => OpenOptions::new()
                .write(true)
                .create(true)
                .truncate(false)
                .mode(0o600)
                .open(path)?,
        };
        let lock = match direction {
            Direction::In => FlockOperation::NonBlockingLockShared,
            Direction::Out => FlockOperation::NonBlockingLockExclusive,
        };
        // Nobody is to find the guest before the source is sure of it.
        flock(&file, lock).map_err(|error| match error {
            rustix::io::Errno::WOULDBLOCK => {
                io::Error::new(io::ErrorKind::ResourceBusy, "another process uses the file")
            }
            other => other.into(),
        })?;
        if direction == Direction::Out && file.metadata()?.is_file() {
            file.set_len(offset)?;
        }
        file.seek(SeekFrom::Start(offset))?;
        OneWay::with(file, Kind::File(offset))
    }

    /// Runs `command` by the shell, in a process group of its own.
    pub(super) fn spawn(command: &str, direction: Direction) -> io::Result<Self> {
        let (stdin, stdout) = match direction {
            Direction::Out => (Stdio::piped(), Stdio::null()),
            Direction::In => (Stdio::null(), Stdio::piped()),
        };
        let mut child = Command::new("/bin/sh")
            .args(["-c", command])
            .stdin(stdin)
            .stdout(stdout)
            .process_group(0)
            .spawn()?;
        let stdin = child.stdin.take().map(OwnedFd::from);
        let end = stdin.or_else(|| child.stdout.take().map(OwnedFd::from));
        let end = end.ok_or(io::ErrorKind::BrokenPipe)?;
        pipe(File::from(end), Kind::Command(child))
    }

    fn with(file: File, kind: Kind) -> io::Result<Self> {
        Ok(OneWay {
            way: Mutex::new(Way {
                file: Some(file),
                kind,
                silence: Duration::MAX,
            }),
            given_up: eventfd(0, EventfdFlags::CLOEXEC)?,
        })
    }

    /// How long a write of which nothing is taken waits.
    pub(super) fn set_patience(&self, silence: Duration) {
        self.lock().silence = silence;
    }

    /// Whether it is a pipe that takes something now.
    pub(super) fn has_room(&self) -> bool {
        let way = self.lock();
        match (&way.kind, &way.file) {
            (Kind::File(_), _) | (_, None) => false,
            (_, Some(file)) => self
                .wait(file, PollFlags::OUT, Duration::ZERO)
                .is_ok_and(|ready| ready),
        }
    }

    /// Reads, and waits for as long as the other side is there.
    pub(super) fn read(&self, bytes: &mut [u8]) -> io::Result<usize> {
        let way = self.lock();
        let mut file = way.file.as_ref().ok_or(io::ErrorKind::BrokenPipe)?;
        self.wait(file, PollFlags::IN, Duration::MAX)?;
        file.read(bytes)
    }

    /// Writes what the other side takes.
    pub(super) fn write(&self, bytes: &[u8]) -> io::Result<usize> {
        let way = self.lock();
        let mut file = way.file.as_ref().ok_or(io::ErrorKind::BrokenPipe)?;
        if !self.wait(file, PollFlags::OUT, way.silence)? {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        file.write(bytes)
    }

    /// Wakes whoever waits, with an error, for good.
    pub(super) fn interrupt(&self) {
        // It can only fail when it has been said 2^64 times.
        let _ = rustix::io::write(&self.given_up, &1u64.to_ne_bytes());
    }

    /// Sees to it that what was written is on the disk, if it goes to one.
    pub(super) fn sync(&self) -> io::Result<()> {
        let way = self.lock();
        match (&way.kind, &way.file) {
            (Kind::File(_), Some(file)) => file.sync_data(),
            _ => Ok(()),
        }
    }

    /// Everything was written: makes sure that it was taken, as far as one can know.
    pub(super) fn finish(&self) -> Result<(), FinishError> {
        let mut way = self.lock();
        let silence = way.silence;
        let Way { file, kind, .. } = &mut *way;
        match (kind, &*file) {
            (Kind::File(_), Some(file)) => file.sync_all().map_err(FinishError::Sync),
            (Kind::Command(child), _) => {
                *file = None;
                match self.wait_exit(child, silence).map_err(FinishError::Wait)? {
                    Some(status) if status.success() => Ok(()),
                    Some(status) => Err(FinishError::Command(status)),
                    None => Err(FinishError::Endless(silence)),
                }
            }
            _ => {
                *file = None;
                Ok(())
            }
        }
    }

    /// Where a file's stream starts in it; none if this is no file, or one that is only ever added to.
    pub(super) fn start(&self) -> Option<u64> {
        let way = self.lock();
        match (&way.kind, &way.file) {
            (Kind::File(start), Some(file)) => fcntl_getfl(file)
                .is_ok_and(|flags| !flags.contains(OFlags::APPEND))
                .then_some(*start),
            _ => None,
        }
    }

    /// Sets `len` bytes of a file aside, from `at` bytes behind the start of the stream on, which goes on
    /// behind them. Returns the file, and where in it they are.
    pub(super) fn set_aside(&self, at: u64, len: u64) -> io::Result<(File, u64)> {
        let start = self.start().ok_or(io::ErrorKind::NotSeekable)?;
        let at = start.checked_add(at);
        let end = at.and_then(|at| at.checked_add(len));
        let (Some(at), Some(end)) = (at, end) else {
            return Err(io::ErrorKind::FileTooLarge.into());
        };
        let way = self.lock();
        let mut file = way.file.as_ref().ok_or(io::ErrorKind::BrokenPipe)?;
        file.seek(SeekFrom::Start(end))?;
        Ok((file.try_clone()?, at))
    }

    /// Takes back what a file holds, so that nobody takes it for a guest and its room is free. Says
    /// whether that was possible: what went into a pipe is gone.
    ///
    /// # Errors
    /// When the file may hold it still.
    pub(super) fn retract(&self) -> io::Result<bool> {
        let way = self.lock();
        match (&way.kind, &way.file) {
            (Kind::File(start), Some(file)) => retract(file, *start).map(|()| true),
            _ => Ok(false),
        }
    }

    /// Waits until `file` is ready for `wanted` or `limit` is over; says whether it is.
    fn wait(&self, file: &File, wanted: PollFlags, limit: Duration) -> io::Result<bool> {
        let mut fds = [
            PollFd::new(file, wanted),
            PollFd::new(&self.given_up, PollFlags::IN),
        ];
        // A limit that is too long for the type is none.
        let limit = Timespec::try_from(limit).ok();
        let ready = loop {
            match poll(&mut fds, limit.as_ref()) {
                Err(rustix::io::Errno::INTR) => {}
                ready => break ready?,
            }
        };
        if !fds[1].revents().is_empty() {
            return Err(io::Error::from_raw_os_error(libc::ECANCELED));
        }
        Ok(ready > 0)
    }

    /// Waits for a command to end, for no longer than `limit` or until this is given up.
    fn wait_exit(&self, child: &mut Child, limit: Duration) -> io::Result<Option<ExitStatus>> {
        let began = Instant::now();
        while began.elapsed() < limit {
            if let Some(status) = child.try_wait()? {
                return Ok(Some(status));
            }
            let mut given_up = [PollFd::new(&self.given_up, PollFlags::IN)];
            let look = Timespec::try_from(LOOK).ok();
            if poll(&mut given_up, look.as_ref()).is_ok_and(|ready| ready > 0) {
                return Err(io::Error::from_raw_os_error(libc::ECANCELED));
            }
        }
        Ok(None)
    }

    fn lock(&self) -> MutexGuard<'_, Way> {
        self.way.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for OneWay {
    /// Nobody is left behind: a command that has not ended is told to, and killed if it does not.
    fn drop(&mut self) {
        let way = self.way.get_mut().unwrap_or_else(PoisonError::into_inner);
        way.file = None;
        let Kind::Command(child) = &mut way.kind else {
            return;
        };
        let group = i32::try_from(child.id()).map(Pid::from_raw);
        for signal in [Signal::SIGTERM, Signal::SIGKILL] {
            let until = Instant::now() + GRACE;
            while Instant::now() < until {
                if !matches!(child.try_wait(), Ok(None)) {
                    return;
                }
                if let Ok(group) = group {
                    // It fails on a group that is gone, which the next look finds.
                    let _ = killpg(group, signal);
                }
                thread::sleep(LOOK);
            }
        }
    }
}

/// A pipe that never blocks: who waits for it can be interrupted.
fn pipe(file: File, kind: Kind) -> io::Result<OneWay> {
    let flags = fcntl_getfl(file.as_fd())?;
    fcntl_setfl(file.as_fd(), flags | OFlags::NONBLOCK)?;
    OneWay::with(file, kind)
}

fn retract(file: &File, start: u64) -> io::Result<()> {
    if file.metadata()?.is_file() {
        file.set_len(start)?;
    } else {
        file.write_all_at(&[0; PREFACE_LEN], start)?;
    }
    file.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(path: &Path) -> String {
        std::fs::read_to_string(path).unwrap()
    }

    #[test]
    fn a_command_takes_all_and_says_how_it_went() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("out");
        let command = format!("cat > {}", path.display());
        let way = OneWay::spawn(&command, Direction::Out).unwrap();
        way.set_patience(Duration::from_secs(20));
        assert_eq!(way.write(b"guest").unwrap(), 5);
        way.finish().unwrap();
        assert_eq!(text(&path), "guest");

        let way = OneWay::spawn("cat >/dev/null; exit 3", Direction::Out).unwrap();
        way.set_patience(Duration::from_secs(20));
        let error = way.finish().unwrap_err().to_string();
        assert!(error.ends_with("exit status: 3"), "{error}");

        let way = OneWay::spawn("echo guest", Direction::In).unwrap();
        let mut bytes = [0; 16];
        assert_eq!(way.read(&mut bytes).unwrap(), 6);
        assert_eq!(way.read(&mut bytes).unwrap(), 0);
    }

    #[test]
    fn who_waits_is_woken_and_commands_do_not_outlive_it() {
        let began = Instant::now();
        let way = OneWay::spawn("sleep 1000 & wait", Direction::Out).unwrap();
        way.set_patience(Duration::from_millis(30));
        assert!(matches!(way.finish(), Err(FinishError::Endless(_))));
        way.interrupt();
        drop(way);
        let way = OneWay::spawn("sleep 1000", Direction::In).unwrap();
        way.interrupt();
        let error = way.read(&mut [0]).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ECANCELED));
        drop(way);
        assert!(began.elapsed() < Duration::from_secs(60));
    }

    #[test]
    fn a_pipe_that_nobody_reads_is_given_up() {
        let (reader, writer) = io::pipe().unwrap();
        let way = OneWay::new(File::from(OwnedFd::from(writer))).unwrap();
        way.set_patience(Duration::from_millis(30));
        let error = loop {
            if let Err(error) = way.write(&[0; 4096]) {
                break error;
            }
        };
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
        assert!(!way.has_room());
        drop(reader);
        let error = way.write(&[0]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::BrokenPipe);
    }

    #[test]
    fn a_file_is_written_from_its_offset_and_taken_back() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        std::fs::write(&path, "0123456789").unwrap();
        let way = OneWay::open(&path, 4, Direction::Out).unwrap();
        way.write(b"guest").unwrap();
        let busy = OneWay::open(&path, 4, Direction::In).unwrap_err();
        assert_eq!(busy.kind(), io::ErrorKind::ResourceBusy);
        way.finish().unwrap();
        drop(way);
        assert_eq!(text(&path), "0123guest");
        let way = OneWay::open(&path, 4, Direction::In).unwrap();
        let mut bytes = [0; 16];
        assert_eq!(way.read(&mut bytes).unwrap(), 5);
        drop(way);
        let way = OneWay::open(&path, 4, Direction::Out).unwrap();
        way.write(b"gue").unwrap();
        assert!(!way.has_room(), "nothing but the guest goes to a file");
        assert!(way.retract().unwrap());
        assert_eq!(text(&path), "0123");
    }
}
