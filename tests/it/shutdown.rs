//! A guest that switches itself off when it is about to be handed over.

use std::fs;
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use vmm::control::vm_start;
use vmm::machine::{Config, Machine, PciDevices, SharedMachine};
use vmm::migration::descriptors::Descriptors;
use vmm::migration::status::MigrationStatus;
use vmm::migration::{Migrations, Parameters};
use vmm::payload::Program;
use vmm::runstate::{EventSender, Request, RunState};

const LIMIT: Duration = Duration::from_secs(60);

/// A program whose first instructions end it: on arm64 PSCI's SYSTEM_OFF, on x86-64 a reset by the
/// keyboard controller.
const SWITCH_OFF: &[u8] = if cfg!(target_arch = "aarch64") {
    // movz w0, #8; movk w0, #0x8400, lsl #16; hvc #0; b .
    &[
        0x00, 0x01, 0x80, 0x52, 0x00, 0x80, 0xb0, 0x72, 0x02, 0x00, 0x00, 0xd4, 0x00, 0x00, 0x00,
        0x14,
    ]
} else {
    // mov al, 0xfe; out 0x64, al; hlt; jmp to the hlt
    &[0xb0, 0xfe, 0xe6, 0x64, 0xf4, 0xeb, 0xfd]
};

/// The main loop is what would end the process; here it has not come to it yet.
#[test]
fn a_guest_that_is_switched_off_is_not_handed_over() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let program = folder.path().join("off.bin");
    fs::write(&program, SWITCH_OFF)?;
    let uri = format!("unix:{}", folder.path().join("migration").display());

    let (sender, requests) = mpsc::channel();
    let source = machine(Some(program), &sender)?;
    vm_start(&mut source.lock().unwrap())?;
    let asked = requests.recv_timeout(LIMIT).context("the guest's wish")?;
    ensure!(matches!(asked, Request::Shutdown | Request::Reset));
    let target = machine(None, &sender)?;
    target.lock().unwrap().set_state(RunState::Inmigrate)?;

    let migrations = |machine: &SharedMachine| {
        let parameters = Parameters::default();
        Migrations::new(Arc::clone(machine), parameters, EventSender::new(drop))
    };
    let (there, here) = (migrations(&target), migrations(&source));
    there.incoming(&uri, &mut Descriptors::default())?;
    here.start(&uri, &mut Descriptors::default())?;
    let until = Instant::now() + LIMIT;
    let answer = loop {
        let answer = here.query();
        if answer.status.is_some_and(MigrationStatus::is_final) {
            break answer;
        }
        ensure!(Instant::now() < until, "{answer:?}");
        thread::sleep(Duration::from_millis(10));
    };
    ensure!(
        answer.status == Some(MigrationStatus::Failed),
        "{:?}",
        answer.status
    );
    let error = answer.error_desc.unwrap_or_default();
    ensure!(error.contains("switched off"), "{error}");
    drop((here, there));
    ensure!(source.lock().unwrap().run_state() == RunState::Running);
    ensure!(target.lock().unwrap().run_state() == RunState::Inmigrate);
    Ok(())
}

fn machine(program: Option<PathBuf>, requests: &mpsc::Sender<Request>) -> Result<SharedMachine> {
    let config = Config {
        ram_size: 8 << 20,
        vcpus: 1,
        dirty_ring_size: None,
        incoming: program.is_none(),
        program: program.map(Program::Payload),
        cmdline: String::new(),
        console: Box::new(io::sink()),
        pci: PciDevices::default(),
        guest_clock: vmm::arch::GUEST_CLOCK,
    };
    let machine = Machine::new(config, EventSender::new(drop), requests)?;
    Ok(Arc::new(Mutex::new(machine)))
}
