//! Probes of other monitors that the tool understands, by the names and the arguments that they have
//! in their sources. Others are recorded too, if they are asked for, with numbers for arguments.
//!
//! QEMU's are those of its trace events, `migration/trace-events` and `system/trace-events` as of 10.2;
//! a build with the trace backend `dtrace` has them, under the provider `qemu`. `vmstate_downtime_*` came
//! with 8.2.

use blackout_abi::ArgKind::{self, I64, Str, U64};
use blackout_abi::{Edge, Nature};

/// A probe of another monitor.
#[derive(Debug)]
pub struct Probe {
    /// The note's provider.
    pub provider: &'static str,
    /// The note's name.
    pub name: &'static str,
    /// Its arguments, under names that mean the same as in the probe table.
    pub args: &'static [(&'static str, ArgKind)],
    /// What it tells.
    pub tells: Tells,
}

/// What a probe tells of time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tells {
    /// An edge of the span of that name, or a moment.
    Edge(&'static str, Edge),
    /// That the span of that name has ended, which took as many microseconds as the argument says.
    Took(&'static str, &'static str),
    /// That a stage has ended, whose name the argument is; it began where the last one ended on the
    /// same thread. The first only begins.
    Stage(&'static str),
}

impl Tells {
    /// What the time of the span is spent on. A stage is only what is inside it.
    pub fn nature(self) -> Nature {
        match self {
            Self::Stage(_) => Nature::Layer,
            Self::Edge(..) | Self::Took(..) => Nature::Work,
        }
    }
}

/// Where QEMU's downtime begins: in its `migration_stop_vm`, as by the probe table.
pub const STOP: (&str, &str) = ("vmstate_downtime_checkpoint", "src-downtime-start");

const QEMU: &str = "qemu";

/// Every probe that is understood, and recorded unless other ones are asked for.
pub const PROBES: &[Probe] = &[
    Probe {
        provider: QEMU,
        name: "migrate_set_state",
        args: &[("status", Str)],
        tells: Tells::Edge("migrate_set_state", Edge::Point),
    },
    Probe {
        provider: QEMU,
        name: "vm_state_notify",
        args: &[("running", I64), ("reason", I64), ("state", Str)],
        tells: Tells::Edge("vm_state_notify", Edge::Point),
    },
    Probe {
        provider: QEMU,
        name: "vm_stop_flush_all",
        args: &[("rc", I64)],
        tells: Tells::Edge("vm_stop_flush_all", Edge::Point),
    },
    Probe {
        provider: QEMU,
        name: "migration_completion_vm_stop",
        args: &[("rc", I64)],
        tells: Tells::Edge("migration_completion_vm_stop", Edge::Point),
    },
    Probe {
        provider: QEMU,
        name: "vmstate_downtime_checkpoint",
        args: &[("checkpoint", Str)],
        tells: Tells::Stage("checkpoint"),
    },
    Probe {
        provider: QEMU,
        name: "vmstate_downtime_save",
        args: &[
            ("phase", Str),
            ("name", Str),
            ("instance", U64),
            ("us", I64),
        ],
        tells: Tells::Took("vmstate_save", "us"),
    },
    Probe {
        provider: QEMU,
        name: "vmstate_downtime_load",
        args: &[
            ("phase", Str),
            ("name", Str),
            ("instance", U64),
            ("us", I64),
        ],
        tells: Tells::Took("vmstate_load", "us"),
    },
    Probe {
        provider: QEMU,
        name: "savevm_section_start",
        args: &[("name", Str), ("section", U64)],
        tells: Tells::Edge("savevm_section", Edge::Begin),
    },
    Probe {
        provider: QEMU,
        name: "savevm_section_end",
        args: &[("id", Str), ("section", U64), ("rc", I64)],
        tells: Tells::Edge("savevm_section", Edge::End),
    },
    Probe {
        provider: QEMU,
        name: "process_incoming_migration_co_end",
        args: &[("rc", I64), ("postcopy", I64)],
        tells: Tells::Edge("process_incoming_migration_co_end", Edge::Point),
    },
];

/// The probe of that name with that many arguments; another version's may have others.
pub fn probe(provider: &str, name: &str, args: usize) -> Option<&'static Probe> {
    PROBES
        .iter()
        .find(|probe| probe.provider == provider && probe.name == name && probe.args.len() == args)
}
