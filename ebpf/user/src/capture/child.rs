//! A process that is started, stopped before its first instruction, and let go once it is watched.
#![allow(unsafe_code)]

use std::ffi::OsString;
use std::io;
use std::os::unix::process::CommandExt;
use std::process::{self, Command, ExitStatus};
use std::ptr::null_mut;

use rustix::io::Errno;
use rustix::process::{Pid, Signal, WaitOptions, kill_process, waitpid};

use super::Error;

/// A command that has been executed and stands still. One that is dropped before it was let go is
/// killed, as it never ran.
///
/// It stops by `ptrace(2)`, whose calls must all come from the thread that spawned it.
#[derive(Debug)]
pub struct Child {
    process: process::Child,
    name: String,
    stopped: bool,
}

impl Child {
    /// Starts `command`, its first word the program, and stops it when the program is in memory and
    /// none of it has run.
    ///
    /// # Errors
    /// [`Error::System`].
    pub fn spawn(command: &[OsString]) -> Result<Self, Error> {
        let name = command
            .first()
            .map_or_else(String::new, |name| name.display().to_string());
        let failed = |source| Error::System {
            what: format!("start `{name}`"),
            source,
        };
        let Some((program, args)) = command.split_first() else {
            return Err(failed(io::ErrorKind::InvalidInput.into()));
        };
        let mut command = Command::new(program);
        command.args(args);
        // SAFETY: the closure runs in the child between fork and exec and makes one system call,
        // which is safe there.
        unsafe { command.pre_exec(trace_me) };
        let process = command.spawn().map_err(failed)?;
        let child = Self {
            process,
            name: name.clone(),
            stopped: true,
        };
        // A traced process stops at its exec by itself.
        match waitpid(
            Pid::from_raw(child.process.id().cast_signed()),
            WaitOptions::UNTRACED,
        ) {
            Ok(Some((_, status))) if status.stopped() => Ok(child),
            Ok(_) => Err(failed(io::Error::other("it ended before it began"))),
            Err(error) => Err(failed(error.into())),
        }
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.process.id()
    }

    /// Its name on the command line.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Lets it run, no longer traced.
    ///
    /// # Errors
    /// [`Error::System`].
    pub fn go(&mut self) -> Result<(), Error> {
        // SAFETY: PTRACE_DETACH takes no memory of ours; the address is ignored and the signal 0.
        let detached = unsafe {
            libc::ptrace(
                libc::PTRACE_DETACH,
                self.pid().cast_signed(),
                null_mut::<libc::c_void>(),
                null_mut::<libc::c_void>(),
            )
        };
        if detached == -1 {
            let what = format!("let `{}` go on", self.name);
            return Err(Error::System {
                what,
                source: io::Error::last_os_error(),
            });
        }
        self.stopped = false;
        Ok(())
    }

    /// Sends it a signal, as whoever sent it to this process would have.
    ///
    /// # Errors
    /// [`Error::System`].
    pub fn signal(&self, signal: i32) -> Result<(), Error> {
        let failed = |source| Error::System {
            what: format!("send signal {signal} to `{}`", self.name),
            source,
        };
        let pid = Pid::from_raw(self.pid().cast_signed());
        let (Some(pid), Some(signal)) = (pid, Signal::from_named_raw(signal)) else {
            return Err(failed(io::ErrorKind::InvalidInput.into()));
        };
        match kill_process(pid, signal) {
            // It has ended meanwhile.
            Ok(()) | Err(Errno::SRCH) => Ok(()),
            Err(error) => Err(failed(error.into())),
        }
    }

    /// How it ended, if it has.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        self.process.try_wait().ok().flatten()
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        if self.stopped {
            // It may be gone already; nothing is left to do then.
            let _ = self.process.kill();
            let _ = self.process.wait();
        }
    }
}

fn trace_me() -> io::Result<()> {
    // SAFETY: PTRACE_TRACEME ignores all other arguments.
    let traced = unsafe {
        libc::ptrace(
            libc::PTRACE_TRACEME,
            0,
            null_mut::<libc::c_void>(),
            null_mut::<libc::c_void>(),
        )
    };
    if traced == -1 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}
