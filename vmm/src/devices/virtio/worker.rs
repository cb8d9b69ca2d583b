//! A device's worker: a thread that waits for kicks and for what the device waits for.
//!
//! The device and its queues move to the thread when it starts to serve and back when it stops, so
//! whoever stops it has everything, and nobody else has anything.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread::{self, JoinHandle};

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use super::queue::{ISR_CONFIG, Io};
use super::{Device, Fault};
use crate::devices::pci::msix::Vector;

/// `DEVICE_NEEDS_RESET` in the status register.
pub(super) const NEEDS_RESET: u8 = 0x40;

/// What a worker serves.
pub(super) struct Service {
    pub(super) device: Box<dyn Device>,
    pub(super) io: Io,
    /// Whether it comes from a migration's source, and is served here for the first time.
    pub(super) arrived: bool,
    /// Where the driver sees that the device can't go on, and what tells it to look.
    pub(super) status: Arc<AtomicU8>,
    pub(super) isr: Arc<AtomicU8>,
    pub(super) config_vector: Option<Arc<Vector>>,
    /// Requests that were under way when the worker was last told to stop.
    pub(super) in_flight: u64,
}

/// The thread, seen from the transport.
pub(super) struct Worker {
    to: Option<Sender<Service>>,
    from: Receiver<Service>,
    stop: EventFd,
    thread: Option<JoinHandle<()>>,
}

impl Worker {
    /// Starts an idle thread with this name.
    pub(super) fn spawn(name: &str) -> io::Result<Self> {
        let stop = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
        let (to, services) = mpsc::channel();
        let (back, from) = mpsc::channel();
        let stopped = stop.try_clone()?;
        let thread = thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || run(&services, &back, &stopped))?;
        Ok(Worker {
            to: Some(to),
            from,
            stop,
            thread: Some(thread),
        })
    }

    /// Begins to serve.
    pub(super) fn start(&self, service: Service) {
        // The thread only ends with this side of the channel.
        let sent = self.to.as_ref().map(|to| to.send(service));
        debug_assert!(matches!(sent, Some(Ok(()))));
    }

    /// Asks the thread to finish what is under way and stop; [`Worker::wait`] comes after it.
    pub(super) fn ask_stop(&self) {
        // A counter that is full says the same.
        let _ = self.stop.write(1);
    }

    /// Waits for the thread to have stopped. `None` when it panicked, which has been said then.
    pub(super) fn wait(&self) -> Option<Service> {
        let service = self.from.recv().ok();
        let _ = self.stop.read();
        service
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.ask_stop();
        drop(self.to.take());
        if let Some(thread) = self.thread.take() {
            // A thread that panicked has already said why on stderr.
            let _ = thread.join();
        }
    }
}

fn run(services: &Receiver<Service>, back: &Sender<Service>, stop: &EventFd) {
    for mut service in services {
        if let Err(fault) = service.serve(stop) {
            service.give_up(&fault);
            wait_for(stop);
        }
        match service.device.finish(&mut service.io) {
            Ok(requests) => service.in_flight = requests,
            Err(fault) => service.give_up(&fault),
        }
        if back.send(service).is_err() {
            return;
        }
    }
}

/// Tokens: the stop, then the queues, then the device's own sources.
const STOP: u64 = 0;

impl Service {
    /// Serves until told to stop.
    fn serve(&mut self, stop: &EventFd) -> Result<(), Fault> {
        let host = |error| Fault::Host("waiting for work", error);
        let epoll = Epoll::new().map_err(host)?;
        let watch = |fd, events, token| {
            epoll
                .ctl(ControlOperation::Add, fd, EpollEvent::new(events, token))
                .map_err(host)
        };
        watch(stop.as_raw_fd(), EventSet::IN, STOP)?;
        for (token, queue) in (STOP + 1..).zip(&self.io.queues) {
            if let Some(queue) = queue {
                watch(queue.kick.as_raw_fd(), EventSet::IN, token)?;
            }
        }
        let first_source = STOP + 1 + self.io.queues.len() as u64;
        for (token, source) in (first_source..).zip(self.device.sources()) {
            let events = EventSet::IN | EventSet::OUT | EventSet::EDGE_TRIGGERED;
            watch(source, events, token)?;
        }

        let arrived = std::mem::take(&mut self.arrived);
        self.device.start(&mut self.io, arrived)?;
        if arrived {
            // An interrupt that was on its way when the source stopped may have been left there.
            for queue in self.io.queues.iter().flatten() {
                queue.interrupt();
            }
        }
        // Nobody kicks again for what came in while nobody served.
        for index in 0..self.io.queues.len() {
            self.device.kicked(index, &mut self.io)?;
        }
        let mut events = [EpollEvent::default(); 16];
        loop {
            let count = match epoll.wait(-1, &mut events) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                result => result.map_err(host)?,
            };
            for event in events.iter().take(count) {
                let token = event.data();
                if token == STOP {
                    return Ok(());
                }
                if token >= first_source {
                    let source = usize::try_from(token - first_source).unwrap_or(usize::MAX);
                    self.device.ready(source, &mut self.io)?;
                    continue;
                }
                let index = usize::try_from(token - 1).unwrap_or(usize::MAX);
                if let Some(Some(queue)) = self.io.queues.get(index) {
                    // It is readable; if somebody else read it, the queue is looked at for nothing.
                    let _ = queue.kick.read();
                }
                self.device.kicked(index, &mut self.io)?;
            }
        }
    }

    /// Tells the driver that only a reset helps.
    fn give_up(&self, fault: &Fault) {
        let name = thread::current().name().unwrap_or_default().to_owned();
        let cause = std::error::Error::source(fault);
        let cause = cause.map(|cause| format!(": {cause}")).unwrap_or_default();
        tracing::error!("{name} is stopped until its driver resets it: {fault}{cause}");
        self.status.fetch_or(NEEDS_RESET, Ordering::SeqCst);
        self.isr.fetch_or(ISR_CONFIG, Ordering::SeqCst);
        if let Some(vector) = &self.config_vector {
            vector.signal();
        }
    }
}

/// Waits until the device is to stop, with nothing else to do.
fn wait_for(stop: &EventFd) {
    let Ok(epoll) = Epoll::new() else { return };
    let event = EpollEvent::new(EventSet::IN, STOP);
    let watched = epoll.ctl(ControlOperation::Add, stop.as_raw_fd(), event);
    let mut events = [EpollEvent::default()];
    while watched.is_ok() {
        match epoll.wait(-1, &mut events) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            _ => return,
        }
    }
}
