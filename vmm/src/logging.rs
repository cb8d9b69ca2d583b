//! Where the monitor's own words go: stderr for people, a Chrome trace for Perfetto.

use std::fs::File;
use std::io;

use anyhow::{Context, Result};
use tracing_chrome::{ChromeLayerBuilder, FlushGuard};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Layer};

use vmm::args::Args;

/// Starts both. The trace is complete once the guard is dropped.
pub(crate) fn start(args: &Args) -> Result<Option<FlushGuard>> {
    let filter = match &args.log {
        Some(filter) => EnvFilter::try_new(filter).context("--log")?,
        None => EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("warn")),
    };
    let lines = tracing_subscriber::fmt::layer()
        .with_writer(io::stderr)
        .with_filter(filter);
    let (trace, guard) = match &args.trace_chrome {
        Some(path) => {
            let file = File::create(path)
                .with_context(|| format!("can't create the trace {}", path.display()))?;
            let (layer, guard) = ChromeLayerBuilder::new()
                .writer(file)
                .include_args(true)
                .build();
            (Some(layer), Some(guard))
        }
        None => (None, None),
    };
    tracing_subscriber::registry()
        .with(trace)
        .with(lines)
        .init();
    Ok(guard)
}
