//! How fast pages are sent: `max-bandwidth` while the guest runs, and as fast as it goes once it is
//! stopped.

use std::time::{Duration, Instant};

use super::board::{Board, Cancelled};
use super::settings::Parameter;
use super::stream::ram::Tally;

/// How often a source that keeps to a bandwidth looks whether it still is to.
const LOOK: Duration = Duration::from_millis(50);
/// How often a source with several connections looks at them.
pub(super) const PACE: Duration = Duration::from_millis(10);

/// How fast pages are sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Pace {
    /// As `max-bandwidth` says.
    Limited,
    /// The guest is stopped, and nothing else counts.
    Full,
}

impl Pace {
    /// How many bytes may have been sent [`PACE`] from now.
    pub(super) fn allowed(self, began: Instant, board: &Board) -> u64 {
        let limit = board.settings().parameter(Parameter::MaxBandwidth);
        if self == Pace::Full || limit == 0 {
            return u64::MAX;
        }
        let ns = (began.elapsed() + PACE).as_nanos();
        u64::try_from(u128::from(limit) * ns / 1_000_000_000).unwrap_or(u64::MAX)
    }

    /// Waits until `sent` does not exceed the bandwidth since `began`. The limit may change meanwhile,
    /// so it is asked for again and again.
    pub(super) fn keep(self, sent: Tally, began: Instant, board: &Board) -> Result<(), Cancelled> {
        if self == Pace::Full {
            return Ok(());
        }
        loop {
            let limit = board.settings().parameter(Parameter::MaxBandwidth);
            let due_ns = match limit {
                0 => 0,
                _ => u128::from(sent.bytes) * 1_000_000_000 / u128::from(limit),
            };
            let due = Duration::from_nanos(u64::try_from(due_ns).unwrap_or(u64::MAX));
            let early = due.saturating_sub(began.elapsed());
            if early.is_zero() {
                return Ok(());
            }
            board.sleep(early.min(LOOK))?;
        }
    }
}
