//! The whole protocol without KVM: two made-up VMs, a real connection, and whatever can break it.

mod faults;
mod lanes;
mod oneway;
mod outcomes;
mod shared;
mod tls;

use std::ffi::CString;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread;
use std::time::Duration;

use tempfile::TempDir;

use super::board::Board;
use super::channel::Patience;
use super::connect::{Listener, Plaintext, Target};
use super::descriptors::Descriptors;
use super::status::{MigrationStatus, QueryMigrate, Side, Span};
use super::stop::Stop;
use super::stream::header::Shape;
use super::stream::message::Rehearsal;
use super::tls::Security;
use super::uri::Uri;
use super::vm::{MigrationVm, SavedDevice, SourceVm, TargetVm};
use super::{Parameters, incoming, outgoing};
use crate::control;
use crate::costs::Costs;
use crate::devices::StateError;
use crate::memory::{self, GuestRam, PAGE_SIZE, PageRun};
use crate::runstate::{EventSender, RunState};
use crate::spanlog::monotonic_ns;

const PAGES: u64 = 8;
const DEVICES: [&str; 2] = ["cpu/0", "gic"];

/// A VM that is made up of RAM, a run state, and two devices.
#[derive(Clone)]
struct Fake {
    ram: GuestRam,
    shape: Shape,
    state: Arc<Mutex<State>>,
    faults: Faults,
}

#[derive(Debug)]
struct State {
    run: RunState,
    devices: Vec<Vec<u8>>,
    dirty_log: bool,
    /// How often the dirty log was read.
    reads: u64,
    /// By how much the guest is slowed down, and by how much it was at most, per cent.
    throttle: (u8, u8),
    costs: Costs,
}

/// What a test does in the middle of a migration.
type Hook = Arc<dyn Fn(&Fake) + Send + Sync>;

/// What goes wrong in a VM, or happens to it.
#[derive(Clone, Default)]
struct Faults {
    stop: bool,
    save: bool,
    load: bool,
    start: bool,
    /// Every device takes this long to save and to load.
    slow: Duration,
    /// The guest writes this many pages between two looks at the dirty log.
    busy: u64,
    /// A page that changes without being in the dirty log.
    lost_page: bool,
    /// Runs right after the stop.
    on_stop: Option<Hook>,
}

impl Fake {
    fn source() -> Fake {
        let fake = Fake::new(RunState::Running);
        for page in [0, 2, 3, 7] {
            fake.ram
                .write(page * PAGE_SIZE, &[page as u8 + 1; 64])
                .unwrap();
        }
        fake.lock().devices = vec![vec![1, 2, 3], vec![4; 300]];
        fake
    }

    fn target() -> Fake {
        Fake::new(RunState::Inmigrate)
    }

    fn new(run: RunState) -> Fake {
        Fake::of(run, PAGES)
    }

    fn of(run: RunState, pages: u64) -> Fake {
        let layout = vec![(0, pages * PAGE_SIZE)];
        let shape = Shape {
            arch: "test".into(),
            ram: layout.clone(),
            vcpus: 1,
            devices: DEVICES.map(|name| (name.to_owned(), 1)).into(),
        };
        let devices = vec![Vec::new(); DEVICES.len()];
        let state = State {
            run,
            devices,
            dirty_log: false,
            reads: 0,
            throttle: (0, 0),
            costs: Costs::default(),
        };
        Fake {
            ram: GuestRam::new(&layout).unwrap(),
            shape,
            state: Arc::new(Mutex::new(state)),
            faults: Faults::default(),
        }
    }

    fn with(mut self, change: impl FnOnce(&mut Faults)) -> Fake {
        change(&mut self.faults);
        self
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    fn run_state(&self) -> RunState {
        self.lock().run
    }

    fn set_state(&self, state: RunState) -> Result<(), control::Error> {
        let mut guard = self.lock();
        guard.run = guard.run.change(state)?;
        Ok(())
    }

    fn continue_in(&self, state: RunState) -> Result<(), control::Error> {
        if self.faults.start {
            return Err(control::Error::Drain(errno(libc::ENODEV)));
        }
        self.set_state(state)
    }
}

fn errno(errno: i32) -> io::Error {
    io::Error::from_raw_os_error(errno)
}

impl MigrationVm for Fake {
    fn shape(&self) -> Shape {
        self.shape.clone()
    }

    fn ram(&self) -> GuestRam {
        self.ram.clone()
    }

    fn costs(&self) -> Costs {
        self.lock().costs.clone()
    }

    fn learn(&self, measured: &Costs) {
        self.lock().costs.learn(measured);
    }
}

impl SourceVm for Fake {
    fn is_running(&self) -> bool {
        self.run_state().is_running()
    }

    fn set_dirty_log(&self, on: bool) -> Result<(), memory::Error> {
        self.lock().dirty_log = on;
        Ok(())
    }

    fn protect(&self, _: &[PageRun]) -> Result<(), memory::Error> {
        Ok(())
    }

    fn dirty(&self) -> Result<Vec<PageRun>, memory::Error> {
        let mut state = self.lock();
        assert!(state.dirty_log, "the dirty log is off");
        state.reads += 1;
        if self.faults.lost_page {
            self.ram.write(0, &state.reads.to_le_bytes())?;
        }
        let mut runs = Vec::new();
        let busy = self.faults.busy * u64::from(100 - state.throttle.0) / 100;
        for page in 0..busy.max(1) {
            let gpa = (page + state.reads) % (self.ram.size() / PAGE_SIZE) * PAGE_SIZE;
            self.ram.write(gpa + 8, &state.reads.to_le_bytes())?;
            runs.push(PageRun { gpa, pages: 1 });
        }
        Ok(runs)
    }

    fn cpu_throttle_set(&self, percentage: u8) {
        let throttle = &mut self.lock().throttle;
        *throttle = (percentage, throttle.1.max(percentage));
    }

    fn migration_stop_vm(&self, stop: &mut Stop) -> Result<(), control::Error> {
        stop.downtime_start_ns = Some(monotonic_ns());
        stop.vm_old_state = Some(self.run_state());
        self.set_state(RunState::FinishMigrate)?;
        if let Some(on_stop) = &self.faults.on_stop {
            on_stop(self);
        }
        let failed = control::Error::Drain(errno(libc::EFAULT));
        if self.faults.stop {
            Err(failed)
        } else {
            Ok(())
        }
    }

    fn save_device(&self, index: usize) -> Result<SavedDevice, StateError> {
        if self.faults.save {
            return Err(StateError::Invalid("the device is on fire".into()));
        }
        thread::sleep(self.faults.slow);
        let name = CString::new(DEVICES[index]).unwrap();
        Ok(SavedDevice {
            name,
            version: 1,
            state: self.lock().devices[index].clone(),
        })
    }

    fn commit(&self, send: &mut dyn FnMut()) -> Result<(), RunState> {
        match self.run_state() {
            RunState::FinishMigrate => {
                send();
                Ok(())
            }
            other => Err(other),
        }
    }

    fn resume(&self, old: RunState) -> Result<(), control::Error> {
        if self.run_state() == RunState::FinishMigrate {
            self.continue_in(old)
        } else {
            Ok(())
        }
    }

    fn postmigrate(&self, _: bool) {
        self.set_state(RunState::Postmigrate).unwrap();
    }
}

impl TargetVm for Fake {
    fn rehearse(&self) -> Vec<Rehearsal> {
        let rehearsal = Rehearsal {
            save_ns: 1000,
            load_ns: 2000,
        };
        vec![rehearsal; DEVICES.len()]
    }

    fn load_device(&self, index: usize, version: u32, state: &[u8]) -> Result<(), StateError> {
        if self.faults.load {
            return Err(StateError::Version {
                found: version,
                expected: 9,
            });
        }
        thread::sleep(self.faults.slow);
        self.lock().devices[index] = state.to_vec();
        Ok(())
    }

    fn go_on(&self, old: RunState) -> Result<Option<u64>, control::Error> {
        self.continue_in(old)?;
        Ok(old.is_running().then(monotonic_ns))
    }

    fn settle(&self) {}

    fn spoil(&self) {
        self.set_state(RunState::InternalError).unwrap();
    }
}

/// Both sides of one migration, and what `query-migrate` says on each.
struct Outcome {
    source: QueryMigrate,
    target: QueryMigrate,
}

/// A place for the sockets, and the boards of both sides.
struct Bench {
    folder: TempDir,
    source: Arc<Board>,
    target: Arc<Board>,
    source_security: Option<Security>,
    target_security: Option<Security>,
}

impl Bench {
    fn new() -> Bench {
        let board = || Arc::new(Board::new(EventSender::new(|_| {}), Arc::default()));
        Bench {
            folder: tempfile::tempdir().unwrap(),
            source: board(),
            target: board(),
            source_security: None,
            target_security: None,
        }
    }

    fn uri(&self, name: &str) -> Uri {
        Uri::Unix(self.folder.path().join(name))
    }

    /// Migrates from one to the other over the connection that `through` makes of the
    /// destination's address.
    fn migrate(
        &self,
        source: &Fake,
        target: &Fake,
        parameters: Parameters,
        through: impl FnOnce(Uri) -> Uri,
    ) -> Outcome {
        let there = self.uri("there");
        assert!(
            self.target
                .begin(Side::Destination, there.to_string(), None)
        );
        let listener =
            Listener::bind(&there, &mut Descriptors::default(), Plaintext::Refused).unwrap();
        let listener = listener.secured(self.target_security.clone());
        let (vm, board, text) = (target.clone(), Arc::clone(&self.target), there.to_string());
        let patience = parameters.patience;
        let thread = thread::spawn(move || incoming::run(&vm, listener, &text, patience, &board));

        let uri = through(there);
        let total = source.ram.size();
        assert!(
            self.source
                .begin(Side::Source, uri.to_string(), Some(total))
        );
        let target_of_it = Target::new(uri, &mut Descriptors::default()).unwrap();
        let target_of_it = target_of_it.secured(self.source_security.clone());
        outgoing::run(source, target_of_it, &parameters, &self.source);
        thread.join().unwrap();
        Outcome {
            source: self.source.query(),
            target: self.target.query(),
        }
    }
}

/// Migrates with nothing in the way.
fn migrate(source: &Fake, target: &Fake) -> Outcome {
    Bench::new().migrate(source, target, Parameters::default(), |uri| uri)
}

/// What must hold whatever happened: the commit rule, seen from outside.
fn check(source: &Fake, target: &Fake, outcome: &Outcome) {
    let (here, there) = (source.run_state(), target.run_state());
    let what = format!(
        "{here:?} {:?} {:?}, {there:?} {:?} {:?}",
        outcome.source.status,
        outcome.source.error_desc,
        outcome.target.status,
        outcome.target.error_desc
    );
    assert!(!(here.is_running() && there.is_running()), "{what}");
    assert!(!source.lock().dirty_log, "{what}");
    assert!(
        outcome.source.blackout.is_some() && outcome.target.blackout.is_some(),
        "{what}"
    );
    match outcome.source.status {
        Some(MigrationStatus::Completed) => {
            assert_eq!(
                (here, there),
                (RunState::Postmigrate, RunState::Running),
                "{what}"
            );
            assert_eq!(source.lock().devices, target.lock().devices);
            assert_eq!(
                source.ram.checksum().unwrap(),
                target.ram.checksum().unwrap()
            );
        }
        Some(MigrationStatus::Failed | MigrationStatus::Cancelled) => {
            assert_eq!(here, RunState::Running, "{what}");
            assert!(!there.is_running(), "{what}");
        }
        Some(MigrationStatus::Unknown) => assert_eq!(here, RunState::Postmigrate, "{what}"),
        _ => panic!("not over: {what}"),
    }
}

fn spans(outcome: &QueryMigrate, side: Side) -> impl Iterator<Item = &Span> {
    let spans = outcome.blackout.iter().flat_map(|blackout| &blackout.spans);
    spans.filter(move |span| span.side == side)
}
