//! Measures what recording costs on this machine: this process records itself.

use std::hint::black_box;
use std::path::Path;
use std::time::Instant;

use anyhow::Context;
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};
use rustix::process::getppid;
use serde::Serialize;

use super::site;
use crate::capture::sites::Pattern;
use crate::capture::{Backend, Options, Recorder};

/// Batches of each kind; the median is taken.
const BATCHES: usize = 15;

/// Events in one batch: together they fit into the ring buffer.
const EVENTS: u32 = 4000;

/// What one thing takes with and without a recorder.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Cost {
    /// What is done.
    pub what: &'static str,
    /// Without a recorder, ns.
    pub without_ns: f64,
    /// While it is recorded, ns.
    pub with_ns: f64,
}

/// What recording costs here.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Calibration {
    /// What the recorded process pays for each event, and others for being on the same host.
    pub costs: Vec<Cost>,
    /// CPU time of the recorder for each event that it writes down, ns.
    pub recorder_ns: f64,
    /// Time from the call to everything being attached, ms.
    pub attach_ms: f64,
}

/// Measures it; takes about a second.
///
/// # Errors
/// Those of [`Recorder`].
pub fn calibrate(object: &[u8], backend: Backend) -> anyhow::Result<Calibration> {
    let guest = Guest::new();
    let kinds = kinds(guest.as_ref().ok());
    let before: Vec<_> = kinds
        .iter()
        .map(|(_, run)| median(run.as_ref(), &mut || Ok(())))
        .collect::<Result<_, _>>()?;
    let folder = tempfile::tempdir().context("cannot make a temporary folder")?;
    let start = Instant::now();
    let mut recorder = record_self(object, backend, folder.path())?;
    let attach_ms = start.elapsed().as_secs_f64() * 1e3;
    let (mut events, mut cpu_ns) = (0, 0);
    let mut costs = Vec::new();
    for ((what, run), without_ns) in kinds.iter().zip(before) {
        let with_ns = median(run.as_ref(), &mut || {
            let before = recorder.totals();
            recorder.turn()?;
            let after = recorder.totals();
            events += after.events - before.events;
            cpu_ns += after.cpu_ns - before.cpu_ns;
            Ok(())
        })?;
        costs.push(Cost {
            what,
            without_ns,
            with_ns,
        });
    }
    recorder.finish()?;
    Ok(Calibration {
        costs,
        recorder_ns: cpu_ns as f64 / (events.max(1)) as f64,
        attach_ms,
    })
}

fn record_self(object: &[u8], backend: Backend, folder: &Path) -> anyhow::Result<Recorder> {
    let options = Options {
        gap_ns: 1_000_000_000,
        all: false,
        buffer: 4 << 20,
        backend,
    };
    let (provider, name) = site::PROBE;
    let wanted: Pattern = format!("{provider}:{name}").parse()?;
    let mut recorder = Recorder::start(object, options, vec![wanted], &folder.join("recording"))?;
    recorder.add(std::process::id())?;
    Ok(recorder)
}

type Run<'a> = Box<dyn Fn() + 'a>;

/// What is measured; without KVM, less.
fn kinds(guest: Option<&Guest>) -> Vec<(&'static str, Run<'_>)> {
    let mut kinds: Vec<(_, Run<'_>)> = vec![
        (
            "a USDT probe",
            Box::new(|| site::hit(black_box(1), black_box(2))),
        ),
        (
            "a system call that is not recorded, of any process",
            Box::new(|| {
                black_box(getppid());
            }),
        ),
    ];
    if let Some(guest) = guest {
        kinds.push((
            "an ioctl of KVM",
            Box::new(|| {
                black_box(guest.kvm.check_extension_int(Cap::Irqchip));
            }),
        ));
        kinds.push((
            "KVM_RUN, counted and not written down",
            Box::new(|| guest.run()),
        ));
    }
    kinds
}

/// The median over all batches of what one run takes, ns. `after` follows each batch.
fn median(run: &dyn Fn(), after: &mut dyn FnMut() -> anyhow::Result<()>) -> anyhow::Result<f64> {
    let mut batches = Vec::with_capacity(BATCHES);
    for _ in 0..BATCHES {
        let start = Instant::now();
        for _ in 0..EVENTS {
            run();
        }
        batches.push(start.elapsed().as_secs_f64() * 1e9 / f64::from(EVENTS));
        after()?;
    }
    batches.sort_by(f64::total_cmp);
    Ok(batches.get(BATCHES / 2).copied().unwrap_or(f64::NAN))
}

/// A VM whose vCPU has nothing to run.
struct Guest {
    kvm: Kvm,
    _vm: VmFd,
    vcpu: std::cell::RefCell<VcpuFd>,
}

impl Guest {
    fn new() -> Result<Self, kvm_ioctls::Error> {
        let kvm = Kvm::new()?;
        let vm = kvm.create_vm()?;
        let mut vcpu = vm.create_vcpu(0)?;
        vcpu.set_kvm_immediate_exit(1);
        Ok(Self {
            kvm,
            _vm: vm,
            vcpu: vcpu.into(),
        })
    }

    /// Comes back at once, with an error: there is nothing to run, and on arm64 the vCPU was not even
    /// told what it is.
    fn run(&self) {
        let _ = black_box(self.vcpu.borrow_mut().run().is_err());
    }
}
