//! The outer end of the serial console: where its bytes go and come from.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use nix::sys::socket::{MsgFlags, send};
use vmm::arch::Uart;
use vmm::devices::serial::Output;
use vmm::socket::{self, SocketFile};

use vmm::args::Console;

/// How long input waits for the guest to make room for it.
const ROOM: Duration = Duration::from_millis(10);

/// Where the guest's input comes from.
pub(crate) enum Input {
    /// Nowhere.
    None,
    /// The process's standard input.
    Stdin,
    /// Whoever connects.
    Socket(UnixListener, SocketFile, Client),
}

/// The client of a console on a socket, if there is one.
type Client = Arc<Mutex<Option<UnixStream>>>;

/// Opens the console's outer end: the output for the machine, the input to be fed to it later.
pub(crate) fn open(console: &Console) -> Result<(Output, Input)> {
    Ok(match console {
        Console::Null => (Box::new(io::sink()), Input::None),
        Console::Stdio => {
            // Not `Stdout`: it would keep an unfinished line, such as a prompt, to itself.
            let stdout = File::from(io::stdout().as_fd().try_clone_to_owned()?);
            (Box::new(stdout), Input::Stdin)
        }
        Console::File(path) => {
            let file = File::create(path)
                .with_context(|| format!("can't create the console's file {}", path.display()))?;
            (Box::new(file), Input::None)
        }
        Console::Unix(path) => {
            let (listener, file) = socket::listen(path).context("the console")?;
            let client = Client::default();
            let output = ToClient(Arc::clone(&client));
            (Box::new(output), Input::Socket(listener, file, client))
        }
    })
}

impl Input {
    /// Starts to give the guest what comes in. The console's socket, if it has one, is removed
    /// when what is returned is dropped.
    pub(crate) fn feed(self, serial: Uart) -> io::Result<Option<SocketFile>> {
        let (body, file): (Box<dyn FnOnce() + Send>, _) = match self {
            Input::None => return Ok(None),
            Input::Stdin => (Box::new(move || copy(io::stdin(), &serial)), None),
            Input::Socket(listener, file, client) => (
                Box::new(move || serve(&listener, &client, &serial)),
                Some(file),
            ),
        };
        thread::Builder::new()
            .name("console".to_owned())
            .spawn(body)?;
        Ok(file)
    }
}

/// One client after the other.
fn serve(listener: &UnixListener, client: &Client, serial: &Uart) {
    let set = |stream| *client.lock().unwrap_or_else(PoisonError::into_inner) = stream;
    while let Ok((stream, _)) = listener.accept() {
        match stream.try_clone() {
            Ok(writing) => set(Some(writing)),
            Err(error) => {
                tracing::warn!(%error, "console client turned away");
                continue;
            }
        }
        copy(stream, serial);
        set(None);
    }
}

/// Until `from` ends. What the guest has no room for waits here.
fn copy(mut from: impl Read, serial: &Uart) {
    let mut bytes = [0; 256];
    while let Ok(count @ 1..) = from.read(&mut bytes) {
        let mut left = bytes.get(..count).unwrap_or_default();
        while !left.is_empty() {
            let taken = serial.enqueue(left);
            left = left.get(taken..).unwrap_or_default();
            if taken == 0 {
                thread::sleep(ROOM);
            }
        }
    }
}

/// The guest's output, for whoever is connected. A client that does not read loses bytes: the
/// guest must not wait for it, since a stop would wait, too.
struct ToClient(Client);

impl Write for ToClient {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let client = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(stream) = client.as_ref() {
            let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
            let _ = send(stream.as_raw_fd(), bytes, flags);
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
