//! What is shown: sums over the last interval, and migrations as far as they have come.

use std::collections::{BTreeMap, HashMap};

use super::migration::Migration;
use crate::analysis::{describe, kvm};
use crate::recording::{Frame, Header, Ioctl, ProbeDef, VcpuEdges};

/// A migration that is over stays on the screen for this long.
const KEPT_NS: u64 = 60_000_000_000;

/// A monitor that KVM saw reading what its guest has written migrates, for all that is known, for this
/// long.
const SIGN_NS: u64 = 3_000_000_000;

/// Everything that is shown.
#[derive(Debug, Default)]
pub struct Model {
    /// Where the frames are from.
    pub header: Header,
    /// By process.
    pub machines: BTreeMap<u32, Machine>,
    /// The ioctls, by what they are called.
    pub ioctls: BTreeMap<String, Calls>,
    /// In the order in which they began.
    pub migrations: Vec<Migration>,
    /// Events that were lost so far.
    pub lost: u64,
    /// What watching costs, where it is known.
    pub own: Own,
    /// The latest moment that was heard of.
    pub now_ns: u64,
    interval_start_ns: u64,
    probes: HashMap<u32, ProbeDef>,
}

/// What watching costs, as shares of one CPU.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Own {
    /// Events a second.
    pub events: f64,
    /// The tool's own CPU time.
    pub cpu: Option<f64>,
    /// The eBPF programs'.
    pub bpf: Option<f64>,
}

/// One process with a VM.
#[derive(Debug, Default)]
pub struct Machine {
    /// The process's name.
    pub name: String,
    /// By thread.
    pub vcpus: BTreeMap<u32, Vcpu>,
    /// Ioctls a second, but for KVM_RUN.
    pub ioctls: f64,
    /// When KVM last said what the guest has written.
    pub dirty_log_ns: Option<u64>,
    calls: u64,
}

/// One vCPU.
#[derive(Debug, Default)]
pub struct Vcpu {
    /// Its index, where known.
    pub index: Option<u32>,
    /// Returns from KVM_RUN a second.
    pub exits: f64,
    /// Whether it is out of KVM_RUN.
    pub out: bool,
    runs: u64,
    before: Option<u64>,
}

/// The calls of one ioctl.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Calls {
    /// A second, in the last interval.
    pub rate: f64,
    /// The share of the last interval that all of them took.
    pub share: f64,
    /// All so far.
    pub count: u64,
    /// What all have taken, ns.
    pub total_ns: u64,
    /// The longest, ns.
    pub max_ns: u64,
    count_before: u64,
    total_before_ns: u64,
}

impl Machine {
    /// Exits of all vCPUs a second.
    pub fn exits(&self) -> f64 {
        self.vcpus.values().map(|vcpu| vcpu.exits).sum()
    }

    /// Whether KVM saw signs of a migration not long ago.
    pub fn reads_dirty_log(&self, now_ns: u64) -> bool {
        self.dirty_log_ns
            .is_some_and(|at| now_ns.saturating_sub(at) < SIGN_NS)
    }
}

impl Model {
    /// Takes in what a frame says. Gives the moment that it is about, if any.
    pub fn see(&mut self, frame: &Frame) -> Option<u64> {
        let at = moment(frame);
        if let Some(at) = at {
            self.now_ns = self.now_ns.max(at);
            if self.interval_start_ns == 0 {
                self.interval_start_ns = at;
            }
        }
        match frame {
            Frame::Header(header) => self.header = header.clone(),
            Frame::Process(process) => {
                let machine = self.machines.entry(process.pid).or_default();
                machine.name.clone_from(&process.comm);
            }
            Frame::Probe(probe) => {
                self.probes.insert(probe.id, probe.clone());
            }
            Frame::Hit(hit) => {
                let Some(probe) = self.probes.get(&hit.probe) else {
                    return at;
                };
                if let Some(migration) = Migration::begun_by(hit, probe) {
                    self.migrations.push(migration);
                }
                let mut newest = self.migrations.iter_mut().rev();
                let own = newest.find(|one| one.pid == hit.pid && one.ended_ns.is_none());
                if let Some(own) = own {
                    own.go_on(hit, probe);
                }
            }
            Frame::Ioctl(ioctl) => self.ioctl(ioctl),
            Frame::VcpuEdges(edges) => self.edges(edges),
            Frame::Lost { count, .. } => self.lost = self.lost.saturating_add(*count),
            _ => {}
        }
        at
    }

    fn ioctl(&mut self, ioctl: &Ioctl) {
        let took = ioctl.exit_ns.saturating_sub(ioctl.enter_ns);
        let calls = self.ioctls.entry(describe::ioctl(ioctl)).or_default();
        calls.count = calls.count.saturating_add(1);
        calls.total_ns = calls.total_ns.saturating_add(took);
        calls.max_ns = calls.max_ns.max(took);
        let machine = self.machines.entry(ioctl.pid).or_default();
        machine.calls = machine.calls.saturating_add(1);
        if kvm::reads_dirty_log(ioctl) {
            machine.dirty_log_ns = Some(ioctl.exit_ns);
        }
    }

    fn edges(&mut self, edges: &VcpuEdges) {
        let machine = self.machines.entry(edges.pid).or_default();
        let vcpu = machine.vcpus.entry(edges.tid).or_default();
        vcpu.index = edges.vcpu.or(vcpu.index);
        vcpu.runs = edges.runs;
        vcpu.out = edges.last_exit_ns >= edges.last_enter_ns;
    }

    /// Ends an interval at `now_ns`: what happens from here on belongs to the next one.
    pub fn tick(&mut self, now_ns: u64) {
        self.now_ns = self.now_ns.max(now_ns);
        let ns = now_ns.saturating_sub(self.interval_start_ns);
        if ns == 0 {
            return;
        }
        let seconds = ns as f64 / 1e9;
        for machine in self.machines.values_mut() {
            machine.ioctls = std::mem::take(&mut machine.calls) as f64 / seconds;
            for vcpu in machine.vcpus.values_mut() {
                let before = vcpu.before.replace(vcpu.runs).unwrap_or(vcpu.runs);
                vcpu.exits = vcpu.runs.saturating_sub(before) as f64 / seconds;
            }
        }
        for calls in self.ioctls.values_mut() {
            calls.rate = calls.count.saturating_sub(calls.count_before) as f64 / seconds;
            calls.share = calls.total_ns.saturating_sub(calls.total_before_ns) as f64 / ns as f64;
            (calls.count_before, calls.total_before_ns) = (calls.count, calls.total_ns);
        }
        let now = self.now_ns;
        self.migrations.retain(|one| {
            one.ended_ns
                .is_none_or(|end| now.saturating_sub(end) < KEPT_NS)
        });
        self.interval_start_ns = now_ns;
    }

    /// Drops the processes that have ended, and ends their migrations.
    pub fn forget(&mut self, is_alive: impl Fn(u32) -> bool) {
        self.machines.retain(|pid, _| is_alive(*pid));
        let now = self.now_ns;
        for migration in &mut self.migrations {
            if migration.ended_ns.is_none() && !is_alive(migration.pid) {
                "its monitor is gone".clone_into(&mut migration.phase);
                migration.ended_ns = Some(now);
            }
        }
    }
}

/// When what the frame tells was over.
fn moment(frame: &Frame) -> Option<u64> {
    match frame {
        Frame::Header(header) => Some(header.clock.monotonic_ns),
        Frame::Hit(hit) => Some(hit.ts_ns),
        Frame::Ioctl(ioctl) => Some(ioctl.exit_ns),
        Frame::VcpuGap(gap) => Some(gap.enter_ns),
        Frame::KernelFn(call) => Some(call.exit_ns),
        Frame::Lost { at_ns, .. } | Frame::End { at_ns } => Some(*at_ns),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::recording::{ArgDef, Hit, Process, Value, ValueKind};

    fn probe(id: u32, name: &str, args: &[(&str, ValueKind)]) -> Frame {
        let arg = |(name, kind): &(&str, ValueKind)| ArgDef {
            name: (*name).to_owned(),
            kind: *kind,
        };
        Frame::Probe(ProbeDef {
            id,
            provider: "vmm".into(),
            name: name.into(),
            args: args.iter().map(arg).collect(),
        })
    }

    fn hit(probe: u32, ts_ns: u64, args: Vec<Value>) -> Frame {
        let (pid, tid) = (7, 8);
        Frame::Hit(Hit {
            ts_ns,
            pid,
            tid,
            probe,
            args,
        })
    }

    #[test]
    fn a_migration_is_followed_and_its_dirty_rate_told() {
        use ValueKind::{Str, U64};
        let mut model = Model::default();
        for frame in [
            probe(0, "migrate_begin", &[("id", U64)]),
            probe(1, "ram_round_begin", &[("round", U64)]),
            probe(2, "ram_round_end", &[("pages", U64), ("bytes", U64)]),
            probe(3, "migrate_end", &[("status", Str)]),
            hit(0, 1_000, vec![Value::U64(1)]),
            hit(1, 1_000_000_000, vec![Value::U64(1)]),
            hit(
                2,
                3_000_000_000,
                vec![Value::U64(1000), Value::U64(4_096_000)],
            ),
            hit(1, 3_000_000_000, vec![Value::U64(2)]),
        ] {
            model.see(&frame);
        }
        let migration = &model.migrations[0];
        assert_eq!(
            (migration.pid, migration.phase.as_str()),
            (7, "RAM, round 2")
        );
        assert_eq!(migration.dirty_rate(), None);
        assert_eq!(migration.bandwidth(), Some(2_048_000.0));
        // 500 pages were written in the two seconds of the first round, and sent in one.
        let pages = vec![Value::U64(500), Value::U64(2_048_000)];
        model.see(&hit(2, 4_000_000_000, pages));
        let migration = &model.migrations[0];
        assert_eq!(migration.dirty_rate(), Some(1_024_000.0));
        assert_eq!(migration.predicted_ns(), Some(500_000_000));
        model.see(&hit(3, 5_000_000_000, vec![Value::Str("completed".into())]));
        assert_eq!(model.migrations[0].ended_ns, Some(5_000_000_000));
        model.tick(70_000_000_000);
        assert!(model.migrations.is_empty());
    }

    #[test]
    fn rates_are_of_the_last_interval() {
        let mut model = Model::default();
        let (pid, tid) = (7, 8);
        let edges = |runs| {
            Frame::VcpuEdges(VcpuEdges {
                pid,
                tid,
                runs,
                ..VcpuEdges::default()
            })
        };
        let call = |at| {
            Frame::Ioctl(Ioctl {
                pid,
                enter_ns: at,
                exit_ns: at + 250_000_000,
                cmd: 0xae80,
                ..Ioctl::default()
            })
        };
        let comm = "vm".to_owned();
        model.see(&Frame::Process(Process {
            pid,
            comm,
            exe: String::new(),
        }));
        model.see(&Frame::Lost {
            since_ns: 0,
            at_ns: 1_000_000_000,
            count: 3,
        });
        model.see(&edges(100));
        model.tick(2_000_000_000);
        model.see(&edges(1100));
        model.see(&call(2_100_000_000));
        model.tick(4_000_000_000);
        let machine = &model.machines[&pid];
        assert_eq!((machine.name.as_str(), machine.exits()), ("vm", 500.0));
        assert_eq!(machine.ioctls, 0.5);
        let calls = model.ioctls.values().next().unwrap();
        assert_eq!((calls.count, calls.rate, calls.share), (1, 0.5, 0.125));
        assert_eq!(model.lost, 3);
        model.tick(5_000_000_000);
        assert_eq!(model.ioctls.values().next().unwrap().rate, 0.0);
    }
}
