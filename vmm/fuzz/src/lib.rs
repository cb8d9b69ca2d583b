//! A machine without KVM: a PCI bus with one of each virtio device, for hostile guests.

use std::ffi::CString;
use std::fs::{self, File};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use vmm::devices::BusDevice;
use vmm::devices::pci::{Backplane, Ecam, Msi, Root, SharedRoot, Slot, Window};
use vmm::devices::virtio::blk::{self, Blk};
use vmm::devices::virtio::console::{self, Console};
use vmm::devices::virtio::rng::Rng;
use vmm::devices::virtio::vsock::{self, Vsock};
use vmm::devices::virtio::{Device, VirtioPci};
use vmm::kvm;
use vmm::memory::GuestRam;
use vmm::runstate::RunState;
use vmm_sys_util::eventfd::EventFd;

/// Bytes of guest RAM.
pub const RAM: u64 = 0x10_0000;

/// The windows of BARs.
pub const WINDOW_32: u64 = 0x1000_0000;
pub const WINDOW_64: u64 = 0x40_0000_0000;
const WINDOW_SIZE: u64 = 0x100_0000;

/// Bytes of a function's BAR.
pub const BAR: u64 = 0x8000;

/// Nobody hears the interrupts, and every doorbell exits.
struct Deaf;

impl Backplane for Deaf {
    fn connect(&self, _: &EventFd) -> Result<u32, kvm::Error> {
        Ok(0)
    }
    fn route(&self, _: u32, _: Msi) {}
    fn commit(&self) -> Result<(), kvm::Error> {
        Ok(())
    }
    fn attach(&self, _: u64, _: &EventFd) -> Result<(), kvm::Error> {
        Ok(())
    }
    fn detach(&self, _: u64, _: &EventFd) {}
}

/// The machine.
pub struct Machine {
    pub root: SharedRoot,
    pub ram: GuestRam,
    ecam: Ecam,
    windows: [Window; 2],
    folder: PathBuf,
}

impl Default for Machine {
    fn default() -> Self {
        let windows = [WINDOW_32, WINDOW_64].map(|base| base..base + WINDOW_SIZE);
        let mut root = Root::new(windows, Arc::new(Deaf));
        let ram = GuestRam::new(&[(0, RAM)]).expect("RAM");
        let folder = std::env::temp_dir().join(format!("blackout-fuzz-{}", std::process::id()));
        for (number, device) in devices(&folder).into_iter().enumerate() {
            let name = CString::new(format!("device/{number}")).expect("a name");
            VirtioPci::add(&mut root, name, device, ram.clone()).expect("a device");
        }
        let root = Arc::new(Mutex::new(root));
        Machine {
            ecam: Ecam(Arc::clone(&root)),
            windows: [WINDOW_32, WINDOW_64].map(|base| Window(Arc::clone(&root), base)),
            root,
            ram,
            folder,
        }
    }
}

fn devices(folder: &PathBuf) -> Vec<Box<dyn Device>> {
    fs::create_dir_all(folder).expect("a folder");
    let image = folder.join("disk");
    File::create(&image)
        .and_then(|file| file.set_len(1 << 20))
        .expect("an image");
    let disk = blk::Options {
        path: image,
        readonly: false,
        id: "fuzz".to_owned(),
    };
    let sockets = vsock::Options {
        cid: 3,
        path: folder.join("vsock"),
    };
    vec![
        Box::new(Blk::open(&disk).expect("a disk")),
        Box::new(Rng),
        Box::new(Console::open(&console::Options::Null).expect("a console")),
        Box::new(Vsock::new(&sockets).expect("a vsock")),
    ]
}

impl Machine {
    /// A store to configuration space.
    pub fn write_config(&mut self, offset: u64, data: &[u8]) {
        self.ecam.write(offset, data);
    }

    /// A load from configuration space.
    pub fn read_config(&mut self, offset: u64, data: &mut [u8]) {
        self.ecam.read(offset, data);
    }

    /// A store to one of the windows.
    pub fn write(&mut self, window: usize, offset: u64, data: &[u8]) {
        self.windows[window % 2].write(offset, data);
    }

    /// A load from one of the windows.
    pub fn read(&mut self, window: usize, offset: u64, data: &mut [u8]) {
        self.windows[window % 2].read(offset, data);
    }

    /// The places of the devices.
    pub fn slots(&self) -> Vec<Slot> {
        self.root.lock().expect("no panic").slots().collect()
    }

    /// Stops every device, which waits for what its worker has, and starts it again.
    pub fn stop_and_start(&mut self) {
        for (running, state) in [(false, RunState::Paused), (true, RunState::Running)] {
            for slot in self.slots() {
                let mut root = self.root.lock().expect("no panic");
                let function = root.function(slot);
                function.prepare(running, state).expect("a stop or a start");
                function.change(running, state).expect("a stop or a start");
            }
        }
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.folder);
    }
}

/// Takes numbers off the fuzzer's bytes; zeroes when they are used up.
pub struct Input<'a>(pub &'a [u8]);

impl Input<'_> {
    /// The next `N` bytes.
    pub fn bytes<const N: usize>(&mut self) -> [u8; N] {
        let mut bytes = [0; N];
        let len = self.0.len().min(N);
        let (front, rest) = self.0.split_at(len);
        bytes[..len].copy_from_slice(front);
        self.0 = rest;
        bytes
    }

    /// Whether there is nothing left.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The next byte.
    pub fn byte(&mut self) -> u8 {
        self.bytes::<1>()[0]
    }

    /// The next 16 bits.
    pub fn word(&mut self) -> u16 {
        u16::from_le_bytes(self.bytes())
    }
}
