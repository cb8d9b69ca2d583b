//! What of a virtio function goes with the guest.

use std::sync::atomic::Ordering;

use serde::{Deserialize, Serialize};
use virtio_queue::QueueT;

use super::super::worker::NEEDS_RESET;
use super::registers::{DRIVER_OK, Driver, FEATURES_OK};
use super::{Stage, VirtioPci};
use crate::devices::pci::{config, msix};
use crate::devices::{StateError, decode, encode};

/// The version of [`Saved`].
pub(super) const VERSION: u32 = 1;

#[derive(Serialize, Deserialize)]
struct Saved {
    config: config::Saved,
    msix: msix::Saved,
    driver: Driver,
    status: u8,
    isr: u8,
    /// Where the device is in the rings of each queue, once the driver has started it.
    positions: Option<Vec<Option<Position>>>,
    device: Vec<u8>,
}

#[derive(Clone, Copy, Serialize, Deserialize)]
struct Position {
    next_avail: u16,
    next_used: u16,
}

#[derive(Serialize)]
struct SavedRef<'a> {
    config: config::Saved,
    msix: msix::Saved,
    driver: &'a Driver,
    status: u8,
    isr: u8,
    positions: Option<Vec<Option<Position>>>,
    device: Vec<u8>,
}

impl VirtioPci {
    /// The state, encoded; the worker is stopped.
    pub(super) fn save_state(&mut self) -> Result<Vec<u8>, StateError> {
        let lost = || StateError::Invalid("the device's worker is gone".to_owned());
        let device = self
            .with_device(|device| device.save())
            .ok_or_else(lost)??;
        let positions = match &self.stage {
            Stage::Stopped(service) => Some(service.io.queues.iter().map(|queue| {
                queue.as_ref().map(|queue| Position {
                    next_avail: queue.queue.next_avail(),
                    next_used: queue.queue.next_used(),
                })
            })),
            _ => None,
        };
        encode(&SavedRef {
            config: self.config.save(),
            msix: self.msix.save(),
            driver: &self.registers.driver,
            status: self.status.load(Ordering::SeqCst),
            isr: self.isr.load(Ordering::SeqCst),
            positions: positions.map(Iterator::collect),
            device,
        })
    }

    /// Takes a state over. What a driver can't have brought about is refused.
    pub(super) fn load_state(&mut self, version: u32, state: &[u8]) -> Result<(), StateError> {
        let saved: Saved = decode(VERSION, version, state)?;
        self.reset_device();
        self.config.load(&saved.config)?;
        self.msix.load(&saved.msix, &self.config)?;
        self.load_driver(saved.driver, saved.status)?;
        self.status.store(saved.status, Ordering::SeqCst);
        self.isr.store(saved.isr, Ordering::SeqCst);

        let lost = || StateError::Invalid("the device's worker is gone".to_owned());
        let features = self.registers.driver.features;
        let chosen = saved.status & FEATURES_OK != 0;
        self.with_device(|device| {
            if chosen && let Err(error) = device.accept(features) {
                return Err(StateError::Invalid(format!(
                    "this host can't do what the guest's driver was offered: {error}"
                )));
            }
            device.load(&saved.device)
        })
        .ok_or_else(lost)??;
        match saved.positions {
            Some(positions) => self.load_queues(&positions, saved.status),
            None => Ok(()),
        }
    }

    fn load_driver(&mut self, driver: Driver, status: u8) -> Result<(), StateError> {
        let sizes = |driver: &Driver| driver.queues.iter().map(|q| q.max_size).collect::<Vec<_>>();
        if sizes(&driver) != sizes(&self.registers.driver) {
            return Err(StateError::Invalid("other queues than here".to_owned()));
        }
        self.registers.driver = driver;
        if status & FEATURES_OK != 0 && !self.registers.features_fit() {
            let (theirs, ours) = (self.registers.driver.features, self.registers.offered);
            return Err(StateError::Invalid(format!(
                "the guest's driver uses features {theirs:#x}, this host has {ours:#x}"
            )));
        }
        Ok(())
    }

    fn load_queues(
        &mut self,
        positions: &[Option<Position>],
        status: u8,
    ) -> Result<(), StateError> {
        let count = self.registers.driver.queues.len();
        if status & DRIVER_OK == 0 || positions.len() != count {
            return Err(StateError::Invalid(
                "queues of a device that is off".to_owned(),
            ));
        }
        let mut queues = Vec::with_capacity(count);
        for (index, position) in positions.iter().enumerate() {
            let Some(position) = position else {
                queues.push(None);
                continue;
            };
            match self.queue(index, position.next_avail, position.next_used) {
                Ok(queue) => queues.push(Some(queue)),
                // Its driver was told already; it is the driver's to reset it.
                Err(_) if status & NEEDS_RESET != 0 => queues.push(None),
                Err(bad) => return Err(StateError::Invalid(bad.to_string())),
            }
        }
        match std::mem::replace(&mut self.stage, Stage::Lost) {
            Stage::Idle(device) => {
                self.stage = Stage::Stopped(self.service(device, queues, true));
            }
            other => self.stage = other,
        }
        Ok(())
    }
}
