//! What the interrupt controller's tables cost, as the monitor saw it and as the kernel did.

use std::collections::HashMap;

use super::kvm;
use super::party::{Party, Placed, Side};
use super::spans::Span;
use crate::recording::{FdKind, Ioctl};

/// One save or restore of tables.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ItsOp {
    /// Where.
    pub side: Side,
    /// The span's name: `its_save_tables`, `gic_save_pending_tables` and their restore twins.
    pub op: &'static str,
    /// When the monitor's span began, ns.
    pub start_ns: i64,
    /// The monitor's view, ns.
    pub duration_ns: u64,
    /// The kernel's view, ns: the ioctl that did it, or the function inside if only that was seen.
    pub ioctl_ns: Option<u64>,
    /// The kernel's own function inside the ioctl, ns.
    pub function_ns: Option<u64>,
    /// Devices mapped by the ITS.
    pub devices: Option<u64>,
    /// Events mapped by the ITS.
    pub events: Option<u64>,
    /// The span's result.
    pub rc: Option<i64>,
}

impl ItsOp {
    /// The kernel's view: the ioctl, or the function inside it where no ioctl was seen, ns.
    pub fn kernel_ns(&self) -> Option<u64> {
        self.ioctl_ns.or(self.function_ns)
    }
}

/// A row of the probe table that saves or restores tables, and what the kernel does for it.
struct Kind {
    op: &'static str,
    fd: FdKind,
    group: u32,
    attr: fn(u64) -> bool,
    function: Option<&'static str>,
}

const KINDS: &[Kind] = &[
    Kind {
        op: "its_save_tables",
        fd: FdKind::Its,
        group: kvm::GRP_CTRL,
        attr: |attr| attr == 1,
        function: Some("vgic_its_save_tables_v0"),
    },
    Kind {
        op: "its_restore_tables",
        fd: FdKind::Its,
        group: kvm::GRP_CTRL,
        attr: |attr| attr == 2,
        function: Some("vgic_its_restore_tables_v0"),
    },
    Kind {
        op: "gic_save_pending_tables",
        fd: FdKind::Gic,
        group: kvm::GRP_CTRL,
        attr: |attr| attr == 3,
        function: Some("vgic_v3_save_pending_tables"),
    },
    Kind {
        op: "gic_restore_pending_tables",
        fd: FdKind::Gic,
        group: kvm::GRP_REDIST_REGS,
        // One write of GICR_CTLR (offset 0) for each redistributor; the upper half names the vCPU.
        attr: |attr| attr & 0xffff_ffff == 0,
        function: None,
    },
];

/// The table operations of one side, in order.
pub fn operations(party: &Party<'_>) -> Vec<ItsOp> {
    let mapped = mapped(party);
    let mut operations: Vec<_> = party
        .spans
        .iter()
        .filter_map(|span| Some(operation(party, kind(span)?, span, &mapped)))
        .collect();
    operations.sort_by_key(|operation| operation.start_ns);
    operations
}

/// What `span` asked the kernel for, if it is a table operation.
pub fn kernel_view<'a>(
    party: &Party<'a>,
    span: &Placed<'a, Span>,
) -> impl Iterator<Item = &'a Ioctl> {
    let kind = kind(span);
    let thread = party
        .process
        .threads
        .get(&span.tid)
        .filter(|_| kind.is_some());
    let (start_ns, end_ns) = (span.what.start_ns, span.what.end_ns);
    let ioctls = thread
        .into_iter()
        .flat_map(move |thread| thread.ioctls_within(start_ns, end_ns));
    ioctls.filter(move |ioctl| {
        kind.is_some_and(|kind| kvm::sets_attr(ioctl, kind.fd, kind.group).is_some_and(kind.attr))
    })
}

fn kind(span: &Placed<'_, Span>) -> Option<&'static Kind> {
    KINDS.iter().find(|kind| kind.op == span.what.name())
}

fn operation<'a>(
    party: &Party<'a>,
    kind: &Kind,
    span: &Placed<'a, Span>,
    mapped: &HashMap<u64, Mapped>,
) -> ItsOp {
    let ioctls = kernel_view(party, span);
    let thread = party.process.threads.get(&span.tid);
    let (start_ns, end_ns) = (span.what.start_ns, span.what.end_ns);
    let functions = thread
        .into_iter()
        .flat_map(|thread| thread.functions_within(start_ns, end_ns))
        .filter(|function| Some(function.function.as_str()) == kind.function);
    let its = span.what.begin.u64("its");
    let (devices, events) = its
        .and_then(|its| mapped.get(&its))
        .copied()
        .unwrap_or_default();
    ItsOp {
        side: party.side,
        op: kind.op,
        start_ns: span.start_ns,
        duration_ns: span.duration_ns(),
        ioctl_ns: sum(ioctls.map(|ioctl| ioctl.exit_ns.saturating_sub(ioctl.enter_ns))),
        function_ns: sum(functions.map(|one| one.exit_ns.saturating_sub(one.enter_ns))),
        devices,
        events,
        rc: span.what.rc(),
    }
}

/// Devices and events that an ITS maps.
type Mapped = (Option<u64>, Option<u64>);

/// What each ITS maps of which an `its_mapped` probe of this side said so. Monitors count outside of
/// the downtime, so the probe is not inside the span: it names the ITS.
fn mapped(party: &Party<'_>) -> HashMap<u64, Mapped> {
    let mut mapped = HashMap::new();
    for point in party.points_of("its_mapped") {
        if let Some(its) = point.what.args.u64("its") {
            let count = |name| point.what.args.u64(name);
            mapped
                .entry(its)
                .or_insert((count("devices"), count("events")));
        }
    }
    mapped
}

/// `None` for nothing at all.
fn sum(durations: impl Iterator<Item = u64>) -> Option<u64> {
    durations.fold(None, |sum, duration| {
        Some(sum.unwrap_or(0u64).saturating_add(duration))
    })
}
