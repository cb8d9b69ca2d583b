//! A driver for tests: it finds a device on a bus, sets its queues up in RAM, and talks to it. No
//! KVM: interrupts are counted, doorbells take the way of an exit.

use std::collections::BTreeMap;
use std::ffi::CString;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use vmm_sys_util::eventfd::EventFd;

use super::{Device, VirtioPci};
use crate::devices::pci::{
    Backplane, BusState, Ecam, FunctionState, Msi, Root, SharedRoot, Slot, Window,
};
use crate::devices::{BusDevice, DeviceState};
use crate::kvm;
use crate::memory::GuestRam;
use crate::runstate::RunState;

pub(crate) const WINDOW: u64 = 0x40_0000_0000;
const RAM: u64 = 0x20_0000;
const LIMIT: Duration = Duration::from_secs(20);

/// Offsets in the BAR, as the transport documents them.
const NOTIFY: u64 = 0x3000;
const TABLE: u64 = 0x4000;

/// Where each queue's rings are.
const RINGS: u64 = 0x1000;
const RINGS_STRIDE: u64 = 0x4000;

/// Remembers what KVM would have been told.
#[derive(Default)]
pub(crate) struct Recorder {
    irqfds: Mutex<Vec<EventFd>>,
    pub(crate) routes: Mutex<BTreeMap<u32, Msi>>,
    pub(crate) bells: Mutex<Vec<u64>>,
}

impl Backplane for Recorder {
    fn connect(&self, irqfd: &EventFd) -> Result<u32, kvm::Error> {
        let mut irqfds = self.irqfds.lock().unwrap();
        irqfds.push(irqfd.try_clone().unwrap());
        Ok(irqfds.len() as u32 - 1)
    }

    fn route(&self, gsi: u32, msi: Msi) {
        self.routes.lock().unwrap().insert(gsi, msi);
    }

    fn commit(&self) -> Result<(), kvm::Error> {
        Ok(())
    }

    fn attach(&self, address: u64, _: &EventFd) -> Result<(), kvm::Error> {
        self.bells.lock().unwrap().push(address);
        Ok(())
    }

    fn detach(&self, address: u64, _: &EventFd) {
        self.bells.lock().unwrap().retain(|&bell| bell != address);
    }
}

/// A machine with one device, and its driver.
pub(crate) struct Driver {
    pub(crate) root: SharedRoot,
    pub(crate) ram: GuestRam,
    pub(crate) recorder: Arc<Recorder>,
    pub(crate) slot: Slot,
    bar: u64,
    avail: Vec<u16>,
    seen: Vec<u16>,
    next_desc: Vec<u16>,
    size: u16,
}

impl Driver {
    /// Puts `device` on a bus of its own; nothing is set up yet.
    pub(crate) fn new(device: Box<dyn Device>) -> Self {
        let recorder = Arc::new(Recorder::default());
        let windows = [0x1000_0000..0x2000_0000, WINDOW..WINDOW + 0x1000_0000];
        let mut root = Root::new(windows, Arc::clone(&recorder) as Arc<dyn Backplane>);
        let ram = GuestRam::new(&[(0, RAM)]).unwrap();
        let name = CString::new("device/0").unwrap();
        let slot = VirtioPci::add(&mut root, name, device, ram.clone()).unwrap();
        Driver {
            root: Arc::new(Mutex::new(root)),
            ram,
            recorder,
            slot,
            bar: WINDOW,
            avail: Vec::new(),
            seen: Vec::new(),
            next_desc: Vec::new(),
            size: 16,
        }
    }

    /// Switches the function on, negotiates `features` besides `VERSION_1`, sets up `queues` queues
    /// and starts the device.
    pub(crate) fn start(device: Box<dyn Device>, features: u64, queues: u16) -> Self {
        let mut this = Driver::new(device);
        this.switch_on(queues + 1);
        this.negotiate(features);
        for queue in 0..queues {
            this.enable(queue);
        }
        this.set_status(15);
        this
    }

    /// Memory decoding, bus mastering, MSI-X with all vectors unmasked.
    pub(crate) fn switch_on(&mut self, vectors: u16) {
        self.config_write(4, &[6, 0]);
        let msix = self.capability(0x11).unwrap();
        for vector in 0..u64::from(vectors) {
            let mut entry = [0; 16];
            entry[..4].copy_from_slice(&0xfee0_0000_u32.to_le_bytes());
            entry[8] = vector as u8;
            self.write(TABLE + 16 * vector, &entry);
        }
        self.config_write(msix + 2, &[0, 0x80]);
    }

    pub(crate) fn negotiate(&mut self, features: u64) {
        self.set_status(3);
        let features = features | 1 << 32;
        for half in 0..2u32 {
            self.write(0x08, &half.to_le_bytes());
            let bits = (features >> (32 * half)) as u32;
            self.write(0x0c, &bits.to_le_bytes());
        }
        self.write(0x10, &0u16.to_le_bytes());
        self.set_status(11);
    }

    pub(crate) fn enable(&mut self, queue: u16) {
        let at = RINGS + RINGS_STRIDE * u64::from(queue);
        let size = self.size;
        self.enable_at(queue, size, [at, at + 0x1000, at + 0x2000]);
    }

    /// Enables a queue with rings anywhere.
    pub(crate) fn enable_at(&mut self, queue: u16, size: u16, rings: [u64; 3]) {
        self.write(0x16, &queue.to_le_bytes());
        self.write(0x18, &size.to_le_bytes());
        self.write(0x1a, &(queue + 1).to_le_bytes());
        for (offset, ring) in (0x20..).step_by(8).zip(rings) {
            self.write(offset, &ring.to_le_bytes());
        }
        self.write(0x1c, &1u16.to_le_bytes());
        let count = usize::from(queue) + 1;
        for list in [&mut self.avail, &mut self.seen, &mut self.next_desc] {
            list.resize(count.max(list.len()), 0);
            list[usize::from(queue)] = 0;
        }
    }

    pub(crate) fn set_status(&self, status: u8) {
        self.write(0x14, &[status]);
    }

    pub(crate) fn status(&self) -> u8 {
        let mut status = [0];
        self.read(0x14, &mut status);
        status[0]
    }

    /// Makes a chain of these buffers (address, length, whether the device writes it) available, and
    /// kicks. Returns its head.
    pub(crate) fn offer(&mut self, queue: u16, buffers: &[(u64, u32, bool)]) -> u16 {
        let q = usize::from(queue);
        let at = RINGS + RINGS_STRIDE * u64::from(queue);
        let head = self.next_desc[q] % self.size;
        for (index, &(address, len, write)) in buffers.iter().enumerate() {
            let slot = (head + index as u16) % self.size;
            let last = index + 1 == buffers.len();
            let flags = u16::from(!last) | u16::from(write) << 1;
            let mut bytes = [0; 16];
            bytes[..8].copy_from_slice(&address.to_le_bytes());
            bytes[8..12].copy_from_slice(&len.to_le_bytes());
            bytes[12..14].copy_from_slice(&flags.to_le_bytes());
            bytes[14..].copy_from_slice(&((slot + 1) % self.size).to_le_bytes());
            self.ram.write(at + 16 * u64::from(slot), &bytes).unwrap();
        }
        self.next_desc[q] = (head + buffers.len() as u16) % self.size;
        self.publish(queue, head);
        head
    }

    /// Puts any head into the available ring, and kicks.
    pub(crate) fn publish(&mut self, queue: u16, head: u16) {
        let q = usize::from(queue);
        let avail = RINGS + RINGS_STRIDE * u64::from(queue) + 0x1000;
        let place = avail + 4 + 2 * u64::from(self.avail[q] % self.size);
        self.ram.write(place, &head.to_le_bytes()).unwrap();
        self.avail[q] = self.avail[q].wrapping_add(1);
        self.ram
            .write(avail + 2, &self.avail[q].to_le_bytes())
            .unwrap();
        self.kick(queue);
    }

    pub(crate) fn kick(&self, queue: u16) {
        self.write(NOTIFY + 4 * u64::from(queue), &queue.to_le_bytes());
    }

    /// The next chain that the device has used: its head, and the bytes written.
    pub(crate) fn used(&mut self, queue: u16) -> (u16, u32) {
        let q = usize::from(queue);
        let used = RINGS + RINGS_STRIDE * u64::from(queue) + 0x2000;
        until("the device to use a chain", || {
            let mut index = [0; 2];
            self.ram.read(used + 2, &mut index).unwrap();
            u16::from_le_bytes(index) != self.seen[q]
        });
        let mut element = [0; 8];
        let place = used + 4 + 8 * u64::from(self.seen[q] % self.size);
        self.ram.read(place, &mut element).unwrap();
        self.seen[q] = self.seen[q].wrapping_add(1);
        let [a, b, _, _, c, d, e, f] = element;
        (u16::from_le_bytes([a, b]), u32::from_le_bytes([c, d, e, f]))
    }

    /// Waits until vector `vector` was sent at least once since the last look.
    pub(crate) fn wait_interrupt(&self, vector: usize) {
        until("an interrupt", || self.interrupted(vector));
    }

    pub(crate) fn interrupted(&self, vector: usize) -> bool {
        self.recorder.irqfds.lock().unwrap()[vector].read().is_ok()
    }

    /// Waits until the device says that it needs a reset.
    pub(crate) fn wait_needs_reset(&self) {
        until("DEVICE_NEEDS_RESET", || self.status() & 0x40 != 0);
    }

    /// What a stop of the VM does to the device.
    pub(crate) fn stop_vm(&self) {
        self.change(false);
    }

    pub(crate) fn start_vm(&self) {
        self.change(true);
    }

    fn change(&self, running: bool) {
        let state = if running {
            RunState::Running
        } else {
            RunState::Paused
        };
        let mut root = self.root.lock().unwrap_or_else(PoisonError::into_inner);
        let function = root.function(self.slot);
        function.prepare(running, state).unwrap();
        function.change(running, state).unwrap();
    }

    /// Moves the guest to a machine with `device`: RAM, the function, the bus.
    pub(crate) fn migrate_to(mut self, device: Box<dyn Device>) -> Self {
        self.stop_vm();
        let function = |root: &SharedRoot, slot| FunctionState::new(root, slot);
        let state = function(&self.root, self.slot).save().unwrap();
        let bus = BusState(Arc::clone(&self.root)).save().unwrap();
        self.root.lock().unwrap().release();
        let mut there = Driver::new(device);
        let mut all = vec![0; RAM as usize];
        self.ram.read(0, &mut all).unwrap();
        there.ram.write(0, &all).unwrap();
        function(&there.root, there.slot).load(1, &state).unwrap();
        BusState(Arc::clone(&there.root)).load(1, &bus).unwrap();
        there.bar = self.bar;
        there.avail = std::mem::take(&mut self.avail);
        there.seen = std::mem::take(&mut self.seen);
        there.next_desc = std::mem::take(&mut self.next_desc);
        there.start_vm();
        there
    }

    pub(crate) fn capability(&self, id: u8) -> Option<u64> {
        let mut byte = [0];
        self.config_read(0x34, &mut byte);
        while byte[0] != 0 {
            let at = u64::from(byte[0]);
            let mut header = [0; 2];
            self.config_read(at, &mut header);
            if header[0] == id {
                return Some(at);
            }
            byte[0] = header[1];
        }
        None
    }

    pub(crate) fn config_read(&self, offset: u64, data: &mut [u8]) {
        Ecam(Arc::clone(&self.root)).read(1 << 15 | offset, data);
    }

    pub(crate) fn config_write(&self, offset: u64, data: &[u8]) {
        Ecam(Arc::clone(&self.root)).write(1 << 15 | offset, data);
    }

    pub(crate) fn read(&self, offset: u64, data: &mut [u8]) {
        Window(Arc::clone(&self.root), self.bar).read(offset, data);
    }

    pub(crate) fn write(&self, offset: u64, data: &[u8]) {
        Window(Arc::clone(&self.root), self.bar).write(offset, data);
    }

    /// Where the driver believes the BAR to be.
    pub(crate) fn set_bar(&mut self, address: u64) {
        self.bar = address;
    }
}

pub(crate) fn until(what: &str, done: impl Fn() -> bool) {
    let deadline = Instant::now() + LIMIT;
    while !done() {
        assert!(Instant::now() < deadline, "waited for {what}");
        thread::sleep(Duration::from_micros(200));
    }
}
