//! `blackout watch`.

use std::fs;
use std::net::{SocketAddr, TcpListener};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::Context;
use signal_hook::consts::{SIGINT, SIGTERM};

use super::Outcome;
use crate::capture::sites::Pattern;
use crate::capture::{Backend, Options, Recorder, object};
use crate::watch::keep::Folder;
use crate::watch::metrics::Metrics;
use crate::watch::traces::Traces;
use crate::watch::{Watcher, http, migrations};

/// Watch every VM of this host as a service, keep its last migrations, and hand out figures
///
/// Every process that has a VM is recorded, as by `record --all`; what has no migration in it is thrown
/// away. The recordings that stay are read by `report` and the others. http://ADDRESS/metrics is
/// OpenMetrics: histograms of downtime, blackout, table saves and handlers, which outlive the processes
/// that migrated. Ends on SIGINT or SIGTERM.
///
/// It keeps the rights that attaching takes (CAP_BPF, CAP_PERFMON, CAP_SYS_PTRACE, CAP_DAC_READ_SEARCH),
/// as VMs come and go, and gives up all others.
#[derive(Debug, clap::Args)]
#[command(after_help = super::EXIT_CODES)]
pub(super) struct Args {
    /// Where recordings are kept
    #[arg(long, default_value = "/var/lib/blackout", value_name = "FOLDER")]
    folder: PathBuf,

    /// Keep at most so many recordings, the last ones
    #[arg(long, default_value_t = 100, value_name = "COUNT")]
    keep: usize,

    /// Keep at most so much of them; the last one stays in any case
    #[arg(long, default_value_t = 256, value_name = "MIB")]
    size: u64,

    /// Where to hand out the metrics; anybody who reaches it can read them
    #[arg(long, default_value = "127.0.0.1:9744", value_name = "ADDRESS")]
    listen: SocketAddr,

    /// Send each migration as a trace to this collector of OpenTelemetry's, by OTLP over HTTP, such as
    /// http://127.0.0.1:4318. There is no TLS: give one of this host, which can pass it on
    #[arg(long, value_name = "URL")]
    otlp: Option<String>,

    /// Create this file, with the address, as soon as everything is attached
    #[arg(long, value_name = "FILE")]
    ready: Option<PathBuf>,

    /// An eBPF object file to use in place of the one that was built in
    #[arg(long, value_name = "FILE")]
    bpf_object: Option<PathBuf>,
}

/// Room for events that were not yet written.
const BUFFER: u32 = 4 << 20;

/// A vCPU that is out of KVM_RUN for longer than this is reported, ns.
const GAP_NS: u64 = 200_000;

pub(super) fn run(args: &Args) -> anyhow::Result<Outcome> {
    let object = object(args.bpf_object.as_deref())?;
    let stop = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM] {
        signal_hook::flag::register(signal, Arc::clone(&stop)).context("cannot catch signals")?;
    }
    let (folder, left) = Folder::open(&args.folder, args.keep, args.size << 20)?;
    let metrics = Metrics::default();
    for segment in left {
        // Cut before its first frame, or damaged: nothing to be kept.
        let count = migrations(&segment, &mut Metrics::default(), None).unwrap_or(0);
        folder.keep(segment, count)?;
    }
    let options = Options {
        gap_ns: GAP_NS,
        all: true,
        buffer: BUFFER,
        backend: Backend::default(),
    };
    let mut recorder = Recorder::start(&object, options, Pattern::understood(), folder.segment())?;
    for pid in crate::capture::with_vm() {
        // One that has ended meanwhile, or that nobody may look into, is no reason to watch none.
        if let Err(error) = recorder.add(pid) {
            eprintln!("blackout: process {pid}: {error}");
        }
    }
    let listener = TcpListener::bind(args.listen)
        .with_context(|| format!("cannot listen at {}", args.listen))?;
    // The thread that answers has no more rights than this one.
    recorder.give_up_rights(false)?;
    let address = http::serve(listener, metrics.clone())?;
    let traces = args.otlp.as_deref();
    let traces = traces.map(|url| Traces::start(url, &metrics)).transpose()?;
    eprintln!(
        "blackout: watching; http://{address}/metrics, recordings in {}",
        args.folder.display()
    );
    if let Some(ready) = &args.ready {
        fs::write(ready, format!("{address}\n"))
            .with_context(|| format!("cannot write {}", ready.display()))?;
    }
    let mut watcher = Watcher::new(recorder, folder, metrics, traces);
    while !stop.load(Ordering::Relaxed) {
        watcher.turn()?;
    }
    watcher.finish()?;
    Ok(Outcome::Done)
}
