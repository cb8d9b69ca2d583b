//! A vCPU's thread: pass the gate, enter the guest, settle the exit.

use std::sync::{Arc, Mutex, PoisonError};

use kvm_bindings::{KVM_EXIT_DIRTY_RING_FULL, KVM_SYSTEM_EVENT_RESET, KVM_SYSTEM_EVENT_SHUTDOWN};

use super::pause::{Gate, Want};
use crate::devices::bus::Bus;
use crate::kvm::{self, Exit, Kick, Vcpu};
use crate::probes::{self, Errno};
use crate::runstate::{GuestRequests, Request};
use crate::spanlog::monotonic_ns;

/// The address spaces that exits reach.
#[derive(Default)]
pub struct Buses {
    /// Loads and stores.
    pub mmio: Bus,
    /// Port I/O; nothing is on it where the architecture has none.
    pub pio: Bus,
}

/// What a vCPU thread owns.
pub(super) struct Runner {
    pub(super) index: u64,
    pub(super) vcpu: Arc<Mutex<Vcpu>>,
    pub(super) kick: Kick,
    pub(super) gate: Arc<Gate>,
    pub(super) buses: Arc<Buses>,
    pub(super) requests: GuestRequests,
}

impl Runner {
    /// Runs until the gate says to end.
    pub(super) fn run(self) {
        let mut exit_ns = None;
        loop {
            match self.gate.want() {
                Want::Exit => return,
                Want::Pause => {
                    if exit_ns.is_some() {
                        probes::vcpu_paused(self.index);
                    }
                    if self.gate.pause(exit_ns) == Want::Exit {
                        return;
                    }
                }
                Want::Run => self.gate.rest(),
            }
            if exit_ns.is_none() {
                self.gate.note_first_run(monotonic_ns());
                probes::vcpu_first_run(self.index);
            }
            let request = self.enter();
            exit_ns = Some(monotonic_ns());
            if let Some(request) = request {
                self.requests.send(request);
                self.gate.wait_while_running();
            }
        }
    }

    /// Runs the guest until a pause is wanted or something needs the main loop. On return no exit
    /// is left half done: `KVM_RUN` finishes an I/O or MMIO exit on the next entry, so the way out
    /// is always an `EINTR`, which `immediate_exit` gives before the guest runs.
    fn enter(&self) -> Option<Request> {
        let mut vcpu = self.vcpu.lock().unwrap_or_else(PoisonError::into_inner);
        self.kick.clear();
        if self.gate.want() != Want::Run {
            self.kick.set();
        }
        let mut request = None;
        let rings = vcpu.dirty_rings();
        loop {
            match vcpu.run() {
                Ok(Exit::Unsupported(KVM_EXIT_DIRTY_RING_FULL)) => {
                    let collected = rings
                        .as_ref()
                        .map_or(Ok(()), |rings| rings.collect(vcpu.index()));
                    request = collected.err().map(internal_error).or(request);
                }
                Ok(exit) => request = settle(exit, &self.buses).or(request),
                Err(error) if error.errno() == libc::EINTR => return request,
                Err(error) if error.errno() == libc::EAGAIN => {}
                Err(error) => return Some(internal_error(error)),
            }
            if request.is_some() {
                self.kick.set();
            }
        }
    }
}

fn internal_error(error: kvm::Error) -> Request {
    Request::InternalError(format!("{error}: {}", error.source))
}

/// Lets a device answer an exit, or says what the main loop has to do.
fn settle(exit: Exit<'_>, buses: &Buses) -> Option<Request> {
    match exit {
        Exit::MmioRead(addr, data) => buses.mmio.read(addr, data),
        Exit::MmioWrite(addr, data) => buses.mmio.write(addr, data),
        Exit::IoIn(port, data) => buses.pio.read(port.into(), data),
        Exit::IoOut(port, data) => buses.pio.write(port.into(), data),
        Exit::Hlt | Exit::Intr | Exit::IrqWindowOpen => {}
        // A triple fault: what a PC does then is reset.
        Exit::Shutdown => return Some(Request::Reset),
        Exit::SystemEvent(KVM_SYSTEM_EVENT_SHUTDOWN, _) => return Some(Request::Shutdown),
        Exit::SystemEvent(KVM_SYSTEM_EVENT_RESET, _) => return Some(Request::Reset),
        other => return Some(Request::InternalError(format!("KVM_RUN: exit {other:?}"))),
    }
    None
}
