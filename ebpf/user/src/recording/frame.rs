//! What a recording is made of. Times are nanoseconds of the recording host's `CLOCK_MONOTONIC`,
//! pids and tids are those of the recorder's pid namespace.

use serde::{Deserialize, Serialize};

/// One frame of a recording.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Frame {
    /// Where and how the recording was made; the first frame.
    Header(Header),
    /// A process that the recording speaks of.
    Process(Process),
    /// A thread's name.
    Thread(Thread),
    /// A probe that hits will refer to.
    Probe(ProbeDef),
    /// A probe fired.
    Hit(Hit),
    /// A KVM ioctl, entry and exit.
    Ioctl(Ioctl),
    /// A kernel function, entry and exit.
    KernelFn(KernelFn),
    /// What a vCPU's KVM_RUN calls were, from the kernel-side maps; the last one of a thread counts.
    VcpuEdges(VcpuEdges),
    /// A vCPU stayed out of KVM_RUN for long.
    VcpuGap(VcpuGap),
    /// Guest code was left and entered, as KVM's own events tell; see [`VcpuGuest`].
    VcpuGuest(VcpuGuest),
    /// Events were lost.
    Lost {
        /// Since when: until then, all that there was arrived. 0 where the recorder does not say.
        since_ns: u64,
        /// When the loss was noticed.
        at_ns: u64,
        /// How many events were lost since the last such frame.
        count: u64,
    },
    /// Another reading of the host's clocks.
    Clock(ClockAnchor),
    /// What recording cost.
    Cost(Cost),
    /// The recorder ended in good order; the last frame of its recording.
    End {
        /// When.
        at_ns: u64,
    },
    /// Another recording follows, from its header on, which was joined to this one.
    Joined(Relation),
}

/// How the clock of a recording that was joined to another one relates to that one's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Relation {
    /// What this one's `CLOCK_MONOTONIC` shows more than the first one's, ns.
    pub offset_ns: i64,
    /// How wrong that can be at most, ns, where it can be told.
    pub error_ns: Option<u64>,
    /// Where it is from.
    pub basis: Basis,
}

/// How it is known how two clocks relate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Basis {
    /// Both are one host's, or only one side was recorded: one clock.
    OneHost,
    /// The monitor read both clocks in a two-way exchange.
    Samples,
    /// By the wall clocks of both hosts, whose error is unknown.
    WallClock,
    /// By the hosts' `CLOCK_TAI`, which no leap second moves; its error is unknown too.
    Tai,
    /// Somebody measured it by other means, and said so when the recordings were joined.
    Given,
}

/// Where and how a recording was made.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Header {
    /// The version of the tool that wrote it.
    pub tool: String,
    /// `uname -r`.
    pub kernel: String,
    /// `uname -m`.
    pub arch: String,
    /// `uname -n`.
    pub hostname: String,
    /// `/proc/sys/kernel/random/boot_id`: recordings with the same one share a monotonic clock.
    pub boot_id: String,
    /// The kinds of attach in use, such as `uprobe`, `tracepoint`, `fentry`.
    pub backends: Vec<String>,
    /// The clocks at the start.
    pub clock: ClockAnchor,
}

/// The host's clocks, read at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClockAnchor {
    /// `CLOCK_MONOTONIC`, ns.
    pub monotonic_ns: u64,
    /// `CLOCK_REALTIME`, ns since the epoch.
    pub realtime_ns: u64,
    /// `CLOCK_TAI` minus `CLOCK_REALTIME`, ns; 0 where the host does not know its leap seconds.
    pub tai_offset_ns: i64,
}

/// A process that the recording speaks of.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Process {
    /// Its id.
    pub pid: u32,
    /// `/proc/PID/comm`.
    pub comm: String,
    /// Where `/proc/PID/exe` points.
    pub exe: String,
}

/// A thread's name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Thread {
    /// Its process.
    pub pid: u32,
    /// Its id.
    pub tid: u32,
    /// `/proc/PID/task/TID/comm`.
    pub name: String,
}

/// A probe that hits refer to: ours or any other provider's.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProbeDef {
    /// What hits call it. All sites of one probe in one binary share an id.
    pub id: u32,
    /// The note's provider.
    pub provider: String,
    /// The note's name.
    pub name: String,
    /// Its arguments in order; for a foreign probe named `arg0`, `arg1`, …
    pub args: Vec<ArgDef>,
}

/// One argument of a probe.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ArgDef {
    /// Its name.
    pub name: String,
    /// How its value was read.
    pub kind: ValueKind,
}

/// How an argument is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ValueKind {
    /// An unsigned number.
    U64,
    /// A signed number.
    I64,
    /// A string that the recorder copied out of the process.
    Str,
}

/// An argument's value.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Value {
    /// An unsigned number.
    U64(u64),
    /// A signed number.
    I64(i64),
    /// A string, cut to what the eBPF program copies.
    Str(String),
    /// The argument could not be read: its page was not resident, or its operand is of an
    /// unknown kind.
    Unreadable,
}

/// A probe fired.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hit {
    /// When.
    pub ts_ns: u64,
    /// The process.
    pub pid: u32,
    /// The thread.
    pub tid: u32,
    /// [`ProbeDef::id`].
    pub probe: u32,
    /// The arguments, in the order of [`ProbeDef::args`].
    pub args: Vec<Value>,
}

/// What a KVM file descriptor stands for.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema,
)]
#[serde(rename_all = "lowercase")]
pub enum FdKind {
    /// `/dev/kvm`.
    Kvm,
    /// A VM.
    Vm,
    /// A vCPU.
    Vcpu,
    /// A device of type `KVM_DEV_TYPE_ARM_VGIC_ITS`.
    Its,
    /// A device of type `KVM_DEV_TYPE_ARM_VGIC_V3`.
    Gic,
    /// A KVM device of another type.
    Device,
    /// The recorder could not tell.
    #[default]
    Unknown,
}

/// A KVM ioctl. KVM_RUN is not among them: see [`VcpuEdges`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ioctl {
    /// The process.
    pub pid: u32,
    /// The thread.
    pub tid: u32,
    /// Entry of the system call.
    pub enter_ns: u64,
    /// Its exit.
    pub exit_ns: u64,
    /// The file descriptor.
    pub fd: i32,
    /// What it stands for.
    pub fd_kind: FdKind,
    /// The ioctl's number, such as `KVM_SET_DEVICE_ATTR`.
    pub cmd: u32,
    /// What it returned; a negative errno on failure.
    pub ret: i64,
    /// What its `struct kvm_device_attr` said, for the three ioctls that take one.
    pub attr: Option<DeviceAttr>,
}

/// The part of `struct kvm_device_attr` that names an attribute.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceAttr {
    /// `group`.
    pub group: u32,
    /// `attr`.
    pub attr: u64,
}

/// A kernel function's entry and exit, as fentry or kprobes saw them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct KernelFn {
    /// The process.
    pub pid: u32,
    /// The thread.
    pub tid: u32,
    /// The function's name, such as `vgic_its_save_tables_v0`.
    pub function: String,
    /// Entry.
    pub enter_ns: u64,
    /// Exit.
    pub exit_ns: u64,
    /// What it returned.
    pub ret: i64,
    /// Calls of other functions that were counted inside, on the same thread.
    pub calls: Vec<Calls>,
}

/// How often a function was called.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Calls {
    /// The function's name.
    pub function: String,
    /// The calls.
    pub count: u64,
}

/// The bounds of a vCPU's KVM_RUN calls. They are the ioctl's entry and exit: the moments at which
/// guest code may begin to run and has stopped running, as any kernel can tell them. `first_enter_ns`
/// is 0 for a vCPU that ran before the recording began.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VcpuEdges {
    /// The process.
    pub pid: u32,
    /// The vCPU's thread.
    pub tid: u32,
    /// The vCPU's index, where known.
    pub vcpu: Option<u32>,
    /// Entry of the first KVM_RUN; 0 if the vCPU had run before the recording began.
    pub first_enter_ns: u64,
    /// Entry of the last; 0 if there was none since the recording began.
    pub last_enter_ns: u64,
    /// Exit of the last; 0 if there was none, and before `last_enter_ns` while the vCPU runs.
    pub last_exit_ns: u64,
    /// How many calls there were.
    pub runs: u64,
}

/// A vCPU stayed out of KVM_RUN for longer than the recorder's threshold.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VcpuGap {
    /// The process.
    pub pid: u32,
    /// The vCPU's thread.
    pub tid: u32,
    /// The vCPU's index, where known.
    pub vcpu: Option<u32>,
    /// The exit that began the gap.
    pub exit_ns: u64,
    /// The entry that ended it.
    pub enter_ns: u64,
}

/// When a vCPU left guest code, and when it entered it again: nearer to the truth than the edges of
/// KVM_RUN, inside which KVM has work of its own to do, above all at a vCPU's first run. Written for
/// the first entry after a first KVM_RUN or a [`VcpuGap`], and for a vCPU that stays out. Absent where
/// neither the kernel's `kvm_entry` and `kvm_exit` nor its `kvm_emulate_insn` fire.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VcpuGuest {
    /// The process.
    pub pid: u32,
    /// The vCPU's thread.
    pub tid: u32,
    /// When guest code was last left; `None` if it was never entered before.
    pub left_ns: Option<u64>,
    /// When it was entered; `None` if it was not entered since.
    pub entered_ns: Option<u64>,
}

/// What recording cost, from its start to this frame.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cost {
    /// Events that came out of the ring buffer.
    pub events: u64,
    /// Runs of the eBPF programs, where the kernel counts them.
    pub bpf_runs: Option<u64>,
    /// Time they took, where the kernel counts it, ns.
    pub bpf_ns: Option<u64>,
    /// CPU time of the recorder itself, ns.
    pub cpu_ns: u64,
}
