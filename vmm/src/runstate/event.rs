//! What the machine has to say: events to whoever watches it (QMP's, without QMP), and requests to
//! its own main loop.

use std::sync::mpsc::Sender;

/// Where the machine and the migration put events; the QMP server reads the other end.
pub type EventSender = Sender<Event>;

/// An event, named as QMP names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// `STOP`: the vCPUs are paused.
    Stop,
    /// `RESUME`: the vCPUs run.
    Resume,
    /// `MIGRATION`: the migration's status changed; QEMU's `MigrationStatus`.
    Migration(&'static str),
    /// `SHUTDOWN`.
    Shutdown {
        /// Whether the guest asked for it.
        guest: bool,
        /// QEMU's `ShutdownCause`: `guest-shutdown`, `guest-reset`, `host-qmp-quit`, `host-signal`, …
        reason: &'static str,
    },
}

/// What the machine's main loop has to do for a vCPU or for a device that a vCPU just wrote to. A
/// vCPU can't stop the VM from its own thread: `vm_stop` waits for that very thread.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Request {
    /// The guest switched itself off.
    Shutdown,
    /// The guest asked for a reset.
    Reset,
    /// The vCPU can't go on; says why.
    InternalError(String),
}
