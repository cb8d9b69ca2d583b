//! When to stop the guest: as soon as the downtime fits its limit, with what is left of RAM at the rate
//! at which the destination loads, and another round would not make it much less.

/// Rounds in a row that may bring nothing before the migration gives up.
const MAX_STALLED: u32 = 30;
/// Rounds altogether, so that a migration's spans fit its log whatever the guest does.
const MAX_ROUNDS: u32 = 1000;

/// Rounds whose rate is looked at.
const RECENT: usize = 3;
/// Rates are compared as bytes in this many nanoseconds.
const SCALE: u128 = 1_000_000_000;

/// What to do after a round.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Decision {
    /// Send what was dirtied meanwhile while the guest runs on.
    Another,
    /// Stop the guest and send the rest.
    Stop,
    /// The guest dirties memory faster than the destination loads it.
    GiveUp,
}

/// Follows the rounds of one migration.
///
/// QEMU goes on for ever when a guest does not converge; this gives up after [`MAX_STALLED`]
/// rounds without progress, because a limit that is quietly exceeded is none. Once the rest fits,
/// rounds go on as long as each halves it: all of them together cost less than the last one before.
#[derive(Clone, Debug)]
pub(super) struct Convergence {
    rounds: u32,
    stalled: u32,
    least: u64,
    last: u64,
    /// Bytes and nanoseconds of the last rounds that moved anything, the last one last.
    recent: Vec<(u64, u64)>,
    /// To read the dirty log, ns.
    sync_ns: u64,
    /// Bytes that the guest dirties between a round and the stop.
    late_bytes: u64,
    /// The shortest downtime, without any RAM, ns.
    fixed_ns: u64,
}

impl Convergence {
    /// `total` is the bytes of RAM that the first round sends, `late_bytes` what is dirtied after the last
    /// one, and `fixed_ns` what a stop takes at least besides RAM.
    pub(super) fn new(total: u64, late_bytes: u64, fixed_ns: u64) -> Self {
        Convergence {
            rounds: 0,
            stalled: 0,
            least: total,
            last: total,
            recent: Vec::with_capacity(RECENT + 1),
            sync_ns: 0,
            late_bytes,
            fixed_ns,
        }
    }

    /// A round is over: the destination has loaded its `loaded` bytes `took_ns` after it began, and
    /// `remaining` bytes were dirtied meanwhile. `limit_ns` is the downtime limit as it is now.
    pub(super) fn round(
        &mut self,
        loaded: u64,
        took_ns: u64,
        remaining: u64,
        limit_ns: u64,
    ) -> Decision {
        if loaded > 0 {
            self.recent.push((loaded, took_ns.max(1)));
            self.recent
                .drain(..self.recent.len().saturating_sub(RECENT));
        }
        self.rounds += 1;
        let halved = remaining <= self.last / 2;
        // Less than a twentieth off the best so far is no progress.
        let progress = remaining < self.least - self.least / 20;
        self.stalled = if progress { 0 } else { self.stalled + 1 };
        self.least = self.least.min(remaining);
        self.last = remaining;

        let fits = self.fits(remaining, limit_ns);
        let enough = self.stalled >= MAX_STALLED || self.rounds >= MAX_ROUNDS;
        match (fits, enough) {
            (true, false) if halved && remaining > 0 => Decision::Another,
            (true, _) => Decision::Stop,
            (false, false) => Decision::Another,
            (false, true) => Decision::GiveUp,
        }
    }

    /// The guest runs more slowly from now on: what it did before says nothing of whether it converges.
    pub(super) fn slowed_down(&mut self) {
        self.stalled = 0;
    }

    /// Reading the dirty log has taken `ns`, which the stop will do once more.
    pub(super) fn synced(&mut self, ns: u64) {
        self.sync_ns = ns;
    }

    /// Whether stopping now, with `remaining` bytes to send, keeps the limit with a fifth to spare: an
    /// expectation is not a promise, and the limit is one.
    pub(super) fn fits(&self, remaining: u64, limit_ns: u64) -> bool {
        self.expected_ns(remaining)
            .is_some_and(|ns| ns.saturating_add(ns / 5) <= limit_ns)
    }

    /// The shortest downtime of a stop now, with `remaining` bytes to send, ns; `None` while no round moved a
    /// byte.
    fn expected_ns(&self, remaining: u64) -> Option<u64> {
        Some(self.ram_ns(remaining)?.saturating_add(self.fixed_ns))
    }

    /// The part of that which is for RAM: at the rate of the last rounds, and to read the dirty log.
    pub(super) fn ram_ns(&self, remaining: u64) -> Option<u64> {
        let bytes = remaining.saturating_add(self.late_bytes);
        if bytes == 0 {
            return Some(self.sync_ns);
        }
        let (loaded, took_ns) = self.rate()?;
        let ns = u128::from(bytes) * u128::from(took_ns) / u128::from(loaded);
        let ns = u64::try_from(ns).unwrap_or(u64::MAX);
        Some(ns.saturating_add(self.sync_ns))
    }

    /// Bytes and nanoseconds of the round whose rate is the median of the last ones': a round that the
    /// host disturbed says nothing of the next one.
    fn rate(&self) -> Option<(u64, u64)> {
        let mut rates = self.recent.clone();
        rates.sort_by_key(|&(bytes, ns)| u128::from(bytes) * SCALE / u128::from(ns));
        rates.get(rates.len() / 2).copied()
    }

    /// The rate at which the destination loads, bytes a second.
    pub(super) fn bytes_per_second(&self) -> u64 {
        let (loaded, took_ns) = self.rate().unwrap_or((0, 1));
        let rate = u128::from(loaded) * 1_000_000_000 / u128::from(took_ns);
        u64::try_from(rate).unwrap_or(u64::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;
    const MS: u64 = 1_000_000;
    const LIMIT: u64 = 300 * MS;

    fn convergence() -> Convergence {
        Convergence::new(128 * MIB, 0, 0)
    }

    #[test]
    fn an_idle_guest_stops_after_the_first_round() {
        assert_eq!(
            convergence().round(128 * MIB, 100 * MS, 0, LIMIT),
            Decision::Stop
        );
        let mut zeros = convergence();
        assert_eq!(zeros.round(0, 10 * MS, 0, LIMIT), Decision::Stop);
    }

    #[test]
    fn rounds_that_halve_the_rest_go_on_and_the_first_that_does_not_stops() {
        let mut c = convergence();
        assert_eq!(c.round(128 * MIB, 100 * MS, MIB, LIMIT), Decision::Another);
        assert_eq!(c.round(MIB, MS, MIB / 4, LIMIT), Decision::Another);
        assert_eq!(c.round(MIB / 4, MS / 4, MIB / 4, LIMIT), Decision::Stop);
        assert_eq!(c.expected_ns(MIB / 4), Some(MS / 4));
    }

    #[test]
    fn a_rest_that_does_not_fit_the_limit_is_sent_while_the_guest_runs() {
        let mut c = convergence();
        // 100 MiB/s: the limit holds 30 MiB.
        assert_eq!(
            c.round(128 * MIB, 1280 * MS, 120 * MIB, LIMIT),
            Decision::Another
        );
        assert_eq!(
            c.round(120 * MIB, 1200 * MS, 26 * MIB, LIMIT),
            Decision::Another
        );
        assert_eq!(c.round(26 * MIB, 260 * MS, 24 * MIB, LIMIT), Decision::Stop);
    }

    #[test]
    fn everything_that_a_stop_takes_counts_against_the_limit() {
        let mut c = Convergence::new(128 * MIB, MIB, 100 * MS);
        c.synced(10 * MS);
        // 150 ms are left for RAM, less 10 for the dirty log: 14 MiB, at 100 MiB/s, one of them late.
        assert_eq!(
            c.round(128 * MIB, 1280 * MS, 14 * MIB, 300 * MS),
            Decision::Another
        );
        assert_eq!(c.expected_ns(14 * MIB), Some(260 * MS));
        assert!(!c.fits(14 * MIB, 300 * MS) && c.fits(13 * MIB, 300 * MS));
        assert!(!c.fits(0, 143 * MS) && c.fits(0, 144 * MS));
    }

    #[test]
    fn a_round_that_was_disturbed_changes_no_rate() {
        let mut c = convergence();
        for took_ms in [10, 10, 500, 11] {
            c.round(MIB, took_ms * MS, MIB, LIMIT);
        }
        assert_eq!(c.expected_ns(2 * MIB), Some(22 * MS));
    }

    #[test]
    fn a_rate_of_zero_decides_nothing() {
        assert_eq!(
            convergence().round(0, 10 * MS, MIB, LIMIT),
            Decision::Another
        );
    }

    #[test]
    fn a_guest_that_never_converges_ends_in_a_clear_state() {
        let mut c = convergence();
        let decisions = (0..).map(|_| c.round(64 * MIB, 640 * MS, 64 * MIB, LIMIT));
        let rounds = decisions.take_while(|&d| d == Decision::Another).count();
        assert_eq!(rounds, MAX_STALLED as usize);
        assert_eq!(
            c.round(64 * MIB, 640 * MS, 64 * MIB, LIMIT),
            Decision::GiveUp
        );
        assert_eq!(c.bytes_per_second(), 100 * MIB);
    }

    #[test]
    fn slow_progress_is_progress() {
        let mut c = convergence();
        let mut rest = 128 * MIB;
        let mut rounds = 0;
        loop {
            let next = rest / 100 * 90;
            rounds += 1;
            match c.round(rest, rest / MIB * 10 * MS, next, LIMIT) {
                Decision::Another => rest = next,
                decision => break assert_eq!(decision, Decision::Stop),
            }
        }
        assert_eq!(rounds, 16);
    }
}
