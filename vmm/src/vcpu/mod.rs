//! vCPUs: one thread each, and the gate that all of them pass before they enter the guest.

pub mod pause;
pub mod run;
mod throttle;

use std::io;
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};

use crate::kvm::{Kick, Vcpu};
use crate::runstate::GuestRequests;
use pause::{Gate, Want};
pub use run::Buses;
use throttle::Throttle;

/// All vCPUs of a machine. They start paused; [`Vcpus::resume_all_vcpus`] lets them run.
pub struct Vcpus {
    // It is gone before the threads, which it kicks.
    throttle: Throttle,
    threads: Arc<Threads>,
    gate: Arc<Gate>,
}

/// The threads, which end when this is dropped.
struct Threads {
    list: Vec<Thread>,
    gate: Arc<Gate>,
}

struct Thread {
    kick: Kick,
    handle: JoinHandle<()>,
}

impl Vcpus {
    /// Starts a paused thread for each of `vcpus`. Exits reach devices through `buses`; what a
    /// vCPU can't settle itself goes to `requests`.
    ///
    /// # Errors
    /// When the kick's signal can't be handled or a thread can't be started.
    pub fn spawn(
        vcpus: Vec<Arc<Mutex<Vcpu>>>,
        buses: &Arc<Buses>,
        requests: &GuestRequests,
    ) -> io::Result<Self> {
        pause::handle_kick_signal()?;
        let gate = Arc::new(Gate::default());
        let mut threads = Threads {
            list: Vec::with_capacity(vcpus.len()),
            gate: Arc::clone(&gate),
        };
        for (index, vcpu) in vcpus.into_iter().enumerate() {
            let kick = Kick::new(&vcpu);
            let runner = run::Runner {
                index: index as u64,
                vcpu,
                kick: kick.clone(),
                gate: Arc::clone(&gate),
                buses: Arc::clone(buses),
                requests: requests.clone(),
            };
            let name = format!("vcpu{index}");
            let handle = thread::Builder::new().name(name).spawn(|| runner.run())?;
            threads.list.push(Thread { kick, handle });
        }
        gate.wait_paused(threads.list.len());
        Ok(Vcpus {
            throttle: Throttle::default(),
            threads: Arc::new(threads),
            gate,
        })
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.threads.list.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.threads.list.is_empty()
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        self.gate.set(Want::Exit);
        self.list.iter().for_each(pause::kick);
        for thread in self.list.drain(..) {
            // A vCPU thread that panicked has already said why on stderr.
            let _ = thread.handle.join();
        }
    }
}
