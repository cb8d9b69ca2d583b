//! What a VM is: its memory, its vCPUs, its devices, and the list of those that must be told when
//! it starts and stops.

mod reset;

use std::ffi::CString;
use std::io;
use std::ops::Range;
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::arch::{self, Mapped};
use crate::costs::Costs;
use crate::devices::DeviceState;
use crate::devices::pci::{
    BusState, Ecam, FunctionHandler, FunctionState, KvmBackplane, Root, SharedRoot, Window,
};
use crate::devices::serial::Output;
use crate::devices::virtio::blk::{self, Blk};
use crate::devices::virtio::console::{self, Console};
use crate::devices::virtio::net::{self, Net};
use crate::devices::virtio::rng::Rng;
use crate::devices::virtio::vsock::{self, Vsock};
use crate::devices::virtio::{self, VirtioPci};
use crate::kvm::{self, Vcpu, Vm};
use crate::memory::{self, GuestRam};
use crate::payload::Program;
use crate::probes::{self, Errno};
use crate::runstate::{
    Event, EventSender, GuestRequests, IllegalTransition, NotifyList, Request, RunState,
};
use crate::vcpu::{Buses, Vcpus};
use reset::Boot;

pub use reset::Error as ResetError;

/// The machine behind its lock, QEMU's big lock: whoever starts, stops or saves it holds this.
pub type SharedMachine = Arc<Mutex<Machine>>;

/// What to build.
pub struct Config {
    /// Bytes of guest RAM.
    pub ram_size: u64,
    /// vCPUs.
    pub vcpus: u32,
    /// Entries of each vCPU's dirty ring, if it is to have one.
    pub dirty_ring_size: Option<u32>,
    /// What the guest's clock does while it comes from another host.
    pub guest_clock: arch::GuestClock,
    /// What to boot.
    pub program: Option<Program>,
    /// Whether a migration brings what runs first; the program then is for resets only.
    pub incoming: bool,
    /// The guest's command line.
    pub cmdline: String,
    /// Where the guest's console output goes.
    pub console: Output,
    /// What is on its PCI bus.
    pub pci: PciDevices,
}

/// The devices of a PCI bus, which takes them in this order.
#[derive(Clone, Debug, Default)]
pub struct PciDevices {
    /// Disks.
    pub disks: Vec<blk::Options>,
    /// Network cards.
    pub nets: Vec<net::Options>,
    /// Consoles.
    pub consoles: Vec<console::Options>,
    /// Sockets between guest and host.
    pub vsock: Option<vsock::Options>,
    /// Whether there is a source of randomness.
    pub rng: bool,
}

/// A VM could not be built.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// KVM refused.
    #[error(transparent)]
    Kvm(#[from] kvm::Error),
    /// Guest RAM.
    #[error("guest RAM")]
    Memory(#[from] memory::Error),
    /// Interrupt controller, boot state, or payload.
    #[error(transparent)]
    Arch(#[from] arch::Error),
    /// A disk.
    #[error(transparent)]
    Disk(#[from] blk::Error),
    /// A network card.
    #[error(transparent)]
    Net(#[from] net::Error),
    /// A console.
    #[error(transparent)]
    Console(#[from] console::Error),
    /// Sockets.
    #[error("the vsock")]
    Vsock(#[source] io::Error),
    /// A device's place on the bus, its interrupts or its thread.
    #[error(transparent)]
    Virtio(#[from] virtio::Error),
    /// The state at power-on can't be noted.
    #[error("the state at power-on")]
    PowerOn(#[from] ResetError),
    /// The vCPUs' threads.
    #[error("vCPU threads")]
    Threads(#[source] io::Error),
}

impl Errno for Error {
    fn errno(&self) -> i32 {
        match self {
            Error::Kvm(source) => source.errno(),
            Error::Memory(source) => source.errno(),
            Error::Arch(source) => source.errno(),
            Error::Disk(error) => error.source.errno(),
            Error::Net(error) => error.source.errno(),
            Error::Console(_) => libc::EINVAL,
            Error::Virtio(error) => error.errno(),
            Error::PowerOn(source) => source.errno(),
            Error::Threads(source) | Error::Vsock(source) => source.errno(),
        }
    }
}

/// A virtual machine. Fields are dropped in order: the vCPUs' threads end before what they use goes.
pub struct Machine {
    pub(crate) vcpus: Vcpus,
    pub(crate) handlers: NotifyList,
    pub(crate) board: arch::Board,
    pci: SharedRoot,
    devices: Vec<Box<dyn DeviceState>>,
    boot: Option<Boot>,
    irqchip: arch::Irqchip,
    state: RunState,
    autostart: bool,
    ram_given_away: bool,
    costs: Costs,
    events: EventSender,
    requests: GuestRequests,
    vm: Arc<Vm>,
    ram: GuestRam,
}

impl Machine {
    /// Builds a VM whose vCPUs are paused: [`RunState::Prelaunch`].
    ///
    /// `events` hears what happens to it; `requests` what its guest wants that only the main loop
    /// can do.
    pub fn new(
        config: Config,
        events: EventSender,
        requests: &Sender<Request>,
    ) -> Result<Self, Error> {
        let vm = Arc::new(Vm::new(config.dirty_ring_size)?);
        let ram = GuestRam::new(&arch::ram_layout(config.ram_size)?)?;
        ram.register(&vm)?;

        let mut irqchip = arch::Irqchip::create(&vm, config.vcpus, config.guest_clock)?;
        let vcpus = create_vcpus(&vm, config.vcpus)?;
        irqchip.init(&vcpus)?;
        let requests = GuestRequests::new(requests.clone());
        let board = arch::Board::new(&vm, config.console, &requests)?;
        let pci = pci(&vm, &ram, &config.pci)?;
        let buses = buses(&board, &pci);

        let mut handlers = NotifyList::default();
        for handler in irqchip.handlers(&vcpus) {
            handlers.register(handler);
        }
        let slots: Vec<_> = lock(&pci).slots().collect();
        for &slot in &slots {
            handlers.register(Box::new(FunctionHandler::new(&pci, slot)));
        }

        let mut devices = Vec::new();
        for vcpu in &vcpus {
            devices.push(arch::vcpu_state(&vm, Arc::clone(vcpu))?);
        }
        devices.extend(irqchip.devices());
        devices.extend(board.devices());
        let boot = match config.program {
            Some(program) => Boot::new(program, config.cmdline, &vcpus, &mut devices)?,
            None => None,
        };
        if let Some(boot) = boot.as_ref().filter(|_| !config.incoming) {
            boot.load(&ram)?;
        }
        for slot in slots {
            devices.push(Box::new(FunctionState::new(&pci, slot)));
        }
        // After the interrupt controller and every function: it connects the two.
        devices.push(Box::new(BusState(Arc::clone(&pci))));

        let vcpus = Vcpus::spawn(vcpus, &Arc::new(buses), &requests).map_err(Error::Threads)?;
        let state = RunState::Prelaunch;
        Ok(Machine {
            vcpus,
            handlers,
            board,
            pci,
            devices,
            boot,
            irqchip,
            state,
            autostart: true,
            ram_given_away: false,
            costs: Costs::default(),
            events,
            requests,
            vm,
            ram,
        })
    }

    /// What the VM is doing.
    pub fn run_state(&self) -> RunState {
        self.state
    }

    /// Changes the state alone; [`control`](crate::control) does what belongs to it.
    ///
    /// # Errors
    /// When there is no such transition; the state stays.
    pub fn set_state(&mut self, state: RunState) -> Result<(), IllegalTransition> {
        self.state = self.state.change(state)?;
        Ok(())
    }

    /// What the guest, or a vCPU that can't go on, asked the main loop for.
    pub(crate) fn guest_requests(&self) -> &GuestRequests {
        &self.requests
    }

    /// Whether the VM runs once an incoming migration is complete, or stays paused.
    pub fn autostart(&self) -> bool {
        self.autostart
    }

    /// Decides that; QMP's `stop` and `cont` do while the migration is awaited.
    pub fn set_autostart(&mut self, on: bool) {
        self.autostart = on;
    }

    /// Whether guest RAM is another process's for good.
    pub(crate) fn has_given_ram_away(&self) -> bool {
        self.ram_given_away
    }

    /// Guest RAM is another process's from now on: nothing runs here any more.
    pub(crate) fn give_ram_away(&mut self) {
        self.ram_given_away = true;
    }

    /// What stops of this guest have cost so far, here and where it came from.
    pub(crate) fn costs(&self) -> &Costs {
        &self.costs
    }

    /// Takes in what one more stop has cost.
    pub(crate) fn learn(&mut self, measured: &Costs) {
        self.costs.learn(measured);
    }

    /// Guest RAM.
    pub fn ram(&self) -> &GuestRam {
        &self.ram
    }

    /// The VM, for the dirty log.
    pub fn vm(&self) -> &Vm {
        &self.vm
    }

    /// The vCPUs.
    pub fn vcpus(&self) -> &Vcpus {
        &self.vcpus
    }

    /// Everything whose state goes with the guest, in the order in which it is saved and loaded.
    pub fn devices_mut(&mut self) -> &mut [Box<dyn DeviceState>] {
        &mut self.devices
    }

    /// The interrupt controller.
    pub fn irqchip(&self) -> &arch::Irqchip {
        &self.irqchip
    }

    /// Counts what the ITS maps, if there is one and its tables are in RAM, and says it in the probe
    /// `its_mapped`. That takes a while: the guest should run, or be gone.
    pub fn count_mapped(&self) {
        if let Some(Mapped { devices, events }) = self.irqchip.mapped(&self.ram) {
            probes::its_mapped(0, devices, events);
        }
    }

    /// The console, for input.
    pub fn serial(&self) -> &arch::Uart {
        self.board.serial()
    }

    /// Takes what only one monitor may have at a time: the locks of its disks' images.
    ///
    /// # Errors
    /// When another one has one.
    pub fn claim(&self) -> io::Result<()> {
        lock(&self.pci).claim()
    }

    /// Gives that up, because the guest is about to be a migration's destination's.
    pub fn release(&self) {
        lock(&self.pci).release();
    }

    /// Presses the power button: what the guest makes of it is its business.
    ///
    /// # Errors
    /// When the host can't; nothing was pressed then.
    pub fn system_powerdown(&self) -> io::Result<()> {
        self.board.press_power_button()?;
        self.emit(Event::Powerdown);
        Ok(())
    }

    /// Tells whoever watches.
    pub fn emit(&self, event: Event) {
        self.events.send(event);
    }

    /// The same without haste; see [`EventSender::hold`].
    pub(crate) fn hold(&self, event: Event) {
        self.events.hold(event);
    }
}

fn create_vcpus(vm: &Vm, count: u32) -> Result<Vec<Arc<Mutex<Vcpu>>>, Error> {
    let create = |index| {
        let mut vcpu = vm.create_vcpu(u64::from(index))?;
        arch::init_vcpu(vm, &mut vcpu, count)?;
        Ok(Arc::new(Mutex::new(vcpu)))
    };
    (0..count).map(create).collect()
}

/// The PCI bus with everything on it, in the order of the places.
fn pci(vm: &Arc<Vm>, ram: &GuestRam, devices: &PciDevices) -> Result<SharedRoot, Error> {
    let windows = [arch::PCI.mmio32, arch::PCI.mmio64];
    let backplane = Arc::new(KvmBackplane::new(Arc::clone(vm)));
    let mut root = Root::new(windows, backplane);
    let mut add = |kind: &str, number: usize, device: Box<dyn virtio::Device>| {
        let name = CString::new(format!("{kind}/{number}")).unwrap_or_default();
        VirtioPci::add(&mut root, name, device, ram.clone())
    };
    for (number, disk) in devices.disks.iter().enumerate() {
        add("virtio-blk", number, Box::new(Blk::open(disk)?))?;
    }
    for (number, net) in devices.nets.iter().enumerate() {
        add("virtio-net", number, Box::new(Net::open(net)?))?;
    }
    for (number, console) in devices.consoles.iter().enumerate() {
        add("virtio-console", number, Box::new(Console::open(console)?))?;
    }
    if let Some(vsock) = &devices.vsock {
        let device = Vsock::new(vsock).map_err(Error::Vsock)?;
        add("virtio-vsock", 0, Box::new(device))?;
    }
    if devices.rng {
        add("virtio-rng", 0, Box::new(Rng))?;
    }
    Ok(Arc::new(Mutex::new(root)))
}

fn lock(root: &SharedRoot) -> MutexGuard<'_, Root> {
    root.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Everything that an exit can reach.
fn buses(board: &arch::Board, pci: &SharedRoot) -> Buses {
    let mut buses = Buses::default();
    for found in board.on_bus() {
        let bus = if found.pio {
            &mut buses.pio
        } else {
            &mut buses.mmio
        };
        bus.insert(found.base, found.size, found.device);
    }
    let mut insert = |range: Range<u64>, device| {
        buses
            .mmio
            .insert(range.start, range.end - range.start, device);
    };
    insert(arch::PCI.ecam, Arc::new(Mutex::new(Ecam(Arc::clone(pci)))));
    for window in [arch::PCI.mmio32, arch::PCI.mmio64] {
        let bars = Window(Arc::clone(pci), window.start);
        insert(window, Arc::new(Mutex::new(bars)));
    }
    buses
}
