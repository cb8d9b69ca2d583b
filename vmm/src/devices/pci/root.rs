//! The root bus: ECAM, and where the functions' BARs decode.

use std::ffi::CStr;
use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::config::{Config, Identity};
use super::{Backplane, Function};
use crate::devices::{BusDevice, StateError, decode, encode};
use crate::runstate::RunState;
use crate::runstate::notify::CallbackError;

/// Devices that a bus has room for; the host bridge is the first.
const DEVICES: usize = 32;

/// Bytes of ECAM for one function, one device, one bus.
const FUNCTION_SHIFT: u32 = 12;
const DEVICE_SHIFT: u32 = 15;
const BUS_SHIFT: u32 = 20;

/// The root bus, shared by exits and the stop path.
pub type SharedRoot = Arc<Mutex<Root>>;

/// A device's number on the root bus.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slot(u8);

impl Slot {
    /// The requester id of the device's only function: what its MSIs carry.
    pub fn requester(self) -> u32 {
        u32::from(self.0) << 3
    }
}

/// A BAR that decodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Decoded {
    address: u64,
    size: u64,
    slot: usize,
    bar: usize,
}

/// The bus.
pub struct Root {
    functions: Vec<Box<dyn Function>>,
    /// Where BARs may decode: the bridge's windows. RAM is in none.
    windows: [Range<u64>; 2],
    /// What decodes now.
    decoded: Vec<Decoded>,
    /// Where the next device's BAR is put.
    free: u64,
    backplane: Arc<dyn Backplane>,
}

/// The bus can't take another device.
#[derive(Debug, thiserror::Error)]
#[error("{} PCI devices at most", DEVICES - 1)]
pub struct Full;

impl Root {
    /// A bus with the host bridge on it, whose BARs may be within `windows`; devices start out in
    /// the last of these.
    pub fn new(windows: [Range<u64>; 2], backplane: Arc<dyn Backplane>) -> Self {
        let free = windows[1].start;
        Root {
            functions: vec![Box::new(HostBridge::new())],
            windows,
            decoded: Vec::new(),
            free,
            backplane,
        }
    }

    /// Puts a device on the bus; `build` is told its place and what connects it to KVM.
    ///
    /// # Errors
    /// When the bus is full, or what `build` says.
    pub fn add<F: Function + 'static, E: From<Full>>(
        &mut self,
        build: impl FnOnce(Slot, Arc<dyn Backplane>) -> Result<F, E>,
    ) -> Result<Slot, E> {
        let index = self.functions.len();
        let slot = match u8::try_from(index) {
            Ok(number) if index < DEVICES => Slot(number),
            _ => return Err(Full.into()),
        };
        let function = build(slot, Arc::clone(&self.backplane))?;
        self.functions.push(Box::new(function));
        Ok(slot)
    }

    /// Where a BAR of `size` bytes starts out; each gets its own place.
    pub fn place(&mut self, size: u64) -> u64 {
        let at = self.free.next_multiple_of(size);
        self.free = at + size;
        at
    }

    /// The devices' places, without the host bridge's.
    pub fn slots(&self) -> impl Iterator<Item = Slot> + use<> {
        (1..self.functions.len() as u8).map(Slot)
    }

    /// The function at `slot`.
    pub fn function(&mut self, slot: Slot) -> &mut dyn Function {
        self.functions[usize::from(slot.0)].as_mut()
    }

    /// Takes what only one monitor may have at a time, for every device.
    ///
    /// # Errors
    /// The first device that can't have it.
    pub fn claim(&mut self) -> io::Result<()> {
        self.functions.iter_mut().try_for_each(|f| f.claim())
    }

    /// Gives that up: the guest is about to be the destination's.
    pub fn release(&mut self) {
        self.functions.iter_mut().for_each(|f| f.release());
    }

    /// Every device as it was at power-on.
    pub fn reset(&mut self) {
        for function in &mut self.functions {
            function.reset();
        }
        self.decode();
    }

    /// The host bridge's state is loaded, and all functions' are: makes KVM's side of them.
    pub(super) fn connect(&mut self) -> Result<(), StateError> {
        self.decode();
        Ok(self.backplane.commit()?)
    }

    pub(super) fn bridge(&mut self) -> &mut dyn Function {
        self.functions[0].as_mut()
    }

    fn read_config(&mut self, offset: u64, data: &mut [u8]) {
        match self.at(offset) {
            Some((function, register)) => function.read_config(register, data),
            None => data.fill(0xff),
        }
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        if let Some((function, register)) = self.at(offset) {
            function.write_config(register, data);
            self.decode();
        }
    }

    fn at(&mut self, offset: u64) -> Option<(&mut dyn Function, u16)> {
        let function = offset >> FUNCTION_SHIFT & 7;
        let device = offset >> DEVICE_SHIFT & 31;
        if offset >> BUS_SHIFT != 0 || function != 0 {
            return None;
        }
        let register = (offset & 0xfff) as u16;
        let function = self.functions.get_mut(device as usize)?;
        Some((function.as_mut(), register))
    }

    fn read(&mut self, address: u64, data: &mut [u8]) {
        match self.find(address, data.len()) {
            Some(Decoded {
                slot,
                bar,
                address: base,
                ..
            }) => {
                self.functions[slot].read_bar(bar, address - base, data);
            }
            None => data.fill(0xff),
        }
    }

    fn write(&mut self, address: u64, data: &[u8]) {
        if let Some(Decoded {
            slot,
            bar,
            address: base,
            ..
        }) = self.find(address, data.len())
        {
            self.functions[slot].write_bar(bar, address - base, data);
        }
    }

    fn find(&self, address: u64, len: usize) -> Option<Decoded> {
        let end = address.checked_add(len as u64)?;
        let holds = |d: &&Decoded| d.address <= address && end <= d.address + d.size;
        self.decoded.iter().find(holds).copied()
    }

    /// Finds out what decodes now, and moves the doorbells there. A BAR outside the windows, over
    /// RAM for instance, decodes nothing; of BARs that lie over each other only the first does.
    fn decode(&mut self) {
        let mut now: Vec<Decoded> = Vec::new();
        for (slot, function) in self.functions.iter().enumerate() {
            for (bar, address, size) in function.config().decoded() {
                let end = address.saturating_add(size);
                let inside = |w: &Range<u64>| w.start <= address && end <= w.end;
                let free = |d: &Decoded| end <= d.address || d.address + d.size <= address;
                if self.windows.iter().any(inside) && now.iter().all(free) {
                    now.push(Decoded {
                        address,
                        size,
                        slot,
                        bar,
                    });
                }
            }
        }
        if now == self.decoded {
            return;
        }
        let before = std::mem::replace(&mut self.decoded, now);
        for gone in before.iter().filter(|d| !self.decoded.contains(d)) {
            for (offset, bell) in self.functions[gone.slot].doorbells(gone.bar) {
                self.backplane.detach(gone.address + offset, bell);
            }
        }
        for new in self.decoded.iter().filter(|d| !before.contains(d)) {
            for (offset, bell) in self.functions[new.slot].doorbells(new.bar) {
                if let Err(error) = self.backplane.attach(new.address + offset, bell) {
                    // Stores to it exit then, and reach the device all the same.
                    tracing::warn!("{error}: {}", error.source);
                }
            }
        }
    }
}

/// Takes the bus's lock.
pub(super) fn lock(root: &SharedRoot) -> MutexGuard<'_, Root> {
    root.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Configuration space as the guest reaches it: one ECAM window.
pub struct Ecam(pub SharedRoot);

impl BusDevice for Ecam {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        lock(&self.0).read_config(offset, data);
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        lock(&self.0).write_config(offset, data);
    }
}

/// A window of BARs, which starts at this guest-physical address.
pub struct Window(pub SharedRoot, pub u64);

impl BusDevice for Window {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        lock(&self.0).read(self.1.saturating_add(offset), data);
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        lock(&self.0).write(self.1.saturating_add(offset), data);
    }
}

/// The bridge that the root bus hangs on, which is itself on it: QEMU's generic one.
struct HostBridge {
    config: Config,
}

const BRIDGE: Identity = Identity {
    vendor: 0x1b36,
    device: 0x0008,
    revision: 0,
    class: 0x06_00_00,
    subsystem_vendor: 0x1af4,
    subsystem: 0x1100,
};

const BRIDGE_VERSION: u32 = 1;

impl HostBridge {
    fn new() -> Self {
        HostBridge {
            config: Config::new(&BRIDGE),
        }
    }
}

impl Function for HostBridge {
    fn name(&self) -> &'static CStr {
        c"pci"
    }

    fn config(&self) -> &Config {
        &self.config
    }

    fn read_config(&mut self, offset: u16, data: &mut [u8]) {
        self.config.read(offset, data);
    }

    fn write_config(&mut self, offset: u16, data: &[u8]) {
        self.config.write(offset, data);
    }

    fn read_bar(&mut self, _: usize, _: u64, data: &mut [u8]) {
        data.fill(0xff);
    }

    fn write_bar(&mut self, _: usize, _: u64, _: &[u8]) {}

    fn doorbells(&self, _: usize) -> Vec<(u64, &vmm_sys_util::eventfd::EventFd)> {
        Vec::new()
    }

    fn reset(&mut self) {
        self.config.reset();
    }

    fn claim(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn release(&mut self) {}

    fn prepare(&mut self, _: bool, _: RunState) -> Result<(), CallbackError> {
        Ok(())
    }

    fn change(&mut self, _: bool, _: RunState) -> Result<(), CallbackError> {
        Ok(())
    }

    fn version(&self) -> u32 {
        BRIDGE_VERSION
    }

    fn save(&mut self) -> Result<Vec<u8>, StateError> {
        encode(&self.config.save())
    }

    fn load(&mut self, version: u32, state: &[u8]) -> Result<(), StateError> {
        let saved = decode(BRIDGE_VERSION, version, state)?;
        self.config.load(&saved)
    }
}
