//! The capability `auto-converge`: a guest that dirties RAM faster than it is sent is slowed down, more and
//! more, as QEMU's `migration_trigger_throttle` does (`migration/ram.c`).

use super::settings::{Parameter, Settings};

/// Rounds in a row that have to be bad before the guest is slowed down.
const BAD_ROUNDS: u32 = 2;

/// Follows the rounds of one migration.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct AutoConverge {
    bad: u32,
    percentage: u8,
}

impl AutoConverge {
    /// A round has sent `sent` bytes, and the guest has dirtied `dirtied` meanwhile: by how much it is to be
    /// slowed down from now on, if that changes, per cent.
    pub(super) fn round(&mut self, sent: u64, dirtied: u64, settings: &Settings) -> Option<u8> {
        let per_cent = |parameter| settings.parameter(parameter);
        let threshold = u128::from(per_cent(Parameter::ThrottleTriggerThreshold));
        if u128::from(dirtied) * 100 <= u128::from(sent) * threshold {
            self.bad = 0;
            return None;
        }
        self.bad += 1;
        if self.bad < BAD_ROUNDS {
            return None;
        }
        self.bad = 0;
        let wanted = match self.percentage {
            0 => per_cent(Parameter::CpuThrottleInitial),
            now => u64::from(now) + per_cent(Parameter::CpuThrottleIncrement),
        };
        let most = per_cent(Parameter::MaxCpuThrottle);
        let wanted = u8::try_from(wanted.min(most)).unwrap_or(u8::MAX);
        let more = wanted > self.percentage;
        self.percentage = self.percentage.max(wanted);
        more.then_some(wanted)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rounds(settings: &Settings, dirtied: &[u64]) -> Vec<Option<u8>> {
        let mut throttle = AutoConverge::default();
        let rounds = dirtied.iter();
        rounds.map(|&d| throttle.round(100, d, settings)).collect()
    }

    #[test]
    fn a_guest_that_dirties_too_much_twice_is_slowed_down_more_and_more() {
        let settings = Settings::default();
        let all = rounds(&settings, &[51, 50, 51, 100, 9, 100, 100]);
        assert_eq!(all, [None, None, None, Some(20), None, None, Some(30)]);
        let all = rounds(&settings, &[100; 40]);
        assert_eq!(all.iter().flatten().max(), Some(&99));
        assert_eq!(all.iter().flatten().count(), 9);
    }

    #[test]
    fn the_parameters_say_how_much() {
        let settings = Settings::default();
        let changes = [
            (Parameter::ThrottleTriggerThreshold, 100),
            (Parameter::CpuThrottleInitial, 40),
            (Parameter::CpuThrottleIncrement, 30),
            (Parameter::MaxCpuThrottle, 60),
        ];
        settings.set_parameters(&changes).unwrap();
        assert_eq!(rounds(&settings, &[100, 100]), [None, None]);
        let all = rounds(&settings, &[101; 6]);
        assert_eq!(all, [None, Some(40), None, Some(60), None, None]);
    }
}
