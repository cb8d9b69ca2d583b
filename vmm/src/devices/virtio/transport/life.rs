//! From the driver's first store to the device's end: activation, reset, the VM's stops and starts.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use virtio_queue::{Queue, QueueState, QueueT};

use super::super::queue::{ActiveQueue, ISR_CONFIG, Io};
use super::super::worker::{NEEDS_RESET, Service};
use super::registers::{DRIVER_OK, EVENT_IDX, FEATURES_OK, QueueRegisters, next_status};
use super::{Device, Stage, VirtioPci};
use crate::probes::{self, Errno, Guarded};
use crate::runstate::notify::CallbackError;

/// A worker that panicked is not there any more.
#[derive(Debug, thiserror::Error)]
#[error("the device's worker is gone")]
pub(super) struct Gone;

impl Errno for Gone {
    fn errno(&self) -> i32 {
        libc::EIO
    }
}

/// A queue that the driver enabled but did not set up as one can be.
#[derive(Debug, thiserror::Error)]
pub(super) enum BadQueue {
    /// Its registers.
    #[error("queue {0} has {1} descriptors, or its rings are not aligned")]
    Registers(usize, u16, #[source] virtio_queue::Error),
    /// Where it is.
    #[error("queue {0} is not in RAM")]
    Place(usize),
    /// No eventfd.
    #[error("queue {0} has no doorbell")]
    Doorbell(usize, #[source] std::io::Error),
}

impl VirtioPci {
    /// A store of `value` to the device status.
    pub(super) fn set_status(&mut self, value: u8) {
        if value == 0 {
            return self.reset_device();
        }
        let fits = self.registers.features_fit();
        let old = self.status.load(Ordering::SeqCst);
        let new = next_status(old, value, fits);
        // Only the worker's bit can have come meanwhile.
        self.status.fetch_or(new, Ordering::SeqCst);
        if new & !old & FEATURES_OK != 0 {
            let features = self.registers.driver.features;
            let accepted = self.with_device(|device| device.accept(features));
            if let Some(Err(error)) = accepted {
                let name = self.name.to_string_lossy();
                tracing::error!("{name}: the host can't do what it offered: {error}");
                self.status.fetch_and(!FEATURES_OK, Ordering::SeqCst);
            }
        }
        let start = DRIVER_OK | FEATURES_OK;
        if new & start == start && old & DRIVER_OK == 0 {
            self.activate();
        }
    }

    /// Back to what the driver finds: its device is with the transport, and forgets.
    pub(super) fn reset_device(&mut self) {
        if let Stage::Serving = self.stage {
            self.worker.ask_stop();
            self.take_back();
        }
        let stage = std::mem::replace(&mut self.stage, Stage::Lost);
        self.stage = match stage {
            Stage::Stopped(Service { device, .. }) => Stage::Idle(device),
            other => other,
        };
        self.with_device(|device| device.reset());
        self.registers.reset();
        self.status.store(0, Ordering::SeqCst);
        self.isr.store(0, Ordering::SeqCst);
    }

    /// The driver enables a queue: before it starts the device that is only noted.
    pub(super) fn enable_queue(&mut self, index: usize) {
        if let Stage::Serving = self.stage {
            self.interrupted(|this, service| {
                let queue = this.queue(index, 0, 0)?;
                if let Some(place) = service.io.queues.get_mut(index) {
                    *place = Some(queue);
                }
                Ok(())
            });
        }
    }

    /// The driver takes a queue back.
    pub(super) fn reset_queue(&mut self, index: usize) {
        if let Stage::Serving = self.stage {
            self.interrupted(|_, service| {
                if let Some(place) = service.io.queues.get_mut(index) {
                    *place = None;
                }
                Ok(())
            });
        }
        if let Some(queue) = self.registers.driver.queues.get_mut(index) {
            queue.reset();
        }
    }

    /// The VM starts: a device that was stopped goes on.
    pub(super) fn go_on(&mut self) {
        match std::mem::replace(&mut self.stage, Stage::Serving) {
            Stage::Stopped(service) => self.worker.start(service),
            other => self.stage = other,
        }
    }

    /// The VM stops: waits until the worker, which was asked before, has finished what it had.
    pub(super) fn drain(&mut self) -> Result<(), CallbackError> {
        if let Stage::Serving = self.stage {
            probes::device_drain(self.name).run(|span| {
                self.take_back();
                match &self.stage {
                    Stage::Stopped(service) => {
                        span.requests = service.in_flight;
                        Ok(())
                    }
                    _ => Err(Gone),
                }
            })?;
        }
        Ok(())
    }

    /// Calls `body` with the device, unless the worker has it.
    pub(super) fn with_device<T>(&mut self, body: impl FnOnce(&mut dyn Device) -> T) -> Option<T> {
        match &mut self.stage {
            Stage::Idle(device) => Some(body(device.as_mut())),
            Stage::Stopped(service) => Some(body(service.device.as_mut())),
            Stage::Serving | Stage::Lost => None,
        }
    }

    /// Makes the queue `index` as its registers say, with the device at these places in its rings.
    pub(super) fn queue(
        &self,
        index: usize,
        next_avail: u16,
        next_used: u16,
    ) -> Result<ActiveQueue, BadQueue> {
        let missing = || BadQueue::Place(index);
        let registers = self.registers.driver.queues.get(index);
        let registers: &QueueRegisters = registers.ok_or_else(missing)?;
        let queue = Queue::try_from(QueueState {
            max_size: registers.max_size,
            next_avail,
            next_used,
            event_idx_enabled: self.registers.driver.features & EVENT_IDX != 0,
            size: registers.size,
            ready: true,
            desc_table: registers.desc,
            avail_ring: registers.avail,
            used_ring: registers.used,
        });
        let queue = queue.map_err(|e| BadQueue::Registers(index, registers.size, e))?;
        if registers.avail == 0 || !queue.is_valid(self.ram.mem()) {
            return Err(missing());
        }
        let kick = self.kicks.get(index).ok_or_else(missing)?.try_clone();
        Ok(ActiveQueue {
            queue,
            kick: kick.map_err(|e| BadQueue::Doorbell(index, e))?,
            vector: self.msix.vector(registers.vector),
            isr: Arc::clone(&self.isr),
            used: false,
        })
    }

    /// What a worker gets: `device` and these queues.
    pub(super) fn service(
        &self,
        device: Box<dyn Device>,
        queues: Vec<Option<ActiveQueue>>,
        arrived: bool,
    ) -> Service {
        Service {
            device,
            io: Io {
                ram: self.ram.clone(),
                queues,
            },
            arrived,
            status: Arc::clone(&self.status),
            isr: Arc::clone(&self.isr),
            config_vector: self.msix.vector(self.registers.driver.config_vector),
            in_flight: 0,
        }
    }

    /// The driver is ready: the worker takes the device and the queues that are enabled.
    fn activate(&mut self) {
        let registers = self.registers.driver.queues.iter().enumerate();
        let queues = registers.map(|(index, queue)| match queue.enabled {
            true => self.queue(index, 0, 0).map(Some),
            false => Ok(None),
        });
        let queues = match queues.collect::<Result<Vec<_>, _>>() {
            Ok(queues) => queues,
            Err(bad) => return self.refuse(&bad),
        };
        match std::mem::replace(&mut self.stage, Stage::Serving) {
            Stage::Idle(device) => {
                let service = self.service(device, queues, false);
                self.worker.start(service);
            }
            other => self.stage = other,
        }
    }

    /// Takes device and queues from the worker, lets `change` change them, and gives them back.
    fn interrupted(&mut self, change: impl FnOnce(&Self, &mut Service) -> Result<(), BadQueue>) {
        self.worker.ask_stop();
        self.take_back();
        match std::mem::replace(&mut self.stage, Stage::Lost) {
            Stage::Stopped(mut service) => {
                if let Err(bad) = change(self, &mut service) {
                    self.refuse(&bad);
                }
                self.worker.start(service);
                self.stage = Stage::Serving;
            }
            other => self.stage = other,
        }
    }

    /// Waits for the worker, which was asked to stop.
    fn take_back(&mut self) {
        self.stage = match self.worker.wait() {
            Some(service) => Stage::Stopped(service),
            None => {
                self.status.fetch_or(NEEDS_RESET, Ordering::SeqCst);
                Stage::Lost
            }
        };
    }

    /// The driver did what it must not: tells it that only a reset helps.
    fn refuse(&self, bad: &BadQueue) {
        let name = self.name.to_string_lossy();
        tracing::error!("{name} is stopped until its driver resets it: {bad}");
        self.status.fetch_or(NEEDS_RESET, Ordering::SeqCst);
        self.isr.fetch_or(ISR_CONFIG, Ordering::SeqCst);
        if let Some(vector) = self.msix.vector(self.registers.driver.config_vector) {
            vector.signal();
        }
    }
}
