//! What a blackout is expected to take, part by part, and what it took: nothing but the number decides
//! when the guest is stopped, so it counts everything that the downtime will consist of.
//!
//! Everything is expected to take what it took before (`costs.rs`; the figures go with the guest). For a guest
//! that was never stopped, pages are expected at the rate of the last rounds, and everything else is expected
//! to take what it took when the destination rehearsed it on its idle machine.

use std::collections::BTreeMap;
use std::ffi::CString;

use serde::Serialize;

use super::stream::message::Rehearsal;
use crate::costs::{Costs, DEVICE_SAVE, Ram, Recent, part};
use crate::spanlog::SpanRecord;

/// Round trips in a downtime besides what the destination does: `end` and `loaded`, `commit`, and two
/// threads that are woken, each side's, which takes about as long.
const ROUND_TRIPS: u64 = 3;
/// Pages that are fewer than this say nothing of the rate of many, and the other way round.
const ENOUGH: u64 = 256 << 10;
const MIB: u64 = 1 << 20;
/// A stop sends pages at most this many times as fast as rounds do, which share the host's CPUs with the guest.
/// If it seems to be more, the connection is not the one of the last stop.
const MOST_FASTER: u64 = 4;
/// The name of what pages are expected to take, and of everything that is no part.
const RAM: &str = "ram_final";
const REST: &str = "rest";

/// Where the expectation of what is not RAM comes from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Basis {
    /// The destination has saved and loaded the devices of its own machine, which has not run. What the
    /// guest has made of its ITS is not known.
    #[default]
    Rehearsal,
    /// This guest was stopped before, in this monitor or in those where it came from.
    History,
}

/// What a stop now is expected to cost besides its pages.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Fixed {
    basis: Basis,
    costs: Costs,
    least_ns: u64,
}

impl Fixed {
    /// From what is `known` of the guest, and what the destination's `rehearsal` of its `devices` took;
    /// `round_trip_ns` is the way there and back.
    pub(super) fn new(
        known: Costs,
        devices: &[CString],
        rehearsal: &[Rehearsal],
        round_trip_ns: u64,
    ) -> Self {
        let basis = match known.is_empty() {
            true => Basis::Rehearsal,
            false => Basis::History,
        };
        let mut rehearsed = BTreeMap::from([(part("pause_all_vcpus", None), round_trip_ns)]);
        let mut rest_ns = round_trip_ns.saturating_mul(ROUND_TRIPS);
        for (name, device) in devices.iter().zip(rehearsal) {
            let name = part(DEVICE_SAVE, Some(&name.to_string_lossy()));
            rehearsed.insert(name, device.save_ns);
            rest_ns = rest_ns.saturating_add(device.load_ns);
        }

        let mut costs = known;
        for (name, &ns) in &rehearsed {
            let recent = costs.parts.entry(name.clone());
            recent.or_insert_with(|| Recent::one(ns));
        }
        if costs.rest.is_empty() {
            costs.rest = Recent::one(rest_ns);
        }
        // A single stop may have been disturbed; two tell what the rehearsal can't know, such as how much
        // the guest has mapped in its ITS, which the destination restores.
        let least = |recent: &Recent, rehearsed_ns: u64| match recent.count() {
            0 | 1 => recent.least().min(rehearsed_ns),
            _ => recent.least(),
        };
        let parts = costs.parts.iter().map(|(name, recent)| {
            let rehearsed_ns = rehearsed.get(name).copied();
            least(recent, rehearsed_ns.unwrap_or(u64::MAX))
        });
        let rest_ns = least(&costs.rest, rest_ns);
        Fixed {
            least_ns: parts.fold(rest_ns, u64::saturating_add),
            basis,
            costs,
        }
    }

    /// The least it can be hoped for: what each part took when nothing disturbed it, be it the guest's
    /// or, of a guest that was stopped once at most, the rehearsal's. Below this no limit can be kept. It is
    /// not the expectation that a limit is refused by: a guest whose only stop was disturbed would never be
    /// stopped again.
    pub(super) fn least_ns(&self) -> u64 {
        self.least_ns
    }

    /// The sum.
    pub(super) fn total_ns(&self) -> u64 {
        let rest_ns = self.costs.rest.median();
        self.costs.parts_ns().saturating_add(rest_ns)
    }

    /// Bytes of RAM that are dirtied between the last look at the dirty log and the stop.
    pub(super) fn late_bytes(&self) -> u64 {
        self.costs.ram.late_bytes.median()
    }

    /// What it takes to send `bytes` of RAM while the guest is stopped, for which rounds would need `round_ns`.
    pub(super) fn ram_ns(&self, bytes: u64, round_ns: u64) -> u64 {
        let mib_ns = u128::from(self.costs.ram.mib.median());
        let ns = mib_ns * u128::from(bytes) / u128::from(MIB);
        match u64::try_from(ns) {
            Ok(ns) if bytes >= ENOUGH && ns <= round_ns && ns >= round_ns / MOST_FASTER => ns,
            _ => round_ns,
        }
    }
}

/// What was expected right before the stop.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Forecast {
    /// The downtime limit, ms.
    pub(super) limit_ms: u64,
    /// The bytes that the last round has left.
    pub(super) left_bytes: u64,
    /// What it takes to send them, and what is dirtied after them.
    pub(super) ram_ns: u64,
    /// Everything else.
    pub(super) fixed: Fixed,
}

impl Forecast {
    /// The downtime.
    pub(super) fn total_ns(&self) -> u64 {
        self.fixed.total_ns().saturating_add(self.ram_ns)
    }

    /// What there is to learn from a downtime of which `measured` are the parts, and which sent `ram`:
    /// they, and the rest.
    pub(super) fn learned(
        &self,
        measured: Costs,
        ram: Option<Sent>,
        downtime_ns: Option<u64>,
    ) -> Costs {
        let ram_ns = ram.map_or(0, |ram| ram.ns);
        let accounted_ns = measured.parts_ns().saturating_add(ram_ns);
        let rest_ns = downtime_ns.map(|ns| ns.saturating_sub(accounted_ns));
        let late_bytes = ram.map(|ram| ram.bytes.saturating_sub(self.left_bytes));
        Costs {
            ram: Ram {
                mib: ram
                    .and_then(Sent::mib_ns)
                    .map(Recent::one)
                    .unwrap_or_default(),
                late_bytes: late_bytes.map(Recent::one).unwrap_or_default(),
            },
            rest: rest_ns.map(Recent::one).unwrap_or_default(),
            ..measured
        }
    }

    /// How long the pages of the last stop among `spans` took.
    pub(super) fn ram_span_ns(spans: &[SpanRecord]) -> Option<u64> {
        let last = spans.iter().rfind(|span| span.name == RAM);
        last.map(|span| span.duration_ns)
    }

    /// The expectation beside what came, of which `measured` are the parts and `ram_ns` the pages.
    pub(super) fn beside(
        &self,
        measured: &Costs,
        ram_ns: Option<u64>,
        downtime_ns: Option<u64>,
    ) -> Prediction {
        let expected = &self.fixed.costs;
        let mut parts: Vec<_> = expected
            .parts
            .iter()
            .map(|(name, ns)| {
                let achieved = measured.parts.get(name).map(Recent::median);
                Part::new(name, ns.median(), achieved)
            })
            .collect();
        let news = measured.parts.iter();
        let news = news.filter(|(name, _)| !expected.parts.contains_key(*name));
        parts.extend(news.map(|(name, ns)| Part::new(name, 0, Some(ns.median()))));
        parts.push(Part::new(RAM, self.ram_ns, ram_ns));
        let accounted_ns = measured.parts_ns().saturating_add(ram_ns.unwrap_or(0));
        let rest_ns = downtime_ns.map(|ns| ns.saturating_sub(accounted_ns));
        parts.push(Part::new(REST, expected.rest.median(), rest_ns));
        Prediction {
            basis: self.fixed.basis,
            limit_ms: self.limit_ms,
            predicted_ns: self.total_ns(),
            achieved_ns: downtime_ns,
            parts,
        }
    }
}

/// The pages that a stop has sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Sent {
    /// All of them, also those that are zero.
    pub(super) bytes: u64,
    /// What it took.
    pub(super) ns: u64,
}

impl Sent {
    /// What a MiB took, if they were enough to tell.
    fn mib_ns(self) -> Option<u64> {
        let ns = u128::from(self.ns) * u128::from(MIB) / u128::from(self.bytes.max(ENOUGH));
        (self.bytes >= ENOUGH).then(|| u64::try_from(ns).unwrap_or(u64::MAX))
    }
}

/// The downtime as it was expected right before the stop, and as it was: `blackout.prediction` of
/// `query-migrate`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Prediction {
    /// How it was known.
    pub basis: Basis,
    /// The downtime limit at that time, as it was set.
    pub limit_ms: u64,
    /// What was expected.
    pub predicted_ns: u64,
    /// What came; absent when the guest did not run before or after.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub achieved_ns: Option<u64>,
    /// Both sums, part by part. `rest` is everything from the last byte that the source sent.
    pub parts: Vec<Part>,
}

/// One part of a downtime.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Part {
    /// The span's name, and its device's where it has one.
    pub name: String,
    /// What was expected.
    pub predicted_ns: u64,
    /// What came; absent when the migration did not get there.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub achieved_ns: Option<u64>,
}

impl Part {
    fn new(name: &str, predicted_ns: u64, achieved_ns: Option<u64>) -> Self {
        Part {
            name: name.to_owned(),
            predicted_ns,
            achieved_ns,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn costs(parts: &[(&str, u64)], rest_ns: Option<u64>) -> Costs {
        let part = |&(name, ns): &(&str, u64)| (name.to_owned(), Recent::one(ns));
        Costs {
            parts: parts.iter().map(part).collect(),
            rest: rest_ns.map(Recent::one).unwrap_or_default(),
            ..Costs::default()
        }
    }

    fn rehearsed(known: Costs) -> Fixed {
        let devices = [c"cpu/0".to_owned(), c"its".to_owned()];
        let rehearsal = [(10, 20), (3, 4)].map(|(save_ns, load_ns)| Rehearsal { save_ns, load_ns });
        Fixed::new(known, &devices, &rehearsal, 100)
    }

    #[test]
    fn a_guest_that_was_never_stopped_is_predicted_by_the_rehearsal() {
        let fixed = rehearsed(Costs::default());
        assert_eq!(fixed.basis, Basis::Rehearsal);
        let parts = [
            ("device_save cpu/0", 10),
            ("device_save its", 3),
            ("pause_all_vcpus", 100),
        ];
        assert_eq!(fixed.costs, costs(&parts, Some(24 + 300)));
        assert_eq!(fixed.total_ns(), 113 + 324);
    }

    #[test]
    fn what_was_measured_comes_before_what_was_rehearsed() {
        let known = [
            ("device_save its", 70),
            ("pause_all_vcpus", 5),
            ("vm_state_handler its", 8),
        ];
        let fixed = rehearsed(costs(&known, None));
        assert_eq!(fixed.basis, Basis::History);
        assert_eq!(fixed.total_ns(), 70 + 5 + 8 + 10 + 324);
        assert_eq!(fixed.least_ns(), 3 + 5 + 8 + 10 + 324);
        let fixed = rehearsed(costs(&known, Some(1)));
        assert_eq!(fixed.total_ns(), 70 + 5 + 8 + 10 + 1);
        let disturbed = rehearsed(costs(&known, Some(900)));
        assert_eq!(disturbed.least_ns(), 3 + 5 + 8 + 10 + 324);
        let mut twice = costs(&known, Some(900));
        twice.learn(&costs(&known, Some(800)));
        assert_eq!(rehearsed(twice).least_ns(), 70 + 5 + 8 + 10 + 800);
    }

    #[test]
    fn a_prediction_is_laid_beside_what_came() {
        let forecast = Forecast {
            limit_ms: 1,
            left_bytes: 3 * MIB,
            ram_ns: 50,
            fixed: Fixed {
                basis: Basis::History,
                costs: costs(&[("drain", 2), ("gone", 1)], Some(30)),
                ..Fixed::default()
            },
        };
        assert_eq!(forecast.total_ns(), 83);
        let measured = costs(&[("drain", 4), ("new", 6)], None);
        let prediction = forecast.beside(&measured, Some(40), Some(100));
        let parts: Vec<_> = prediction
            .parts
            .iter()
            .map(|p| (&*p.name, p.predicted_ns, p.achieved_ns))
            .collect();
        let expected = [
            ("drain", 2, Some(4)),
            ("gone", 1, None),
            ("new", 0, Some(6)),
            ("ram_final", 50, Some(40)),
            ("rest", 30, Some(50)),
        ];
        assert_eq!(parts, expected);
        let sum: u64 = parts.iter().filter_map(|(_, _, achieved)| *achieved).sum();
        assert_eq!(Some(sum), prediction.achieved_ns);
        let ram = Sent {
            bytes: 4 * MIB,
            ns: 40,
        };
        let learned = forecast.learned(measured, Some(ram), Some(100));
        assert_eq!(learned.rest, Recent::one(100 - 4 - 6 - 40));
        assert_eq!(learned.ram.mib, Recent::one(10));
        assert_eq!(learned.ram.late_bytes, Recent::one(MIB));
    }

    #[test]
    fn pages_are_expected_at_the_rate_of_stops_on_the_same_connection() {
        let mut fixed = rehearsed(Costs::default());
        assert_eq!((fixed.ram_ns(2 * MIB, 3000), fixed.late_bytes()), (3000, 0));
        fixed.costs.ram.mib = Recent::one(1000);
        fixed.costs.ram.late_bytes = Recent::one(5);
        assert_eq!((fixed.ram_ns(2 * MIB, 3000), fixed.late_bytes()), (2000, 5));
        let (slower, faster) = (9000, 1500);
        assert_eq!(fixed.ram_ns(2 * MIB, slower), slower);
        assert_eq!(fixed.ram_ns(2 * MIB, faster), faster);
        assert_eq!(fixed.ram_ns(ENOUGH - 1, 300), 300);
        fixed.costs.ram.mib = Recent::one(u64::MAX);
        assert_eq!(fixed.ram_ns(2 * MIB, 3000), 3000);
        let few = Sent {
            bytes: ENOUGH - 1,
            ns: 9,
        };
        assert_eq!(few.mib_ns(), None);
    }
}
