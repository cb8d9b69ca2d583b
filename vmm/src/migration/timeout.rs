//! The parameter `migration-timeout`: a migration that is still in its rounds by then is given up, or its
//! guest is stopped however long its blackout will be.

use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread;
use std::time::Duration;

use super::board::Board;

/// How often the clock is looked at; the parameter may change meanwhile.
const LOOK: Duration = Duration::from_millis(100);

/// Runs the `rounds` of a migration, which is cancelled when it takes longer than it may.
pub(super) fn watched<T>(board: &Board, rounds: impl FnOnce() -> T) -> T {
    thread::scope(|scope| {
        let (over, ended) = channel::<()>();
        let watch = move || {
            while ended.recv_timeout(LOOK) == Err(RecvTimeoutError::Timeout) {
                if board.expire() {
                    return;
                }
            }
        };
        let watcher = thread::Builder::new().name("timeout".to_owned());
        if let Err(error) = watcher.spawn_scoped(scope, watch) {
            // A host that is out of threads is no reason to lose the migration.
            tracing::warn!("nobody watches migration-timeout: {error}");
        }
        let rounds = rounds();
        drop(over);
        rounds
    })
}
