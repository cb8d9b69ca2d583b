//! `blackout report --json`: the schema `blackout.report/1`.
//!
//! Times are nanoseconds since the migration's start, on the source's clock. What was not seen is
//! `null`. Members may be added within version 1; none changes its meaning or goes away.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::analysis::clock::Basis;
use crate::analysis::party::{Party, Side};
use crate::analysis::{View, describe, kvm, migration};
use crate::recording::{DeviceAttr, FdKind};

/// The name of the schema and its version.
pub const SCHEMA: &str = "blackout.report/1";

/// The whole report.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Report {
    /// [`SCHEMA`].
    pub schema: String,
    /// The migrations in order of their starts.
    pub migrations: Vec<Migration>,
}

/// One migration.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Migration {
    /// `probes`, or `kernel` when the monitor has none that tell of a migration's both ends, so that
    /// KVM's ioctls did.
    pub view: View,
    /// The id that both sides know it by.
    pub id: Option<u64>,
    /// `normal`, or the name of another mode; empty if the source was not recorded.
    pub mode: String,
    /// `completed`, `failed`, `cancelled` or `unfinished`.
    pub status: String,
    /// What failed, where and with which errno.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// From the entry of `migration_stop_vm`, or, in the view `kernel` and unless a probe of the
    /// monitor's own tells of that entry, from the first vCPU's last return from KVM_RUN, to the first
    /// KVM_RUN on the destination.
    pub downtime_ns: Option<u64>,
    /// When the downtime began.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub downtime_start_ns: Option<i64>,
    /// From the last vCPU's last exit from guest code to the first entry.
    pub blackout_ns: Option<u64>,
    /// The share of the downtime that spans which do work and messages under way cover, 0 to 1.
    pub explained: Option<f64>,
    /// The bound of the error with which the two sides' clocks were laid over each other; 0 on one
    /// host.
    pub clock_error_ns: Option<u64>,
    /// How the two sides' clocks relate, if they are two.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub clock: Option<Clock>,
    /// Events that the recorder lost.
    pub lost_events: u64,
    /// When it lost them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub losses: Vec<Loss>,
    /// The hosts that were recorded: the source's, then the destination's if that is another one.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub hosts: Vec<Host>,
    /// The spans: source, then destination, then the wire; on a side by thread, and there a parent
    /// before its children.
    pub spans: Vec<Span>,
    /// The KVM ioctls, by side, in order.
    pub ioctls: Vec<Ioctl>,
    /// Saves and restores of the interrupt controller's tables, by side, in order.
    pub its: Vec<Its>,
    /// What of the downtime nothing explains, in order.
    pub gaps: Vec<Gap>,
    /// Each vCPU's own blackout.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub vcpus: Vec<Vcpu>,
    /// What puts the figures in doubt, a sentence each.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub doubts: Vec<String>,
}

/// How the destination's clock relates to the source's.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Clock {
    /// What the destination's `CLOCK_MONOTONIC` shows more.
    pub offset_ns: i64,
    /// Where that is from.
    pub basis: Basis,
}

/// A host, and how it was recorded.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
pub struct Host {
    /// Its name.
    pub hostname: String,
    /// Its kernel's release.
    pub kernel: String,
    /// Its architecture.
    pub arch: String,
    /// How the recorder was attached.
    pub backends: Vec<String>,
}

/// One span.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Span {
    /// Where; `wire` for a message that was under way during the downtime.
    pub side: Side,
    /// The hop of the stop path; 0 for a foreign probe.
    pub hop: u8,
    /// The probe table's row; `channel` for a message.
    pub name: String,
    /// The name with what tells this span from others of its name in every migration, such as
    /// `vm_state_handler gic main`; empty if that is nothing.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub label: String,
    /// What tells it from others of its name.
    pub detail: String,
    /// When it began.
    pub start_ns: i64,
    /// How long it took.
    pub duration_ns: u64,
    /// How many spans are around it on its thread.
    pub depth: u64,
    /// Its result: 0 or a negative errno; `null` if it has none or did not end.
    pub rc: Option<i64>,
    /// Whether events were lost while it ran: what was inside it may be missing.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub lossy: bool,
}

/// One KVM ioctl.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Ioctl {
    /// Where.
    pub side: Side,
    /// Its name, such as `KVM_SET_DEVICE_ATTR`.
    pub name: String,
    /// What its file descriptor stands for.
    pub fd_kind: FdKind,
    /// `kvm_device_attr.group`, of an ioctl that takes one.
    pub group: Option<u32>,
    /// `kvm_device_attr.attr`.
    pub attr: Option<u64>,
    /// When it began.
    pub start_ns: i64,
    /// How long it took.
    pub duration_ns: u64,
    /// What it returned.
    pub rc: i64,
    /// Whether events were lost while it ran.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub lossy: bool,
}

/// Events that found no room.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Loss {
    /// Whose recorder lost them; the source's, where one recorded both sides.
    pub side: Side,
    /// When all before it was known to have arrived.
    pub start_ns: i64,
    /// How long after that the loss was noticed.
    pub duration_ns: u64,
    /// How many.
    pub events: u64,
}

impl Ioctl {
    /// What the device attribute that it takes is called, if it takes one that has a name.
    pub fn attr_name(&self) -> Option<&'static str> {
        let (group, attr) = (self.group?, self.attr?);
        kvm::attr_name(self.fd_kind, DeviceAttr { group, attr })
    }
}

/// One save or restore of tables.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Its {
    /// Where.
    pub side: Side,
    /// The span's name.
    pub op: String,
    /// The monitor's view.
    pub duration_ns: u64,
    /// The kernel's view of the same ioctl.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kernel_ns: Option<u64>,
    /// Devices that the ITS maps.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub devices: Option<u64>,
    /// Events that the ITS maps.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub events: Option<u64>,
}

/// A part of the downtime that nothing explains.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Gap {
    /// When it begins.
    pub start_ns: i64,
    /// How long it is.
    pub duration_ns: u64,
    /// What ended where it begins.
    pub after: String,
    /// What begins where it ends.
    #[serde(default)]
    pub before: String,
    /// The innermost span around it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub within: Option<String>,
}

/// One vCPU's blackout.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Vcpu {
    /// Its index.
    pub index: u64,
    /// From its last exit on the source to its first entry on the destination.
    pub blackout_ns: u64,
    /// When that exit was.
    #[serde(default)]
    pub start_ns: i64,
}

impl Report {
    /// The report on `migrations`.
    pub fn new(migrations: &[migration::Migration<'_>]) -> Self {
        let migrations = migrations.iter().map(Migration::new).collect();
        Self {
            schema: SCHEMA.to_owned(),
            migrations,
        }
    }
}

impl Migration {
    fn new(from: &migration::Migration<'_>) -> Self {
        let downtime = &from.downtime;
        let length =
            |(start, end): (i64, i64)| u64::try_from(end.saturating_sub(start)).unwrap_or(0);
        let its = from.its.iter().map(|operation| Its {
            side: operation.side,
            op: operation.op.to_owned(),
            duration_ns: operation.duration_ns,
            kernel_ns: operation.kernel_ns(),
            devices: operation.devices,
            events: operation.events,
        });
        let gaps = downtime.gaps.iter().map(|gap| Gap {
            start_ns: gap.start_ns,
            duration_ns: gap.duration_ns(),
            after: gap.after.clone(),
            before: gap.before.clone(),
            within: gap.within.clone(),
        });
        let losses = from.lost.iter().map(|loss| Loss {
            side: loss.side,
            start_ns: loss.start_ns,
            duration_ns: length((loss.start_ns, loss.end_ns)),
            events: loss.count,
        });
        let vcpus = downtime.vcpus.iter().map(|vcpu| Vcpu {
            index: vcpu.index,
            blackout_ns: length((vcpu.start_ns, vcpu.end_ns)),
            start_ns: vcpu.start_ns,
        });
        Self {
            view: from.view,
            id: from.id,
            mode: from.mode.clone(),
            status: from.status.clone(),
            error: from.error.clone(),
            downtime_ns: downtime.bounds.map(|bounds| bounds.duration_ns()),
            downtime_start_ns: downtime.bounds.map(|bounds| bounds.start_ns),
            blackout_ns: downtime.blackout.map(length),
            // Six digits are a millionth of the downtime; more would be noise in a diff.
            explained: downtime.explained.map(|share| (share * 1e6).round() / 1e6),
            clock_error_ns: from.clock.error_ns,
            clock: (from.clock.basis != Basis::OneHost).then_some(Clock {
                offset_ns: from.clock.offset_ns,
                basis: from.clock.basis,
            }),
            lost_events: from.lost_events(),
            losses: losses.collect(),
            hosts: hosts(from),
            spans: from
                .parties()
                .flat_map(spans)
                .chain(messages(from))
                .collect(),
            ioctls: from.parties().flat_map(ioctls).collect(),
            its: its.collect(),
            gaps: gaps.collect(),
            vcpus: vcpus.collect(),
            doubts: from.doubts(),
        }
    }
}

fn hosts(from: &migration::Migration<'_>) -> Vec<Host> {
    let mut hosts = Vec::new();
    for party in from.parties() {
        let header = &party.recording.header;
        let host = Host {
            hostname: header.hostname.clone(),
            kernel: header.kernel.clone(),
            arch: header.arch.clone(),
            backends: header.backends.clone(),
        };
        if !hosts.contains(&host) {
            hosts.push(host);
        }
    }
    hosts
}

fn spans(party: &Party<'_>) -> impl Iterator<Item = Span> {
    party.spans.iter().map(|span| Span {
        side: party.side,
        hop: span.what.meaning.hop,
        name: span.what.name().to_owned(),
        label: describe::label(span.what),
        detail: describe::detail(span.what),
        start_ns: span.start_ns,
        duration_ns: span.duration_ns(),
        depth: span.what.depth as u64,
        rc: span.what.rc(),
        lossy: party.lost_during(span.what.start_ns, span.what.end_ns),
    })
}

/// The messages that were under way during the downtime.
fn messages(from: &migration::Migration<'_>) -> impl Iterator<Item = Span> {
    let bounds = from.downtime.bounds;
    from.wire
        .iter()
        .filter(move |segment| {
            bounds.is_some_and(|bounds| {
                segment.sent_ns < bounds.end_ns && segment.received_ns > bounds.start_ns
            })
        })
        .map(|segment| Span {
            side: Side::Wire,
            hop: 8,
            name: "channel".to_owned(),
            label: String::new(),
            detail: segment.describe(),
            start_ns: segment.sent_ns,
            duration_ns: segment.duration_ns(),
            depth: 0,
            rc: None,
            lossy: false,
        })
}

fn ioctls(party: &Party<'_>) -> impl Iterator<Item = Ioctl> {
    party.ioctls.iter().map(|ioctl| Ioctl {
        side: party.side,
        name: kvm::ioctl_name(ioctl.what),
        fd_kind: ioctl.what.fd_kind,
        group: ioctl.what.attr.map(|attr| attr.group),
        attr: ioctl.what.attr.map(|attr| attr.attr),
        start_ns: ioctl.start_ns,
        duration_ns: ioctl.duration_ns(),
        rc: ioctl.what.ret,
        lossy: party.lost_during(ioctl.what.enter_ns, ioctl.what.exit_ns),
    })
}
