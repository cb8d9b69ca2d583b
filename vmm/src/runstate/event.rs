//! What the machine has to say: events to whoever watches it (QMP's, without QMP), and requests to
//! its own main loop.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Sender;

/// Where the machine and the migration put events.
///
/// It is called on the thread that caused the event, part of the time inside the blackout, so what
/// stands behind it must neither block nor do work that can be done later.
#[derive(Clone)]
pub struct EventSender(Arc<dyn EventSink>);

/// What stands behind an [`EventSender`].
pub trait EventSink: Send + Sync {
    /// Tells whoever watches.
    fn send(&self, event: Event);
    /// See [`EventSender::hold`].
    fn hold(&self, event: Event);
    /// See [`EventSender::release`].
    fn release(&self);
}

/// A function for which no event can wait.
struct Function<F>(F);

impl<F: Fn(Event) + Send + Sync> EventSink for Function<F> {
    fn send(&self, event: Event) {
        (self.0)(event);
    }
    fn hold(&self, event: Event) {
        (self.0)(event);
    }
    fn release(&self) {}
}

impl EventSender {
    /// A sender that hands each event to `sink`, in the order in which they are sent.
    pub fn new(sink: impl Fn(Event) + Send + Sync + 'static) -> Self {
        Self::to(Function(sink))
    }

    /// A sender to `sink`.
    pub fn to(sink: impl EventSink + 'static) -> Self {
        EventSender(Arc::new(sink))
    }

    /// Tells whoever watches of `event`.
    pub fn send(&self, event: Event) {
        self.0.send(event);
    }

    /// Gives `event` its place before whatever is said from now on, but wakes nobody for it: that
    /// costs a system call, for which a stop has no time. [`EventSender::release`], or the next
    /// thing that is said, sends it on its way.
    pub fn hold(&self, event: Event) {
        self.0.hold(event);
    }

    /// Lets go of what is held.
    pub fn release(&self) {
        self.0.release();
    }
}

impl fmt::Debug for EventSender {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("EventSender")
    }
}

/// An event, named as QMP names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// `STOP`: the vCPUs are paused.
    Stop,
    /// `RESUME`: the vCPUs run.
    Resume,
    /// `MIGRATION`: the migration's status changed; QEMU's `MigrationStatus`.
    Migration(&'static str),
    /// `RESET`: the machine boots again.
    Reset {
        /// Whether the guest asked for it.
        guest: bool,
        /// QEMU's `ShutdownCause`: `guest-reset`, `host-qmp-system-reset`.
        reason: &'static str,
    },
    /// `POWERDOWN`: the power button was pressed.
    Powerdown,
    /// `SHUTDOWN`.
    Shutdown {
        /// Whether the guest asked for it.
        guest: bool,
        /// QEMU's `ShutdownCause`: `guest-shutdown`, `guest-reset`, `host-qmp-quit`, `host-signal`, …
        reason: &'static str,
    },
}

/// What the main loop has to do. A vCPU asks for it, or a device that a vCPU just wrote to: neither
/// can stop the VM from the vCPU's own thread, since `vm_stop` waits for that very thread. Or
/// somebody outside wants the process to end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Request {
    /// The guest switched itself off.
    Shutdown,
    /// The guest asked for a reset.
    Reset,
    /// The vCPU can't go on; says why.
    InternalError(String),
    /// QMP's `quit`.
    Quit,
    /// A signal that asks the process to end.
    Signal,
}

/// Where a vCPU, or a device that it writes to, puts what it wants of the main loop.
#[derive(Clone, Debug)]
pub struct GuestRequests {
    requests: Sender<Request>,
    pending: Arc<AtomicBool>,
}

impl GuestRequests {
    /// What arrives goes on to `requests`.
    pub fn new(requests: Sender<Request>) -> Self {
        GuestRequests {
            requests,
            pending: Arc::default(),
        }
    }

    /// Asks for something; called on a vCPU's thread.
    pub fn send(&self, request: Request) {
        self.pending.store(true, Ordering::Release);
        // The receiver only goes away when the process ends.
        let _ = self.requests.send(request);
    }

    /// Whether anything was asked for that ends this run of the guest. With the vCPUs paused the
    /// answer stays; the main loop may not have heard of it yet.
    pub fn are_pending(&self) -> bool {
        self.pending.load(Ordering::Acquire)
    }

    /// The machine boots again, with the vCPUs paused: nobody has asked for anything.
    pub fn forget(&self) {
        self.pending.store(false, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[test]
    fn what_a_guest_asked_for_is_known_before_anybody_has_answered() {
        let (sender, receiver) = mpsc::channel();
        let requests = GuestRequests::new(sender);
        let device = requests.clone();
        assert!(!requests.are_pending());
        device.send(Request::Shutdown);
        assert!(requests.are_pending());
        assert_eq!(receiver.recv().unwrap(), Request::Shutdown);
        assert!(requests.are_pending());
        requests.forget();
        assert!(!device.are_pending());
    }
}
