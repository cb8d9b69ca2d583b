//! The signals that ask the process to end become requests to the main loop.

use std::io;
use std::process;
use std::sync::mpsc::Sender;
use std::thread;

use nix::sys::signal::{SigSet, Signal};
use vmm::runstate::Request;

/// Blocks SIGTERM, SIGINT and SIGHUP for this thread and all that it starts, and watches for them
/// on a thread of their own. The second one ends the process at once.
pub(crate) fn watch(requests: Sender<Request>) -> io::Result<()> {
    let mut signals = SigSet::empty();
    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP] {
        signals.add(signal);
    }
    signals.thread_block()?;
    let watch = move || {
        while let Ok(signal) = signals.wait() {
            tracing::info!(%signal, "told to end");
            if requests.send(Request::Signal).is_err() || signals.wait().is_ok() {
                process::exit(1);
            }
        }
    };
    thread::Builder::new()
        .name("signals".to_owned())
        .spawn(watch)?;
    Ok(())
}
