//! Arguments → [`Machine`] → QMP loop.

mod console;
mod logging;
mod signals;

use std::process::ExitCode;
use std::sync::mpsc::{self, Receiver};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::{Context, Result};
use vmm::args::{self, Args};
use vmm::check::Report;
use vmm::control::{system_reset, vm_start, vm_stop};
use vmm::machine::{Config, Machine, PciDevices, SharedMachine};
use vmm::migration::descriptors::Descriptors;
use vmm::migration::{Migrations, Parameters, Plaintext};
use vmm::qmp::{Hub, Monitor, Server};
use vmm::runstate::{Event, Request, RunState};

fn main() -> ExitCode {
    let args = args::parse();
    let done = if args.check {
        check()
    } else {
        run(args).map(|()| ExitCode::SUCCESS)
    };
    match done {
        Ok(code) => code,
        Err(error) => {
            eprintln!("blackout-vmm: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Says what guests can have here.
fn check() -> Result<ExitCode> {
    let report = Report::new().context("this host has no KVM for this user")?;
    println!("{report}");
    Ok(if report.runs_guests() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn run(args: Args) -> Result<()> {
    let _trace = logging::start(&args)?;
    let (sender, requests) = mpsc::channel();
    // Before any other thread is there: they inherit the blocked signals.
    signals::watch(sender.clone()).context("can't watch for signals")?;

    let hub = Hub::start().context("can't start the QMP hub")?;
    let (output, input) = console::open(&args.serial)?;
    let config = Config {
        ram_size: args.memory.0,
        vcpus: args.cpus,
        dirty_ring_size: args.dirty_ring_size,
        guest_clock: args.guest_clock.0,
        program: args.program(),
        incoming: args.incoming.is_some(),
        cmdline: args.cmdline,
        console: output,
        pci: PciDevices {
            disks: args.disks,
            nets: args.nets,
            consoles: args.consoles,
            vsock: args.vsock,
            rng: args.rng,
        },
    };
    let mut machine = Machine::new(config, hub.events(), &sender)?;
    machine.set_autostart(!args.paused);
    if args.incoming.is_some() {
        machine.set_state(RunState::Inmigrate)?;
    }
    let _console = input
        .feed(machine.serial().clone())
        .context("the console")?;

    let machine = Arc::new(Mutex::new(machine));
    let parameters = Parameters {
        verify_ram: args.verify_ram,
        plaintext: match args.allow_plaintext {
            true => Plaintext::Allowed,
            false => Plaintext::Refused,
        },
        ..Parameters::default()
    };
    let migrations = Migrations::new(Arc::clone(&machine), parameters, hub.events());
    for object in args.objects {
        let keyring = migrations.settings().keyring();
        keyring.add(object).context("--object")?;
    }
    // Before QMP answers: whoever gets an answer may rely on this side's being ready.
    if let Some(uri) = &args.incoming {
        migrations
            .incoming(uri, &mut Descriptors::default())
            .context("--incoming")?;
    }
    let monitor = Monitor {
        machine: Arc::clone(&machine),
        migrations,
        name: args.name,
        requests: sender,
    };
    let _server = match &args.qmp {
        Some(address) => Some(Server::start(address, Arc::new(monitor), hub)?),
        None => None,
    };
    if args.incoming.is_none() && !args.paused {
        vm_start(&mut lock(&machine))?;
    }
    main_loop(&machine, &requests, !args.no_reboot);
    Ok(())
}

/// Serves the machine until it is to end. A guest that resets boots again, if it is to (`reboot`) and
/// can.
fn main_loop(machine: &SharedMachine, requests: &Receiver<Request>, reboot: bool) {
    for request in requests {
        match request {
            Request::Shutdown => return end(machine, true, "guest-shutdown"),
            Request::Reset => {
                let reason = "guest-reset";
                if !reboot || !lock(machine).can_reset() {
                    return end(machine, true, reason);
                }
                if let Err(error) = system_reset(&mut lock(machine), true, reason) {
                    tracing::error!("{:#}", anyhow::Error::from(error));
                }
            }
            Request::Quit => return end(machine, false, "host-qmp-quit"),
            Request::Signal => return end(machine, false, "host-signal"),
            Request::InternalError(why) => {
                tracing::error!("{why}: the guest is stopped");
                if let Err(error) = vm_stop(&mut lock(machine), RunState::InternalError, true) {
                    tracing::error!("{:#}", anyhow::Error::from(error));
                }
            }
        }
    }
}

/// Says why the machine ends. The lock is what makes it wait for a switchover that is under way.
fn end(machine: &SharedMachine, guest: bool, reason: &'static str) {
    let machine = lock(machine);
    machine.emit(Event::Shutdown { guest, reason });
    if let Err(error) = machine.serial().flush() {
        tracing::warn!("the console's last output is lost: {error}");
    }
}

fn lock(machine: &SharedMachine) -> MutexGuard<'_, Machine> {
    machine.lock().unwrap_or_else(PoisonError::into_inner)
}
