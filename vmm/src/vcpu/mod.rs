//! vCPUs: one thread each, and the gate that all of them pass before they enter the guest.

pub mod pause;
pub mod run;

use std::io;
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};

use crate::kvm::{Kick, Vcpu};
use crate::runstate::GuestRequests;
use pause::{Gate, Want};
pub use run::Buses;

/// All vCPUs of a machine. They start paused; [`Vcpus::resume_all_vcpus`] lets them run.
pub struct Vcpus {
    threads: Vec<Thread>,
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
        let mut this = Vcpus {
            threads: Vec::with_capacity(vcpus.len()),
            gate,
        };
        for (index, vcpu) in vcpus.into_iter().enumerate() {
            let kick = Kick::new(&vcpu);
            let runner = run::Runner {
                index: index as u64,
                vcpu,
                kick: kick.clone(),
                gate: Arc::clone(&this.gate),
                buses: Arc::clone(buses),
                requests: requests.clone(),
            };
            let name = format!("vcpu{index}");
            let handle = thread::Builder::new().name(name).spawn(|| runner.run())?;
            this.threads.push(Thread { kick, handle });
        }
        this.gate.wait_paused(this.threads.len());
        Ok(this)
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.threads.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.threads.is_empty()
    }
}

impl Drop for Vcpus {
    fn drop(&mut self) {
        self.gate.set(Want::Exit);
        for thread in &self.threads {
            pause::kick(thread);
        }
        for thread in self.threads.drain(..) {
            // A vCPU thread that panicked has already said why on stderr.
            let _ = thread.handle.join();
        }
    }
}
