//! What a stop of this guest has cost so far, part by part: what the next blackout is predicted from.
//!
//! The parts are measured by the spans that a stop makes anyway. They are kept with the machine and go
//! with the guest, so that a monitor which has never stopped it knows what its ITS takes to save.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::spanlog::SpanRecord;

/// Parts that are remembered at most. A guest has a handler or two and a state for each device.
const MAX_PARTS: usize = 1024;
/// Measurements of one part that are remembered.
const MAX_RECENT: usize = 5;
/// Bytes of a part's name at most; a peer sends them.
const MAX_NAME: usize = 256;
/// Spans inside a stop that are parts of it; the device's name tells those of one kind apart.
const STOP_PARTS: [&str; 3] = ["pause_all_vcpus", "vm_state_handler", "drain"];
/// The part for which there is a span after the stop, one for each device.
pub(crate) const DEVICE_SAVE: &str = "device_save";

/// Nanoseconds by part. Parts never overlap: all of them are done by one thread, one after another.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Costs {
    /// By the span's name, and its device's where it has one.
    pub(crate) parts: BTreeMap<String, Recent>,
    /// What the pages were that the stop sent.
    pub(crate) ram: Ram,
    /// What was left of the downtime, besides the parts and the pages: the way over the connection, the
    /// destination's loads, and its start. Empty before the first migration.
    pub(crate) rest: Recent,
}

/// What the last few stops had to do for the guest's RAM. Rounds do not tell it: they share the host's CPUs
/// with the guest, and what it writes between the last of them and the stop comes on top.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Ram {
    /// Nanoseconds to send a MiB, where there was enough of it to tell.
    pub(crate) mib: Recent,
    /// Bytes that were dirtied after the last round had looked.
    pub(crate) late_bytes: Recent,
}

impl Costs {
    /// Reads the last stop out of the spans of the thread that did it, and the devices that it saved.
    /// What a start did is not a part. Empty when there was no stop.
    pub(crate) fn measured(spans: &[SpanRecord]) -> Self {
        let mut sums: BTreeMap<String, u64> = BTreeMap::new();
        let Some(stop) = spans.iter().rfind(|span| span.name == "do_vm_stop") else {
            return Costs::default();
        };
        let stopped_ns = stop.start_ns.saturating_add(stop.duration_ns);
        for span in spans.iter().filter(|span| span.start_ns >= stop.start_ns) {
            let in_stop = span.start_ns < stopped_ns && STOP_PARTS.contains(&&*span.name);
            if in_stop || span.name == DEVICE_SAVE {
                let sum = sums.entry(part(&span.name, span.detail.as_deref()));
                let sum = sum.or_default();
                *sum = sum.saturating_add(span.duration_ns);
            }
        }
        let parts = sums.into_iter().map(|(name, ns)| (name, Recent::one(ns)));
        Costs {
            parts: parts.collect(),
            ..Costs::default()
        }
    }

    /// Takes in what was measured once more.
    pub(crate) fn learn(&mut self, measured: &Costs) {
        for (name, recent) in &measured.parts {
            if let Some(known) = self.parts.get_mut(name) {
                known.learn(recent);
            } else if self.parts.len() < MAX_PARTS {
                self.parts.insert(name.clone(), recent.clone());
            }
        }
        self.ram.mib.learn(&measured.ram.mib);
        self.ram.late_bytes.learn(&measured.ram.late_bytes);
        self.rest.learn(&measured.rest);
    }

    /// The sum of the parts, without the rest.
    pub(crate) fn parts_ns(&self) -> u64 {
        let parts = self.parts.values().map(Recent::median);
        parts.fold(0, u64::saturating_add)
    }

    /// Whether nothing was ever measured.
    pub(crate) fn is_empty(&self) -> bool {
        self.parts.is_empty() && self.rest.is_empty()
    }

    /// Whether this may be kept: a peer that sends it may be hostile.
    pub(crate) fn is_sane(&self) -> bool {
        let named = |name: &String| name.len() <= MAX_NAME;
        let others = [&self.ram.mib, &self.ram.late_bytes, &self.rest];
        self.parts.len() <= MAX_PARTS
            && self.parts.keys().all(named)
            && self.parts.values().chain(others).all(Recent::is_sane)
    }
}

/// What something took the last few times, the last time last; ns, if nothing else is said. It is expected
/// to take the median: a stop during which the host had something else to do says nothing of the next one.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Recent(Vec<u64>);

impl Recent {
    /// Measured once.
    pub(crate) fn one(value: u64) -> Self {
        Recent(vec![value])
    }

    /// Whether it was never measured.
    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// How often it was measured lately.
    pub(crate) fn count(&self) -> usize {
        self.0.len()
    }

    /// What it is expected to take; 0 if it was never measured.
    pub(crate) fn median(&self) -> u64 {
        let mut sorted = self.0.clone();
        sorted.sort_unstable();
        // Of an even number, the lower one: what a thing costs is its least, the rest is disturbance.
        sorted
            .get(sorted.len().saturating_sub(1) / 2)
            .copied()
            .unwrap_or(0)
    }

    /// The least it took lately; 0 if it was never measured.
    pub(crate) fn least(&self) -> u64 {
        self.0.iter().min().copied().unwrap_or(0)
    }

    fn learn(&mut self, more: &Recent) {
        self.0.extend(&more.0);
        self.0.drain(..self.0.len().saturating_sub(MAX_RECENT));
    }

    fn is_sane(&self) -> bool {
        self.0.len() <= MAX_RECENT
    }
}

/// What the part is called that a span of this name and detail belongs to.
pub(crate) fn part(name: &str, detail: Option<&str>) -> String {
    match detail {
        Some(detail) => format!("{name} {detail}"),
        None => name.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn span(
        name: &'static str,
        detail: Option<&str>,
        start_ns: u64,
        duration_ns: u64,
    ) -> SpanRecord {
        SpanRecord {
            name: name.into(),
            hop: 5,
            detail: detail.map(str::to_owned),
            depth: 0,
            start_ns,
            duration_ns,
            rc: 0,
        }
    }

    fn costs(parts: &[(&str, u64)], rest: &[u64]) -> Costs {
        let parts = parts
            .iter()
            .map(|&(name, ns)| (name.to_owned(), Recent::one(ns)));
        Costs {
            parts: parts.collect(),
            rest: Recent(rest.to_vec()),
            ..Costs::default()
        }
    }

    #[test]
    fn the_parts_of_the_last_stop_are_found() {
        let spans = [
            span("do_vm_stop", Some("paused"), 10, 20),
            span("pause_all_vcpus", None, 11, 9),
            span("migration_stop_vm", Some("finish-migrate"), 99, 60),
            span("do_vm_stop", Some("finish-migrate"), 100, 50),
            span("pause_all_vcpus", None, 101, 9),
            span("vm_state_handler", Some("its"), 111, 3),
            span("vm_state_handler", Some("its"), 115, 4),
            span("its_save_tables", None, 115, 2),
            span("drain", None, 140, 1),
            span("ram_final", None, 150, 30),
            span("device_save", Some("cpu/0"), 180, 5),
            span("vm_state_handler", Some("its"), 300, 1000),
        ];
        let expected = [
            ("device_save cpu/0", 5),
            ("drain", 1),
            ("pause_all_vcpus", 9),
            ("vm_state_handler its", 7),
        ];
        let measured = Costs::measured(&spans);
        assert_eq!(measured, costs(&expected, &[]));
        assert_eq!(measured.parts_ns(), 22);
        assert!(Costs::measured(&spans[9..]).is_empty());
    }

    #[test]
    fn the_median_of_the_last_few_is_expected() {
        let mut known = costs(&[("a", 10), ("b", 4)], &[]);
        known.learn(&costs(&[("a", 2000), ("c", 1)], &[7]));
        known.learn(&costs(&[("a", 12)], &[9]));
        assert_eq!(known.parts["a"].median(), 12);
        assert_eq!(known.parts["a"].least(), 10);
        assert_eq!((known.parts_ns(), known.rest.median()), (12 + 4 + 1, 7));
        for ns in 100..120 {
            known.learn(&costs(&[("a", ns)], &[]));
        }
        assert_eq!(known.parts["a"], Recent(vec![115, 116, 117, 118, 119]));
        assert_eq!(known.rest.median(), 7);
    }

    #[test]
    fn a_peers_costs_are_bounded() {
        let many = (0..=MAX_PARTS).map(|i| (i.to_string(), Recent::one(u64::MAX)));
        let many = Costs {
            parts: many.collect(),
            ..Costs::default()
        };
        assert!(!many.is_sane());
        assert_eq!(many.parts_ns(), u64::MAX);
        assert!(!costs(&[(&"x".repeat(MAX_NAME + 1), 1)], &[]).is_sane());
        assert!(!costs(&[], &[0; MAX_RECENT + 1]).is_sane());
        let mut ram = costs(&[], &[]);
        ram.ram.late_bytes = Recent(vec![0; MAX_RECENT + 1]);
        assert!(!ram.is_sane());
        assert!(costs(&[("x", 1)], &[0; MAX_RECENT]).is_sane());
        let mut full = many;
        full.parts.pop_first();
        full.learn(&costs(&[("new", 1)], &[]));
        assert!(full.is_sane());
    }
}
