//! Whether a testbed still runs, seen from outside: its init adds to a file every few seconds.

use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// Much longer than a busy machine keeps a testbed from running, and than its kernel boots.
const PATIENCE: Duration = Duration::from_secs(180);

/// The file that grows while the testbed runs.
pub(super) struct Heartbeat {
    file: PathBuf,
    length: u64,
    /// When it was last seen to have grown.
    grown: Instant,
}

impl Heartbeat {
    /// That of a testbed that starts now.
    pub(super) fn of(file: PathBuf) -> Self {
        Heartbeat {
            file,
            length: 0,
            grown: Instant::now(),
        }
    }

    /// Whether it did not grow for so long that no program runs there any more. To be asked often.
    pub(super) fn stands_still(&mut self) -> bool {
        self.look(PATIENCE)
    }

    fn look(&mut self, patience: Duration) -> bool {
        let length = fs::metadata(&self.file).map_or(0, |metadata| metadata.len());
        if length != self.length {
            self.length = length;
            self.grown = Instant::now();
        }
        self.grown.elapsed() > patience
    }
}

#[cfg(test)]
mod tests {
    use std::thread::sleep;

    use super::*;

    #[test]
    fn only_a_file_that_grows_is_alive() {
        let file = std::env::temp_dir().join(format!("heartbeat-{}", std::process::id()));
        let patience = Duration::from_millis(50);
        let mut heartbeat = Heartbeat::of(file.clone());
        assert!(!heartbeat.look(patience), "it has just begun");
        sleep(2 * patience);
        fs::write(&file, "\n").unwrap();
        assert!(!heartbeat.look(patience));
        sleep(2 * patience);
        assert!(heartbeat.look(patience));
        fs::remove_file(&file).unwrap();
    }
}
