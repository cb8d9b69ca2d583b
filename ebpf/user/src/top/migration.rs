//! One migration as far as it has come, from one side.

use blackout_abi::probes;

use crate::recording::{Hit, ProbeDef, Value};

const PAGE: u64 = 4096;

/// A pass over the dirty pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Round {
    start_ns: u64,
    end_ns: u64,
    pages: u64,
    bytes: u64,
}

impl Round {
    fn seconds(self) -> f64 {
        self.end_ns.saturating_sub(self.start_ns) as f64 / 1e9
    }
}

/// A migration, by the probes of the monitor on one side.
#[derive(Clone, Debug, PartialEq)]
pub struct Migration {
    /// The monitor.
    pub pid: u32,
    /// Whether the guest comes or goes.
    pub incoming: bool,
    /// When it began.
    pub since_ns: u64,
    /// What it does now.
    pub phase: String,
    /// When the guest was stopped.
    pub stopped_ns: Option<u64>,
    /// The downtime, once it is known.
    pub downtime_ns: Option<u64>,
    /// When it ended.
    pub ended_ns: Option<u64>,
    begun: u64,
    last: Option<Round>,
    before: Option<Round>,
}

impl Migration {
    /// The migration that a hit begins, if it does.
    pub(super) fn begun_by(hit: &Hit, probe: &ProbeDef) -> Option<Self> {
        let incoming = match (probe.provider.as_str(), probe.name.as_str()) {
            (probes::PROVIDER, "migrate_begin") => false,
            (probes::PROVIDER, "migrate_incoming_begin") => true,
            ("qemu", "migrate_set_state") => match text(hit, probe, "status")? {
                "setup" => false,
                _ => return None,
            },
            _ => return None,
        };
        Some(Self {
            pid: hit.pid,
            incoming,
            since_ns: hit.ts_ns,
            phase: "connects".to_owned(),
            stopped_ns: None,
            downtime_ns: None,
            ended_ns: None,
            begun: 0,
            last: None,
            before: None,
        })
    }

    /// Goes on by a hit of its process.
    pub(super) fn go_on(&mut self, hit: &Hit, probe: &ProbeDef) {
        let number = |name| number(hit, probe, name);
        let named = |what: &str| match text(hit, probe, "name") {
            Some(name) => format!("{what} {name}"),
            None => what.to_owned(),
        };
        match probe.name.as_str() {
            "ram_round_begin" | "ram_load_begin" => {
                self.begun = hit.ts_ns;
                self.phase = format!("RAM, round {}", number("round").unwrap_or(0));
            }
            "ram_round_end" => {
                self.before = self.last.replace(Round {
                    start_ns: self.begun,
                    end_ns: hit.ts_ns,
                    pages: number("pages").unwrap_or(0),
                    bytes: number("bytes").unwrap_or(0),
                });
            }
            "migration_stop_vm_begin" => {
                self.stopped_ns = Some(hit.ts_ns);
                "stops the guest".clone_into(&mut self.phase);
            }
            "vm_state_handler_begin" => self.phase = named("handler"),
            "ram_final_begin" => "last RAM".clone_into(&mut self.phase),
            "device_save_begin" | "device_load_begin" => self.phase = named("device"),
            "pre_switchover_begin" => "waits for migrate-continue".clone_into(&mut self.phase),
            "switchover_begin" => "switchover".clone_into(&mut self.phase),
            "vm_start_begin" => "starts the guest".clone_into(&mut self.phase),
            "downtime_end" => self.downtime_ns = number("ns"),
            "migrate_end" | "migrate_incoming_end" => {
                self.end(hit, text(hit, probe, "status").unwrap_or("ended"));
            }
            "migrate_set_state" => match text(hit, probe, "status").unwrap_or_default() {
                state @ ("completed" | "failed" | "cancelled") => self.end(hit, state),
                state => state.clone_into(&mut self.phase),
            },
            _ => {}
        }
    }

    fn end(&mut self, hit: &Hit, status: &str) {
        status.clone_into(&mut self.phase);
        self.ended_ns = Some(hit.ts_ns);
    }

    /// What the guest writes, bytes a second: a round sends what was written during the one before.
    pub fn dirty_rate(&self) -> Option<f64> {
        let seconds = self.before?.seconds();
        let bytes = self.last?.pages.saturating_mul(PAGE) as f64;
        (seconds > 0.0).then(|| bytes / seconds)
    }

    /// How long it would take to send what the guest has written during the last round: the part of a
    /// downtime that RAM takes, if the guest were stopped now, ns.
    pub fn predicted_ns(&self) -> Option<u64> {
        let (last, before) = (self.last?, self.before?);
        // As much is written in each second, and sent at the same speed.
        let growth = last.seconds() / before.seconds();
        let ns = last.seconds() * growth * 1e9;
        ns.is_finite().then_some(ns as u64)
    }

    /// What was sent of RAM in the last round, bytes a second.
    pub fn bandwidth(&self) -> Option<f64> {
        let last = self.last?;
        (last.seconds() > 0.0).then(|| last.bytes as f64 / last.seconds())
    }
}

fn value<'a>(hit: &'a Hit, probe: &ProbeDef, name: &str) -> Option<&'a Value> {
    let index = probe.args.iter().position(|arg| arg.name == name)?;
    hit.args.get(index)
}

fn number(hit: &Hit, probe: &ProbeDef, name: &str) -> Option<u64> {
    match value(hit, probe, name)? {
        Value::U64(number) => Some(*number),
        Value::I64(number) => u64::try_from(*number).ok(),
        _ => None,
    }
}

fn text<'a>(hit: &'a Hit, probe: &ProbeDef, name: &str) -> Option<&'a str> {
    match value(hit, probe, name)? {
        Value::Str(text) => Some(text),
        _ => None,
    }
}
