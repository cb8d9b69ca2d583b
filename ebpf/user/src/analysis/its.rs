//! What the interrupt controller's tables cost, as the monitor saw it and as the kernel did.

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
    let mut operations: Vec<_> = KINDS
        .iter()
        .flat_map(|kind| {
            party
                .spans_of(kind.op)
                .map(|span| operation(party, kind, span))
        })
        .collect();
    operations.sort_by_key(|operation| operation.start_ns);
    operations
}

/// Whether `ioctl` is what `span` asked the kernel for.
pub fn is_kernel_view(span: &Placed<'_, Span>, ioctl: &Placed<'_, Ioctl>) -> bool {
    KINDS
        .iter()
        .any(|kind| kind.op == span.what.name() && matches(kind, span, ioctl))
}

fn matches(kind: &Kind, span: &Placed<'_, Span>, ioctl: &Placed<'_, Ioctl>) -> bool {
    span.holds(ioctl) && kvm::sets_attr(ioctl.what, kind.fd, kind.group).is_some_and(kind.attr)
}

fn operation(party: &Party<'_>, kind: &Kind, span: &Placed<'_, Span>) -> ItsOp {
    let ioctls = party
        .ioctls
        .iter()
        .filter(|ioctl| matches(kind, span, ioctl));
    let functions = party.functions.iter().filter(|function| {
        span.holds(function) && Some(function.what.function.as_str()) == kind.function
    });
    let (devices, events) = mapped(party, span);
    ItsOp {
        side: party.side,
        op: kind.op,
        start_ns: span.start_ns,
        duration_ns: span.duration_ns(),
        ioctl_ns: sum(ioctls.map(Placed::duration_ns)),
        function_ns: sum(functions.map(Placed::duration_ns)),
        devices,
        events,
        rc: span.what.rc(),
    }
}

/// What the ITS of `span` maps, where a `its_mapped` probe of this side said so. Monitors count
/// outside of the downtime, so the probe is not inside the span: it names the ITS.
fn mapped(party: &Party<'_>, span: &Placed<'_, Span>) -> (Option<u64>, Option<u64>) {
    let Some(its) = span.what.begin.u64("its") else {
        return (None, None);
    };
    let said = party
        .points_of("its_mapped")
        .find(|point| point.what.args.u64("its") == Some(its));
    let count = |name| said.and_then(|point| point.what.args.u64(name));
    (count("devices"), count("events"))
}

/// `None` for nothing at all.
fn sum(durations: impl Iterator<Item = u64>) -> Option<u64> {
    durations.fold(None, |sum, duration| {
        Some(sum.unwrap_or(0u64).saturating_add(duration))
    })
}
