//! Everything that goes out to clients passes here, in one order.
//!
//! The machine's threads, the migration's and the clients' own put events and answers on one
//! channel; one thread hands them to the clients' writers. So a client sees `STOP` before the
//! answer to its `stop`, as with QEMU, and the thread that stops the VM pays for one send. Even that
//! can wait: a `STOP` inside a migration's downtime is held, and keeps its place in the order.

use std::collections::HashMap;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender, SyncSender, TrySendError};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use super::wire;
use crate::runstate::{Event, EventSender, EventSink};

/// Lines that may wait for one client. A client that lets more events pile up is dropped.
pub(super) const BACKLOG: usize = 256;

/// How long [`Hub::close`] waits for clients to take what is theirs.
const GRACE: Duration = Duration::from_secs(1);

/// Tells clients apart.
pub(super) type ClientId = u64;

/// Where outgoing lines are put; see the module.
#[derive(Clone)]
pub struct Hub {
    outputs: Sender<Output>,
    /// What goes out before anything else does. Its lock is what keeps the order.
    held: Arc<Mutex<Vec<Output>>>,
}

/// A line on its way to one client's writer.
pub(super) struct Line {
    /// The bytes.
    pub bytes: Arc<[u8]>,
    /// Told once the bytes are written; dropped if they never will be.
    pub written: Option<SyncSender<()>>,
}

/// A client as the hub sees it.
pub(super) struct Client {
    /// To cut the connection.
    pub stream: UnixStream,
    /// To its writer; its bound is [`BACKLOG`].
    pub lines: SyncSender<Line>,
    /// Ends when the writer has ended.
    pub writer: Receiver<()>,
}

enum Output {
    Join(ClientId, Client),
    Answer(ClientId, Answer),
    Leave(ClientId),
    Event(SystemTime, Event),
    Close(SyncSender<()>),
}

struct Answer {
    line: Line,
    subscribes: bool,
}

impl Hub {
    /// Starts the hub's thread.
    ///
    /// # Errors
    /// When it can't be started.
    pub fn start() -> std::io::Result<Self> {
        let (outputs, receiver) = mpsc::channel();
        std::thread::Builder::new()
            .name("qmp-hub".to_owned())
            .spawn(|| run(receiver))?;
        Ok(Hub {
            outputs,
            held: Arc::default(),
        })
    }

    /// Where the machine and the migration put events.
    pub fn events(&self) -> EventSender {
        EventSender::to(self.clone())
    }

    /// A new client. It gets answers from now on.
    pub(super) fn join(&self, id: ClientId, client: Client) {
        self.put(Output::Join(id, client));
    }

    /// Sends `bytes` to one client and waits until they are written, so that a client that asks
    /// more than it reads is slowed down. The client gets every event that follows this answer if
    /// the answer `subscribes` it. Returns whether the client is still there.
    pub(super) fn answer(&self, id: ClientId, bytes: Vec<u8>, subscribes: bool) -> bool {
        let (written, wait) = mpsc::sync_channel(1);
        let line = Line {
            bytes: bytes.into(),
            written: Some(written),
        };
        self.put(Output::Answer(id, Answer { line, subscribes }));
        wait.recv().is_ok()
    }

    /// The client is gone.
    pub(super) fn leave(&self, id: ClientId) {
        self.put(Output::Leave(id));
    }

    /// Lets every client have what was sent so far, waits a little for slow ones, then cuts all
    /// connections and ends the thread.
    pub fn close(&self) {
        let (done, wait) = mpsc::sync_channel(1);
        self.put(Output::Close(done));
        // An error says that the thread has already ended.
        let _ = wait.recv();
    }

    fn put(&self, output: Output) {
        let mut held = self.held();
        held.push(output);
        self.send_all(&mut held);
    }

    fn send_all(&self, held: &mut Vec<Output>) {
        for output in held.drain(..) {
            // The thread outlives every use but those that race with `close`; what they send is lost
            // with the connections.
            let _ = self.outputs.send(output);
        }
    }

    fn held(&self) -> MutexGuard<'_, Vec<Output>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl EventSink for Hub {
    fn send(&self, event: Event) {
        self.put(Output::Event(SystemTime::now(), event));
    }

    fn hold(&self, event: Event) {
        self.held().push(Output::Event(SystemTime::now(), event));
    }

    fn release(&self) {
        self.send_all(&mut self.held());
    }
}

struct Entry {
    client: Client,
    subscribed: bool,
}

impl Entry {
    /// Queues a line. Cuts the connection if the queue is full, and returns whether there still is
    /// one; the client's reader sees the end and leaves.
    fn queue(&self, line: Line) -> bool {
        match self.client.lines.try_send(line) {
            Ok(()) => true,
            Err(TrySendError::Disconnected(_)) => false,
            Err(TrySendError::Full(_)) => {
                tracing::warn!("a QMP client does not read: it is dropped");
                // It fails when the peer has cut it first.
                let _ = self.client.stream.shutdown(Shutdown::Both);
                false
            }
        }
    }
}

fn run(outputs: Receiver<Output>) {
    let mut clients: HashMap<ClientId, Entry> = HashMap::new();
    for output in outputs {
        match output {
            Output::Join(id, client) => {
                let entry = Entry {
                    client,
                    subscribed: false,
                };
                clients.insert(id, entry);
            }
            Output::Answer(id, Answer { line, subscribes }) => {
                if let Some(entry) = clients.get_mut(&id) {
                    entry.subscribed |= subscribes;
                    if !entry.queue(line) {
                        clients.remove(&id);
                    }
                }
            }
            Output::Leave(id) => drop(clients.remove(&id)),
            Output::Event(at, event) => {
                let bytes: Arc<[u8]> = wire::event(at, &event).into();
                clients.retain(|_, entry| {
                    let bytes = Arc::clone(&bytes);
                    let written = None;
                    !entry.subscribed || entry.queue(Line { bytes, written })
                });
            }
            Output::Close(done) => {
                finish(clients);
                // An error says that nobody waits.
                let _ = done.send(());
                return;
            }
        }
    }
}

/// Ends the writers' queues, and cuts the connection of those that don't get to the end in time.
fn finish(clients: HashMap<ClientId, Entry>) {
    let deadline = std::time::Instant::now() + GRACE;
    for entry in clients.into_values() {
        let Client {
            stream,
            lines,
            writer,
        } = entry.client;
        drop(lines);
        let left = deadline.saturating_duration_since(std::time::Instant::now());
        if writer.recv_timeout(left) == Err(RecvTimeoutError::Timeout) {
            tracing::warn!("QMP client does not read: its last lines are lost");
        }
        let _ = stream.shutdown(Shutdown::Both);
    }
}
