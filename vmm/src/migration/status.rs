//! What `query-migrate` answers: QEMU's fields where QEMU has them, and the breakdown of the
//! blackout under one key of our own, `blackout`.

use std::error::Error as StdError;
use std::ffi::CStr;

use serde::Serialize;

use super::clock::Estimate;
use super::predict::Prediction;
use super::stream::ram::Tally;
use crate::memory::PAGE_SIZE;
use crate::spanlog::SpanRecord;

/// The longest error text; a peer's reason is part of it.
const ERROR_MAX: usize = 1024;

/// Where a migration stands. QEMU's `MigrationStatus`, and `unknown`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum MigrationStatus {
    /// Connecting, or waiting for the source.
    Setup,
    /// RAM is sent or loaded while the guest runs at the source.
    Active,
    /// The guest is stopped, and the source waits for `migrate-continue`.
    PreSwitchover,
    /// The guest is stopped; the rest is sent or loaded.
    Device,
    /// The guest is the destination's.
    Completed,
    /// It failed; the guest is the source's.
    Failed,
    /// It was cancelled and is being wound up.
    Cancelling,
    /// It was cancelled; the guest is the source's.
    Cancelled,
    /// The connection was lost after the source had committed. The destination may run the guest or
    /// may not have heard of it. The source stays paused: once it is certain that the destination
    /// does not run the guest, a person can let it go on here with `cont`.
    Unknown,
}

impl MigrationStatus {
    /// All there are.
    pub const ALL: [MigrationStatus; 9] = {
        use MigrationStatus::*;
        [
            Setup,
            Active,
            PreSwitchover,
            Device,
            Completed,
            Failed,
            Cancelling,
            Cancelled,
            Unknown,
        ]
    };

    /// QEMU's name of it.
    pub fn name(self) -> &'static str {
        self.c_name().to_str().unwrap_or_default()
    }

    /// The same name for a probe.
    pub fn c_name(self) -> &'static CStr {
        match self {
            MigrationStatus::Setup => c"setup",
            MigrationStatus::Active => c"active",
            MigrationStatus::PreSwitchover => c"pre-switchover",
            MigrationStatus::Device => c"device",
            MigrationStatus::Completed => c"completed",
            MigrationStatus::Failed => c"failed",
            MigrationStatus::Cancelling => c"cancelling",
            MigrationStatus::Cancelled => c"cancelled",
            MigrationStatus::Unknown => c"unknown",
        }
    }

    /// Whether the migration is over.
    pub fn is_final(self) -> bool {
        use MigrationStatus::{Cancelled, Completed, Failed, Unknown};
        matches!(self, Completed | Failed | Cancelled | Unknown)
    }
}

/// The answer to `query-migrate`. All fields are absent before the first migration, as in QEMU.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct QueryMigrate {
    /// Where it stands.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub status: Option<MigrationStatus>,
    /// Since its start, or how long it took, ms.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub total_time: Option<u64>,
    /// From its start to the first page, ms.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub setup_time: Option<u64>,
    /// The downtime that stopping now would cost, everything counted, ms.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub expected_downtime: Option<u64>,
    /// By how much the guest is slowed down so that it converges, per cent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cpu_throttle_percentage: Option<u8>,
    /// The downtime, ms, rounded up; `blackout.downtime-ns` is exact.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub downtime: Option<u64>,
    /// RAM, on the source.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ram: Option<Ram>,
    /// Where a destination listens, for a port that the kernel chose.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub socket_address: Option<Vec<SocketAddress>>,
    /// Why it failed, the whole chain of causes in one line.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error_desc: Option<String>,
    /// The breakdown, once the migration is over, however it ended.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub blackout: Option<Blackout>,
}

/// QEMU's `MigrationStats`.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Ram {
    /// Bytes of RAM that went over the connection and that the destination has loaded.
    pub transferred: u64,
    /// Bytes that are still to be sent.
    pub remaining: u64,
    /// Bytes of guest RAM.
    pub total: u64,
    /// Zero pages.
    pub duplicate: u64,
    /// Pages sent as data.
    pub normal: u64,
    /// The same in bytes.
    pub normal_bytes: u64,
    /// Pages that the guest dirtied a second, over the last round.
    pub dirty_pages_rate: u64,
    /// The rate at which the destination loads, Mbit/s, over the last round.
    pub mbps: f64,
    /// Pages that were sent a second, over the last round.
    pub pages_per_second: u64,
    /// Times that the dirty log was read.
    pub dirty_sync_count: u64,
    /// Bytes of a page.
    pub page_size: u64,
    /// Bytes sent while the guest ran.
    pub precopy_bytes: u64,
    /// Bytes sent while the guest was stopped.
    pub downtime_bytes: u64,
    /// 0, as all that follows but the next: QEMU's clients expect them, and there is no postcopy and no
    /// zero-copy here.
    pub postcopy_bytes: u64,
    /// Bytes that went over further connections.
    pub multifd_bytes: u64,
    /// Pages that a destination asked for.
    pub postcopy_requests: u64,
    /// Times that the kernel copied what it was not to.
    pub dirty_sync_missed_zero_copy: u64,
}

impl Ram {
    /// The figures before the first page.
    pub(super) fn new(total: u64) -> Self {
        Ram {
            total,
            remaining: total,
            page_size: PAGE_SIZE,
            ..Ram::default()
        }
    }

    /// `tally` more was sent; the destination has loaded `loaded` bytes so far.
    pub(super) fn sent(&mut self, tally: Tally, loaded: u64) {
        self.transferred = loaded;
        self.remaining = self.remaining.saturating_sub(tally.pages * PAGE_SIZE);
        self.duplicate += tally.zero;
        self.normal += tally.pages - tally.zero;
        self.normal_bytes = self.normal * PAGE_SIZE;
    }
}

/// QEMU's `SocketAddress`, of the two kinds there are here.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "type", rename_all = "kebab-case")]
pub enum SocketAddress {
    /// TCP.
    Inet {
        /// The address.
        host: String,
        /// The port, a string as in QEMU.
        port: String,
    },
    /// A unix socket.
    Unix {
        /// Its path.
        path: String,
    },
}

/// The breakdown of one migration: the key `blackout` of `query-migrate`, kept after completion
/// and after failure until the next migration.
///
/// Times are ns, relative to `start-ns`, on the clock of the side that answers. The source maps the
/// destination's times by `clock`; they are off by up to its `error-ns`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Blackout {
    /// The migration's id, the same on both sides; 0 when they never agreed on one.
    pub id: u64,
    /// Which side answers.
    pub side: Side,
    /// Where it went, or where this side listened.
    pub uri: String,
    /// `normal` or `cpr-transfer`.
    pub mode: &'static str,
    /// When the migration started on this side, ns of `CLOCK_MONOTONIC`.
    pub start_ns: u64,
    /// From the entry of `migration_stop_vm` on the source to the first `KVM_RUN` on the
    /// destination. Absent on the destination, for a guest that was paused, and when it never ran
    /// there.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub downtime_ns: Option<u64>,
    /// Where the downtime starts.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub downtime_start_ns: Option<i64>,
    /// Where it ends.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub first_run_ns: Option<i64>,
    /// The downtime as it was expected right before the stop, part by part beside what came. On a
    /// source that got that far.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prediction: Option<Prediction>,
    /// The other side's clock, on the source.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub clock: Option<ClockReport>,
    /// The spans of both sides, the source's first, each side's in the order in which they began.
    pub spans: Vec<Span>,
}

/// How the destination's clock stands to the source's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct ClockReport {
    /// Destination minus source.
    pub offset_ns: i64,
    /// The offset is off by no more than this.
    pub error_ns: u64,
    /// Two-way readings taken.
    pub samples: u64,
}

impl ClockReport {
    pub(super) fn new(estimate: Estimate, samples: u64) -> Self {
        ClockReport {
            offset_ns: estimate.offset_ns,
            error_ns: estimate.error_ns,
            samples,
        }
    }
}

/// The side of a migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Side {
    /// It had the guest.
    Source,
    /// It gets the guest.
    Destination,
}

/// One span of the breakdown.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Span {
    /// Where it ran.
    pub side: Side,
    /// The hop of the stop path; 8 is what follows the stop.
    pub hop: u8,
    /// The row of the probe table.
    pub name: String,
    /// A handler's or a device's name, a run state, an address.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub detail: Option<String>,
    /// When it began.
    pub start_ns: i64,
    /// How long it took.
    pub duration_ns: u64,
    /// How many spans of its side enclose it.
    pub depth: u8,
    /// 0, or a negative errno.
    pub rc: i64,
}

impl Span {
    /// A recorded span; `start_ns` is what its begin is on the answer's time axis.
    pub(super) fn new(side: Side, record: SpanRecord, start_ns: i64) -> Self {
        let SpanRecord {
            name,
            hop,
            detail,
            depth,
            duration_ns,
            rc,
            ..
        } = record;
        Span {
            side,
            hop,
            name: name.into_owned(),
            detail,
            start_ns,
            duration_ns,
            depth,
            rc,
        }
    }
}

/// An error and its causes in one line. Part of it may be a peer's words: control characters are
/// replaced, and it is cut at a sane length.
pub(super) fn describe(error: &dyn StdError) -> String {
    let chain = std::iter::successors(Some(error), |&e| e.source());
    let text = chain
        .map(ToString::to_string)
        .collect::<Vec<_>>()
        .join(": ");
    let clean = text.chars().map(|c| if c.is_control() { ' ' } else { c });
    clean.take(ERROR_MAX).collect()
}

#[cfg(test)]
mod tests {
    use std::io;

    use serde_json::json;

    use super::*;

    #[test]
    fn nothing_has_happened_is_an_empty_answer() {
        assert_eq!(
            serde_json::to_value(QueryMigrate::default()).unwrap(),
            json!({})
        );
    }

    #[test]
    fn names_are_those_of_qemu() {
        let answer = QueryMigrate {
            status: Some(MigrationStatus::Completed),
            total_time: Some(12),
            ram: Some(Ram {
                normal_bytes: 4096,
                ..Ram::default()
            }),
            socket_address: Some(vec![SocketAddress::Inet {
                host: "::1".into(),
                port: "1".into(),
            }]),
            ..QueryMigrate::default()
        };
        let json = serde_json::to_value(answer).unwrap();
        assert_eq!(json["status"], "completed");
        assert_eq!(json["total-time"], 12);
        assert_eq!(json["ram"]["normal-bytes"], 4096);
        let address = json!([{"type": "inet", "host": "::1", "port": "1"}]);
        assert_eq!(json["socket-address"], address);
        assert_eq!(json.get("error-desc"), None);
    }

    #[test]
    fn a_status_has_one_name() {
        use MigrationStatus::*;
        for status in [
            Setup, Active, Device, Completed, Failed, Cancelling, Cancelled, Unknown,
        ] {
            assert_eq!(serde_json::to_value(status).unwrap(), status.name());
        }
    }

    #[derive(Debug, thiserror::Error)]
    #[error("connecting to {0}")]
    struct Outer(&'static str, #[source] io::Error);

    #[test]
    fn an_error_is_described_with_its_causes_in_one_line() {
        let error = Outer("a\nb", io::Error::from_raw_os_error(libc::ECONNREFUSED));
        assert_eq!(
            describe(&error),
            "connecting to a b: Connection refused (os error 111)"
        );
        let long = Outer("x", io::Error::other("y".repeat(5000)));
        assert_eq!(describe(&long).chars().count(), ERROR_MAX);
    }
}
