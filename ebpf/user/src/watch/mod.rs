//! A recorder that stays: what happens is written down in segments, of which only those are kept that
//! have a migration in them.
//!
//! [`Watcher`] drives the recorder and decides where a segment ends; [`keep`] bounds what stays on the
//! disk; [`metrics`] counts what the migrations were, and [`http`] hands that out; [`traces`] sends each
//! to a collector of OpenTelemetry's.

pub mod http;
pub mod keep;
pub mod metrics;
pub mod traces;

use std::path::PathBuf;
use std::time::{Duration, Instant};

use crate::analysis::{self, Loaded, kvm};
use crate::capture::{self, Recorder};
use crate::recording::Frame;

use keep::Folder;
use metrics::Metrics;
use traces::Traces;

/// A segment in which nothing migrates is thrown away after this long.
const IDLE: Duration = Duration::from_secs(60);

/// A migration is over when nothing was heard of one for this long.
const SETTLED: Duration = Duration::from_secs(3);

/// The eventful part of a segment may grow to this many frames, 16 MiB and more, before it is looked at
/// even so.
const FRAMES: u64 = 1_000_000;

/// QMP commands are no sign of a migration: many agents poll.
const POLLED: [&str; 2] = ["qmp_command_begin", "qmp_command_end"];

/// Records every process that has a VM, and keeps what migrates.
pub struct Watcher {
    recorder: Recorder,
    folder: Folder,
    metrics: Metrics,
    traces: Option<Traces>,
    begun: Instant,
    /// When something was last heard of a migration, in this segment.
    sign: Option<Instant>,
    frames: u64,
    seen: capture::Totals,
}

impl Watcher {
    /// Goes on from a recorder that writes into [`Folder::segment`].
    pub fn new(
        recorder: Recorder,
        folder: Folder,
        metrics: Metrics,
        traces: Option<Traces>,
    ) -> Self {
        Self {
            recorder,
            folder,
            metrics,
            traces,
            begun: Instant::now(),
            sign: None,
            frames: 0,
            seen: capture::Totals::default(),
        }
    }

    /// Waits for at most one tick, writes what has arrived, and ends the segment where it is due.
    ///
    /// # Errors
    /// Those of the recorder; what cannot be kept is an error too, as nothing would be from then on.
    pub fn turn(&mut self) -> anyhow::Result<()> {
        let (mut signs, mut frames) = (false, 0);
        self.recorder.turn_seeing(&mut |frame, probe| {
            frames += 1;
            signs |= is_sign(frame, probe);
        })?;
        self.frames += frames;
        if signs {
            self.sign = Some(Instant::now());
        }
        let totals = self.recorder.totals();
        self.metrics.recorded(self.seen, totals);
        self.seen = totals;
        let due = match self.sign {
            Some(at) => at.elapsed() > SETTLED || self.frames > FRAMES,
            None => self.begun.elapsed() > IDLE || self.frames > FRAMES,
        };
        if due {
            let next = self.folder.next_segment();
            self.recorder.rotate(&next)?;
            let ended = self.folder.replace_segment(next);
            self.look_at(ended)?;
            (self.begun, self.sign, self.frames) = (Instant::now(), None, 0);
        }
        Ok(())
    }

    /// Ends the recording, and keeps what the last segment has.
    ///
    /// # Errors
    /// As for [`Watcher::turn`].
    pub fn finish(mut self) -> anyhow::Result<()> {
        let last = self.folder.segment().to_owned();
        self.recorder.finish()?;
        let migrations = migrations(&last, &mut self.metrics, self.traces.as_ref())?;
        if let Some(traces) = self.traces {
            traces.finish();
        }
        Ok(self.folder.keep(last, migrations)?)
    }

    fn look_at(&mut self, segment: PathBuf) -> anyhow::Result<()> {
        let migrations = migrations(&segment, &mut self.metrics, self.traces.as_ref())?;
        Ok(self.folder.keep(segment, migrations)?)
    }
}

/// Counts the migrations of a segment, and has them sent; gives their number.
///
/// # Errors
/// When the segment cannot be read.
pub fn migrations(
    segment: &std::path::Path,
    metrics: &mut Metrics,
    traces: Option<&Traces>,
) -> anyhow::Result<usize> {
    let recordings = Loaded::read_migrations(segment)?;
    let migrations = analysis::find(&recordings);
    for migration in &migrations {
        metrics.migrated(migration);
        if let Some(traces) = traces {
            traces.migrated(migration);
        }
    }
    Ok(migrations.len())
}

/// Whether a frame tells of a migration that may be under way. KVM's ioctls do it for any monitor: it
/// asks what the guest has written, and moves registers.
fn is_sign(frame: &Frame, probe: &str) -> bool {
    match frame {
        Frame::Hit(_) => !POLLED.contains(&probe),
        Frame::Ioctl(ioctl) => {
            kvm::reads_dirty_log(ioctl)
                || kvm::reads_registers(ioctl)
                || kvm::writes_registers(ioctl)
        }
        _ => false,
    }
}
