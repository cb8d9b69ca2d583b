//! A console (virtio 1.2, 5.3) with one port, for guests that find the serial one too slow.
//!
//! Output goes to a file or to whoever is connected to a socket; input comes from there. As on the
//! serial console, a client that does not read loses output: the guest must not wait for it.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::queue::Io;
use super::{Device, Fault, Kind};
use crate::devices::StateError;
use crate::socket::{self, SocketFile};

const RX: usize = 0;
const TX: usize = 1;
const QUEUE_SIZES: &[u16] = &[64, 64];

/// Buffers that are filled before the worker looks whether it is to stop.
const BATCH: usize = 64;

/// Where a console leads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Options {
    /// Nowhere.
    Null,
    /// Output to a file, which is created or emptied.
    File(PathBuf),
    /// A unix socket that listens, for one client at a time.
    Unix(PathBuf),
}

/// A console's outer end could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file.
    #[error("the console's file {}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The socket.
    #[error("the console")]
    Socket(#[from] socket::Error),
    /// Waiting for clients.
    #[error("the console's socket")]
    Wait(#[source] io::Error),
}

/// The console; it has no state.
pub struct Console {
    outer: Outer,
}

enum Outer {
    Null,
    File(File),
    Socket(Socket),
}

/// A socket and its client, behind one descriptor that is readable when either is.
struct Socket {
    listener: UnixListener,
    client: Option<File>,
    epoll: Epoll,
    _file: SocketFile,
}

impl Console {
    /// Opens the outer end.
    ///
    /// # Errors
    /// When it can't be opened.
    pub fn open(options: &Options) -> Result<Self, Error> {
        let outer = match options {
            Options::Null => Outer::Null,
            Options::File(path) => Outer::File(File::create(path).map_err(|source| {
                let path = path.clone();
                Error::File { path, source }
            })?),
            Options::Unix(path) => {
                let (listener, file) = socket::listen(path)?;
                listener.set_nonblocking(true).map_err(Error::Wait)?;
                let epoll = Epoll::new().map_err(Error::Wait)?;
                watch(&epoll, listener.as_raw_fd()).map_err(Error::Wait)?;
                Outer::Socket(Socket {
                    listener,
                    client: None,
                    epoll,
                    _file: file,
                })
            }
        };
        Ok(Console { outer })
    }

    /// Writes what the guest has written.
    fn output(&mut self, io: &mut Io) -> Result<(), Fault> {
        while let Some(mut chain) = io.next(TX)? {
            match &self.outer {
                Outer::Null => {}
                Outer::File(file) => {
                    while !chain.readable.is_empty() {
                        match chain.readable.write_to(file, None) {
                            Ok(written) => drop(chain.readable.split_to(written)),
                            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                            Err(error) => {
                                tracing::warn!("the console loses output: {error}");
                                break;
                            }
                        }
                    }
                }
                Outer::Socket(socket) => {
                    if let Some(client) = &socket.client {
                        let _ = chain.readable.write_to(client, None);
                    }
                }
            }
            io.done(TX, chain.head, 0)?;
        }
        io.notify(TX)
    }

    /// Gives the guest what the client has written, as long as it has buffers.
    fn input(&mut self, io: &mut Io) -> Result<(), Fault> {
        let Outer::Socket(socket) = &mut self.outer else {
            return Ok(());
        };
        let mut left = BATCH;
        while let Some(client) = &socket.client {
            let Some(chain) = io.next(RX)? else {
                break;
            };
            if chain.writable.is_empty() {
                return Err(Fault::Request("an input buffer can't be written"));
            }
            match chain.writable.read_from(client, None) {
                Ok(read @ 1..) => {
                    io.done(RX, chain.head, read)?;
                    left -= 1;
                    if left == 0 {
                        io.again(RX);
                        break;
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => io.put_back(RX),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    io.put_back(RX);
                    break;
                }
                // The client is gone; the next one may have been waiting.
                Ok(_) | Err(_) => {
                    io.put_back(RX);
                    socket.client = None;
                    socket.accept();
                }
            }
        }
        io.notify(RX)
    }
}

impl Socket {
    /// Takes a client if there is none. Others wait in the socket's queue.
    fn accept(&mut self) {
        // The events only woke the worker; the descriptors say what there is.
        let _ = self.epoll.wait(0, &mut [EpollEvent::default(); 4]);
        while self.client.is_none() {
            let Ok((stream, _)) = self.listener.accept() else {
                return;
            };
            let ready = stream.set_nonblocking(true);
            if ready
                .and_then(|()| watch(&self.epoll, stream.as_raw_fd()))
                .is_ok()
            {
                self.client = Some(File::from(OwnedFd::from(stream)));
            }
        }
    }
}

fn watch(epoll: &Epoll, fd: RawFd) -> io::Result<()> {
    let events = EventSet::IN | EventSet::EDGE_TRIGGERED;
    epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(events, 0))
}

impl Device for Console {
    fn kind(&self) -> Kind {
        Kind::Console
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &'static [u16] {
        QUEUE_SIZES
    }

    /// Columns, rows and ports: only with features that it has not.
    fn config(&self) -> &[u8] {
        &[0; 12]
    }

    fn claim(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn release(&mut self) {}

    fn accept(&mut self, _: u64) -> io::Result<()> {
        Ok(())
    }

    fn reset(&mut self) {}

    fn save(&mut self) -> Result<Vec<u8>, StateError> {
        Ok(Vec::new())
    }

    fn load(&mut self, state: &[u8]) -> Result<(), StateError> {
        if state.is_empty() {
            return Ok(());
        }
        Err(StateError::Invalid("a console has no state".to_owned()))
    }

    fn sources(&self) -> Vec<RawFd> {
        match &self.outer {
            Outer::Socket(socket) => vec![socket.epoll.as_raw_fd()],
            _ => Vec::new(),
        }
    }

    fn start(&mut self, _: &mut Io, _: bool) -> Result<(), Fault> {
        Ok(())
    }

    fn kicked(&mut self, queue: usize, io: &mut Io) -> Result<(), Fault> {
        match queue {
            RX => self.input(io),
            _ => self.output(io),
        }
    }

    fn ready(&mut self, _: usize, io: &mut Io) -> Result<(), Fault> {
        if let Outer::Socket(socket) = &mut self.outer {
            socket.accept();
        }
        self.input(io)
    }

    fn finish(&mut self, io: &mut Io) -> Result<u64, Fault> {
        // What the guest had written before it was stopped.
        self.output(io)?;
        Ok(0)
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    use super::super::testing::Driver;
    use super::*;

    const BUFFER: u64 = 0x10_0000;

    #[test]
    fn output_goes_to_its_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("console");
        let console = Console::open(&Options::File(path.clone())).unwrap();
        let mut driver = Driver::start(Box::new(console), 0, 2);
        driver.ram.write(BUFFER, b"hello, world").unwrap();
        driver.offer(1, &[(BUFFER, 7, false), (BUFFER + 7, 5, false)]);
        assert_eq!(driver.used(1), (0, 0));
        assert_eq!(std::fs::read(&path).unwrap(), b"hello, world");
    }

    #[test]
    fn one_client_after_the_other_talks_to_the_guest() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("console");
        let console = Console::open(&Options::Unix(path.clone())).unwrap();
        let mut driver = Driver::start(Box::new(console), 0, 2);
        for word in [*b"first", *b"other"] {
            driver.offer(0, &[(BUFFER, 5, true)]);
            let mut client = UnixStream::connect(&path).unwrap();
            client.write_all(&word).unwrap();
            assert_eq!(driver.used(0).1, 5);
            driver.wait_interrupt(1);
            let mut seen = [0; 5];
            driver.ram.read(BUFFER, &mut seen).unwrap();
            assert_eq!(seen, word);

            driver.offer(1, &[(BUFFER, 5, false)]);
            driver.used(1);
            let mut heard = [0; 5];
            client.read_exact(&mut heard).unwrap();
            assert_eq!(heard, word);
            drop(client);
        }
        // Input that came while the VM was stopped.
        driver.stop_vm();
        let mut client = UnixStream::connect(&path).unwrap();
        client.write_all(b"later").unwrap();
        driver.start_vm();
        driver.offer(0, &[(BUFFER, 16, true)]);
        assert_eq!(driver.used(0).1, 5);
    }

    #[test]
    fn an_input_buffer_that_can_not_be_written_stops_the_console() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("console");
        let console = Console::open(&Options::Unix(path.clone())).unwrap();
        let mut driver = Driver::start(Box::new(console), 0, 2);
        let _client = UnixStream::connect(&path).unwrap();
        driver.offer(0, &[(BUFFER, 5, false)]);
        driver.wait_needs_reset();
    }
}
