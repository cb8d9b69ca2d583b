//! When to stop the guest: as soon as what is left fits the downtime limit at the rate at which the
//! destination loads, and another round would not make it much less.

/// Rounds in a row that may bring nothing before the migration gives up.
const MAX_STALLED: u32 = 30;
/// Rounds altogether, so that a migration's spans fit its log whatever the guest does.
const MAX_ROUNDS: u32 = 1000;

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
    /// Bytes and nanoseconds of the last round that moved anything.
    rate: (u64, u64),
}

impl Convergence {
    /// `total` is the bytes of RAM that the first round sends.
    pub(super) fn new(total: u64) -> Self {
        Convergence {
            rounds: 0,
            stalled: 0,
            least: total,
            last: total,
            rate: (0, 1),
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
            self.rate = (loaded, took_ns.max(1));
        }
        self.rounds += 1;
        let halved = remaining <= self.last / 2;
        // Less than a twentieth off the best so far is no progress.
        let progress = remaining < self.least - self.least / 20;
        self.stalled = if progress { 0 } else { self.stalled + 1 };
        self.least = self.least.min(remaining);
        self.last = remaining;

        let fits = self.expected_ns(remaining).is_some_and(|ns| ns <= limit_ns);
        let enough = self.stalled >= MAX_STALLED || self.rounds >= MAX_ROUNDS;
        match (fits, enough) {
            (true, false) if halved && remaining > 0 => Decision::Another,
            (true, _) => Decision::Stop,
            (false, false) => Decision::Another,
            (false, true) => Decision::GiveUp,
        }
    }

    /// How long `remaining` bytes take at the rate of the last round, ns; `None` while no round
    /// has moved a byte.
    pub(super) fn expected_ns(&self, remaining: u64) -> Option<u64> {
        let (loaded, took_ns) = self.rate;
        if remaining == 0 {
            return Some(0);
        }
        let ns = u128::from(remaining) * u128::from(took_ns)
            / u128::from(Some(loaded).filter(|&l| l > 0)?);
        Some(u64::try_from(ns).unwrap_or(u64::MAX))
    }

    /// The rate at which the destination loads, bytes a second.
    pub(super) fn bytes_per_second(&self) -> u64 {
        let (loaded, took_ns) = self.rate;
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
        Convergence::new(128 * MIB)
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
            c.round(120 * MIB, 1200 * MS, 31 * MIB, LIMIT),
            Decision::Another
        );
        assert_eq!(c.round(31 * MIB, 310 * MS, 29 * MIB, LIMIT), Decision::Stop);
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
        assert_eq!(rounds, 14);
    }
}
