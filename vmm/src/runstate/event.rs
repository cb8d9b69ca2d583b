//! What the machine has to say to whoever watches it: QMP's asynchronous events, without QMP.

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
