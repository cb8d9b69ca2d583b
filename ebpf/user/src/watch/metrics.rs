//! What the migrations were, as OpenMetrics. All of it outlives the processes that migrated.

use std::collections::HashSet;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::{Registry, Unit};

use crate::analysis::{Migration, View};
use crate::capture::Totals;

/// Names are the recorded processes' own: no more of them than this become labels of their own, as
/// each costs a monitoring system memory for good.
const NAMES: usize = 64;

/// Longer names than this are no handler's.
const NAME: usize = 48;

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct How {
    view: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Ended {
    status: &'static str,
    view: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Table {
    op: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Part {
    side: String,
    kind: &'static str,
    name: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Sent {
    result: &'static str,
}

type Histograms<L> = Family<L, Histogram, fn() -> Histogram>;

/// The figures, shared between the recorder that writes and the server that reads.
#[derive(Clone, Debug)]
pub struct Metrics {
    registry: Arc<Mutex<Registry>>,
    migrations: Family<Ended, Counter>,
    downtime: Histograms<How>,
    blackout: Histograms<How>,
    tables: Histograms<Table>,
    parts: Histograms<Part>,
    last: Gauge,
    doubtful: Counter,
    events: Counter,
    lost: Counter,
    cpu: Counter<f64, std::sync::atomic::AtomicU64>,
    traces: Family<Sent, Counter>,
    names: HashSet<String>,
}

impl Default for Metrics {
    fn default() -> Self {
        let mut registry = Registry::with_prefix("blackout");
        let histogram: fn() -> Histogram = histogram;
        let metrics = Self {
            registry: Arc::default(),
            migrations: Family::default(),
            downtime: Family::new_with_constructor(histogram),
            blackout: Family::new_with_constructor(histogram),
            tables: Family::new_with_constructor(histogram),
            parts: Family::new_with_constructor(histogram),
            last: Gauge::default(),
            doubtful: Counter::default(),
            events: Counter::default(),
            lost: Counter::default(),
            cpu: Counter::default(),
            traces: Family::default(),
            names: HashSet::new(),
        };
        registry.register(
            "migrations",
            "Migrations that were seen",
            metrics.migrations.clone(),
        );
        registry.register(
            "doubtful_migrations",
            "Migrations whose figures are in doubt: events were lost, or probes do not pair",
            metrics.doubtful.clone(),
        );
        registry.register_with_unit(
            "downtime",
            "From the stop of the VM to the first KVM_RUN after it",
            Unit::Seconds,
            metrics.downtime.clone(),
        );
        registry.register_with_unit(
            "guest_blackout",
            "From the last vCPU's last exit from guest code to the first entry after it",
            Unit::Seconds,
            metrics.blackout.clone(),
        );
        registry.register_with_unit(
            "table",
            "Saves and restores of the ITS' tables and the pending tables",
            Unit::Seconds,
            metrics.tables.clone(),
        );
        registry.register_with_unit(
            "part",
            "State handlers, and saves and loads of devices, each by its name",
            Unit::Seconds,
            metrics.parts.clone(),
        );
        registry.register_with_unit(
            "last_migration_timestamp",
            "When the last migration was seen to be over, since the epoch",
            Unit::Seconds,
            metrics.last.clone(),
        );
        registry.register(
            "events",
            "Events that were recorded",
            metrics.events.clone(),
        );
        registry.register(
            "lost_events",
            "Events that found no room",
            metrics.lost.clone(),
        );
        registry.register_with_unit(
            "recorder_cpu",
            "CPU time of the recorder itself",
            Unit::Seconds,
            metrics.cpu.clone(),
        );
        registry.register(
            "traces",
            "Migrations that were to be sent to a collector of OpenTelemetry's",
            metrics.traces.clone(),
        );
        *metrics.lock() = registry;
        metrics
    }
}

impl Metrics {
    /// Counts a migration that is over.
    pub fn migrated(&mut self, migration: &Migration<'_>) {
        let view = match migration.view {
            View::Probes => "probes",
            View::Kernel => "kernel",
        };
        let status = match migration.status.as_str() {
            "completed" => "completed",
            "failed" => "failed",
            "cancelled" => "cancelled",
            _ => "unfinished",
        };
        self.migrations.get_or_create(&Ended { status, view }).inc();
        if !migration.doubts().is_empty() {
            self.doubtful.inc();
        }
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        self.last
            .set(now.map_or(0, |now| i64::try_from(now.as_secs()).unwrap_or(i64::MAX)));
        if let Some(bounds) = migration.downtime.bounds {
            let downtime = self.downtime.get_or_create(&How { view });
            downtime.observe(seconds(bounds.duration_ns()));
        }
        if let Some((dark_ns, light_ns)) = migration.downtime.blackout {
            let blackout = u64::try_from(light_ns.saturating_sub(dark_ns)).unwrap_or(0);
            self.blackout
                .get_or_create(&How { view })
                .observe(seconds(blackout));
        }
        for table in &migration.its {
            let took = self.tables.get_or_create(&Table { op: table.op });
            took.observe(seconds(table.duration_ns));
        }
        for party in migration.parties() {
            for span in &party.spans {
                let kind = match span.what.name() {
                    "vm_state_handler" => "handler",
                    "device_save" | "vmstate_save" => "save",
                    "device_load" | "vmstate_load" => "load",
                    _ => continue,
                };
                let name = self.name(span.what.begin.str("name").unwrap_or_default());
                let side = party.side.to_string();
                let part = self.parts.get_or_create(&Part { side, kind, name });
                part.observe(seconds(span.duration_ns()));
            }
        }
    }

    /// Counts what the recorder did between two of its totals.
    pub fn recorded(&self, before: Totals, now: Totals) {
        self.events.inc_by(now.events.saturating_sub(before.events));
        self.lost.inc_by(now.lost.saturating_sub(before.lost));
        self.cpu
            .inc_by(seconds(now.cpu_ns.saturating_sub(before.cpu_ns)));
    }

    /// Counts a migration that was to be sent, by what became of it: `sent`, `failed` or `dropped`.
    pub(super) fn traced(&self, result: &'static str) {
        self.traces.get_or_create(&Sent { result }).inc();
    }

    /// All of it, as OpenMetrics text.
    pub fn text(&self) -> String {
        let mut text = String::new();
        // Writing to a string does not fail.
        let _ = encode(&mut text, &self.lock());
        text
    }

    /// A name as a label: one of few, and printable.
    fn name(&mut self, name: &str) -> String {
        let plain = |char: char| char.is_ascii_graphic() && !matches!(char, '"' | '\\');
        if !self.names.contains(name) {
            let fits = !name.is_empty() && name.len() <= NAME && name.chars().all(plain);
            if !fits || self.names.len() >= NAMES {
                return "other".to_owned();
            }
            self.names.insert(name.to_owned());
        }
        name.to_owned()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Registry> {
        self.registry.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// From 50 µs to 26 s.
fn histogram() -> Histogram {
    Histogram::new(exponential_buckets(50e-6, 2.0, 20))
}

fn seconds(ns: u64) -> f64 {
    ns as f64 / 1e9
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_processes_do_not_become_labels_without_end() {
        let mut metrics = Metrics::default();
        assert_eq!(metrics.name("gic"), "gic");
        assert_eq!(metrics.name("a\nb"), "other");
        assert_eq!(metrics.name(&"x".repeat(NAME + 1)), "other");
        for index in 0..2 * NAMES {
            metrics.name(&format!("made-up-{index}"));
        }
        assert_eq!(metrics.name("late"), "other");
        assert_eq!(metrics.name("gic"), "gic");
        assert_eq!(metrics.names.len(), NAMES);
    }

    #[test]
    fn what_the_recorder_did_adds_up() {
        let metrics = Metrics::default();
        let totals = |events| Totals {
            events,
            lost: 1,
            cpu_ns: 1_500_000_000,
        };
        metrics.recorded(Totals::default(), totals(5));
        metrics.recorded(totals(5), totals(12));
        let text = metrics.text();
        for line in [
            "blackout_events_total 12",
            "blackout_lost_events_total 1",
            "blackout_recorder_cpu_seconds_total 1.5",
            "# EOF",
        ] {
            assert!(text.lines().any(|one| one == line), "no {line} in {text}");
        }
    }
}
