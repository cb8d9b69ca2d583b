//! The probe table: one row is one span (a begin and an end probe) or one point.
//!
//! Everything that names a probe is derived from here: the monitor's emitters (`vmm/src/probes.rs`
//! hands [`probe_table!`](crate::probe_table) a macro of its own), the tool's attach list and span
//! names, the README's table and the bpftrace scripts. Rows are append-only: a probe's id is its
//! place in [`PROBES`], and recordings carry ids.
//!
//! Strings are pointers to NUL-terminated bytes. `rc` is 0 or a negative errno, as the kernel
//! writes it. Times are nanoseconds of `CLOCK_MONOTONIC`.

/// The USDT provider of every probe in the table.
pub const PROVIDER: &str = "vmm";

/// What an argument's 64 bits mean.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ArgKind {
    /// An unsigned number.
    U64,
    /// A signed number; `rc` is one.
    I64,
    /// The address of a NUL-terminated string in the process that fired the probe.
    Str,
}

/// One argument of a probe.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Arg {
    /// Its name in reports and traces.
    pub name: &'static str,
    /// How to read its 64 bits.
    pub kind: ArgKind,
    /// Meaning and unit.
    pub doc: &'static str,
}

/// Which edge of a span a probe marks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Edge {
    /// The span opens.
    Begin,
    /// The span closes.
    End,
    /// No span: a moment.
    Point,
}

/// One probe as `.note.stapsdt` names it.
#[derive(Clone, Copy, Debug)]
pub struct Probe {
    /// The note's name: `vm_stop_begin`, `vcpu_kicked`.
    pub name: &'static str,
    /// The row that it belongs to: `vm_stop`, `vcpu_kicked`.
    pub row: &'static str,
    /// Its edge.
    pub edge: Edge,
    /// The row's hop; see [`Span::hop`].
    pub hop: u8,
    /// Its arguments, in order.
    pub args: &'static [Arg],
    /// What the row stands for.
    pub doc: &'static str,
}

/// What a span's own time is spent on, and so whether it explains a downtime.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Nature {
    /// A layer of the call path that only calls what is inside it. Time that nothing inside it
    /// takes is not explained by it.
    Layer,
    /// Work, with or without finer spans inside: it explains all its time.
    Work,
    /// Waiting for the other side, which explains nothing.
    Wait,
}

/// One span of the table: a pair of probes on one thread, properly nested.
#[derive(Clone, Copy, Debug)]
pub struct Span {
    /// The row's name, without `_begin` and `_end`.
    pub name: &'static str,
    /// The hop of the stop path, 1 to 7; 8 is what follows the stop.
    pub hop: u8,
    /// What its time is spent on.
    pub nature: Nature,
    /// Arguments of the begin probe.
    pub begin: &'static [Arg],
    /// Arguments of the end probe.
    pub end: &'static [Arg],
    /// What the span stands for.
    pub doc: &'static str,
}

/// Hands the whole table to the macro `$callback`, as rows of
/// `span HOP NATURE name begin_probe(arg: kind = "doc", …) end_probe(arg: kind = "doc", …) "doc";` and
/// `point HOP name(arg: kind = "doc", …) "doc";`. Kinds are `u64`, `i64` and `str`; `NATURE`
/// is `layer`, `work` or `wait`.
#[macro_export]
macro_rules! probe_table {
    ($callback:ident) => {
        $callback! {
            span 1 layer qmp_command
                qmp_command_begin(name: str = "the QMP verb")
                qmp_command_end(rc: i64 = "0, or a negative errno")
                "one QMP command, from parsed to answered";
            span 1 layer migrate
                migrate_begin(id: u64 = "the migration's id, the same on both sides", uri: str = "where to", mode: str = "normal, or the name of another mode")
                migrate_end(status: str = "completed, failed or cancelled", rc: i64 = "0, or a negative errno")
                "a whole outgoing migration, source side";
            span 1 layer migrate_incoming
                migrate_incoming_begin(uri: str = "where it listens")
                migrate_incoming_end(id: u64 = "the migration's id, the same on both sides", status: str = "completed or failed", rc: i64 = "0, or a negative errno")
                "a whole incoming migration, destination side, from the accepted connection";
            span 2 work migration_connect
                migration_connect_begin(uri: str = "where to")
                migration_connect_end(rc: i64 = "0, or a negative errno")
                "connect and agree on the stream's header";
            span 2 layer migration_thread
                migration_thread_begin(id: u64 = "the migration's id")
                migration_thread_end(rc: i64 = "0, or a negative errno")
                "RAM rounds, stop and switchover: all that follows the connection";
            span 2 work ram_round
                ram_round_begin(round: u64 = "counts from 1")
                ram_round_end(pages: u64 = "pages sent", bytes: u64 = "bytes sent", rc: i64 = "0, or a negative errno")
                "one pass over the dirty pages while the guest runs";
            span 2 work ram_load
                ram_load_begin(round: u64 = "counts from 1; the last is the one after the stop")
                ram_load_end(pages: u64 = "pages loaded", bytes: u64 = "bytes loaded", rc: i64 = "0, or a negative errno")
                "one round of RAM, destination side, from its first frame to its last";
            span 3 layer migration_stop_vm
                migration_stop_vm_begin(state: str = "the run state that the stop is for")
                migration_stop_vm_end(rc: i64 = "0, or a negative errno")
                "the stop for a switchover; its entry starts the downtime";
            point 3 downtime_start(id: u64 = "the migration's id")
                "the downtime's clock starts, on the source";
            point 3 downtime_end(id: u64 = "the migration's id", ns: u64 = "the downtime as the source saw it, ns")
                "the source knows that the destination runs";
            span 4 layer vm_stop
                vm_stop_begin(state: str = "the run state that the stop is for", from_vcpu: u64 = "1 when a vCPU thread asked for it")
                vm_stop_end(rc: i64 = "0, or a negative errno")
                "a stop for whatever reason";
            span 5 layer do_vm_stop
                do_vm_stop_begin(state: str = "the run state that the stop is for")
                do_vm_stop_end(rc: i64 = "0, or a negative errno")
                "pause the vCPUs, tell the handlers, drain";
            span 5 work pause_all_vcpus
                pause_all_vcpus_begin(n: u64 = "vCPUs to pause")
                pause_all_vcpus_end(rc: i64 = "0, or a negative errno")
                "from the first kick to the last vCPU out of KVM_RUN";
            point 5 vcpu_kicked(i: u64 = "the vCPU's index")
                "immediate_exit is set and the signal sent";
            point 5 vcpu_paused(i: u64 = "the vCPU's index")
                "the vCPU's thread is out of KVM_RUN; fires on that thread";
            span 5 work drain
                drain_begin()
                drain_end(rc: i64 = "0, or a negative errno")
                "wait for the I/O that is under way";
            span 6 layer vm_state_notify
                vm_state_notify_begin(running: u64 = "1 on a start, 0 on a stop", state: str = "the new run state", handlers: u64 = "handlers on the list")
                vm_state_notify_end(rc: i64 = "the first handler's error, or 0")
                "walk the handlers: forward on a start, in reverse on a stop";
            span 6 work vm_state_handler
                vm_state_handler_begin(name: str = "the handler", index: u64 = "its place on the list", priority: i64 = "its priority", phase: str = "prepare or main")
                vm_state_handler_end(rc: i64 = "0, or a negative errno")
                "one callback of one handler";
            span 7 work its_save_tables
                its_save_tables_begin(its: u64 = "which ITS")
                its_save_tables_end(rc: i64 = "0, or a negative errno")
                "KVM_DEV_ARM_ITS_SAVE_TABLES: the ITS writes its tables to guest RAM";
            span 7 work its_restore_tables
                its_restore_tables_begin(its: u64 = "which ITS")
                its_restore_tables_end(rc: i64 = "0, or a negative errno")
                "KVM_DEV_ARM_ITS_RESTORE_TABLES: the ITS reads its tables back";
            span 7 work gic_save_pending_tables
                gic_save_pending_tables_begin()
                gic_save_pending_tables_end(rc: i64 = "0, or a negative errno")
                "KVM_DEV_ARM_VGIC_SAVE_PENDING_TABLES: the redistributors write the pending LPIs to guest RAM";
            span 7 work gic_restore_pending_tables
                gic_restore_pending_tables_begin()
                gic_restore_pending_tables_end(rc: i64 = "0, or a negative errno")
                "GICR_CTLR.EnableLPIs is written: the redistributors read the pending LPIs back";
            span 7 work kvm_device_access
                kvm_device_access_begin(fd: u64 = "the KVM device's fd", group: u64 = "kvm_device_attr.group", attr: u64 = "kvm_device_attr.attr", write: u64 = "1 for KVM_SET_DEVICE_ATTR")
                kvm_device_access_end(rc: i64 = "0, or a negative errno")
                "one KVM_{SET,GET}_DEVICE_ATTR on the stop path";
            span 7 work kvm_get_clock
                kvm_get_clock_begin()
                kvm_get_clock_end(rc: i64 = "0, or a negative errno")
                "KVM_GET_CLOCK: the guest's kvmclock is read (x86-64)";
            span 7 work kvm_set_clock
                kvm_set_clock_begin()
                kvm_set_clock_end(rc: i64 = "0, or a negative errno")
                "KVM_SET_CLOCK: the guest's kvmclock goes on from where it was (x86-64)";
            span 8 work ram_final
                ram_final_begin()
                ram_final_end(pages: u64 = "pages sent", bytes: u64 = "bytes sent", rc: i64 = "0, or a negative errno")
                "the last dirty pages, sent while the guest is stopped";
            span 8 work device_save
                device_save_begin(name: str = "the device")
                device_save_end(bytes: u64 = "size of its state", rc: i64 = "0, or a negative errno")
                "one device's state is read and sent";
            span 8 work device_load
                device_load_begin(name: str = "the device")
                device_load_end(bytes: u64 = "size of its state", rc: i64 = "0, or a negative errno")
                "one device's state is put into the new VM";
            span 8 wait switchover
                switchover_begin(id: u64 = "the migration's id")
                switchover_end(rc: i64 = "0, or a negative errno")
                "everything is sent: wait for `loaded`, commit, wait for `running`; on the destination, from `loaded` sent to `commit` received";
            span 8 work migration_verify
                migration_verify_begin(id: u64 = "the migration's id")
                migration_verify_end(rc: i64 = "0, or a negative errno")
                "destination: everything has arrived and is checked; ends when `loaded` is sent";
            span 8 work migration_commit
                migration_commit_begin(id: u64 = "the migration's id")
                migration_commit_end(rc: i64 = "0, or a negative errno")
                "source: `loaded` has arrived, the guest is given up; ends when `commit` is sent";
            span 8 layer vm_start
                vm_start_begin(state: str = "the run state to go on in")
                vm_start_end(rc: i64 = "0, or a negative errno")
                "tell the handlers, let the vCPUs run";
            span 8 work resume_all_vcpus
                resume_all_vcpus_begin(n: u64 = "vCPUs to resume")
                resume_all_vcpus_end(rc: i64 = "0, or a negative errno")
                "from the wake-up of every vCPU's thread to the first one about to enter the guest";
            point 8 vcpu_first_run(i: u64 = "the vCPU's index")
                "right before a vCPU's first KVM_RUN; fires on its thread";
            point 8 channel_send(kind: str = "the message", seq: u64 = "counts from 0 in each direction")
                "a control message is about to be written to the migration channel";
            point 8 channel_recv(kind: str = "the message", seq: u64 = "the sender's count")
                "a control message was read from the migration channel";
            point 8 clock_sample(t1: u64 = "request sent, source clock, ns", t2: u64 = "request received, destination clock, ns", t3: u64 = "answer sent, destination clock, ns", t4: u64 = "answer received, source clock, ns")
                "one two-way reading of both clocks, as NTP does; fires on the source";
            point 7 its_mapped(its: u64 = "which ITS", devices: u64 = "devices that it maps", events: u64 = "events that it maps")
                "what an ITS maps, counted in the tables that it saved; fires while the migration lasts, but outside the downtime";
            span 6 work device_drain
                device_drain_begin(name: str = "the device")
                device_drain_end(requests: u64 = "requests that were under way when it was told to stop", rc: i64 = "0, or a negative errno")
                "wait for a device's worker to finish the requests that the guest has started";
            span 8 wait pre_switchover
                pre_switchover_begin(id: u64 = "the migration's id")
                pre_switchover_end(rc: i64 = "0, or a negative errno")
                "the guest is stopped, and the source waits for `migrate-continue`";
        }
    };
}

macro_rules! kind {
    (u64) => {
        ArgKind::U64
    };
    (i64) => {
        ArgKind::I64
    };
    (str) => {
        ArgKind::Str
    };
}

macro_rules! args {
    ($($arg:ident: $kind:ident = $doc:literal),*) => {
        &[$(Arg { name: stringify!($arg), kind: kind!($kind), doc: $doc }),*]
    };
}

macro_rules! nature {
    (layer) => {
        Nature::Layer
    };
    (work) => {
        Nature::Work
    };
    (wait) => {
        Nature::Wait
    };
}

/// Expands the rows, one at a time, into the two constants.
macro_rules! tables {
    (@rows [$($probes:tt)*] [$($spans:tt)*]) => {
        /// Every probe; a probe's id is its index here.
        pub const PROBES: &[Probe] = &[$($probes)*];
        /// Every span.
        pub const SPANS: &[Span] = &[$($spans)*];
    };
    (@rows [$($probes:tt)*] [$($spans:tt)*]
        span $hop:literal $nature:ident $row:ident $begin:ident($($b:tt)*) $end:ident($($e:tt)*) $doc:literal; $($rest:tt)*
    ) => {
        tables! { @rows
            [$($probes)*
             Probe { name: stringify!($begin), row: stringify!($row), edge: Edge::Begin, hop: $hop, args: args!($($b)*), doc: $doc },
             Probe { name: stringify!($end), row: stringify!($row), edge: Edge::End, hop: $hop, args: args!($($e)*), doc: $doc },]
            [$($spans)*
             Span { name: stringify!($row), hop: $hop, nature: nature!($nature), begin: args!($($b)*), end: args!($($e)*), doc: $doc },]
            $($rest)*
        }
    };
    (@rows [$($probes:tt)*] [$($spans:tt)*]
        point $hop:literal $row:ident($($a:tt)*) $doc:literal; $($rest:tt)*
    ) => {
        tables! { @rows
            [$($probes)*
             Probe { name: stringify!($row), row: stringify!($row), edge: Edge::Point, hop: $hop, args: args!($($a)*), doc: $doc },]
            [$($spans)*]
            $($rest)*
        }
    };
    ($($rows:tt)*) => {
        tables! { @rows [] [] $($rows)* }
    };
}

probe_table!(tables);

/// The id of the probe called `name`, or `None` when the table has none.
pub fn probe_id(name: &str) -> Option<u16> {
    let index = PROBES.iter().position(|probe| probe.name == name)?;
    u16::try_from(index).ok()
}

/// The span called `name`, or `None` when the table has none.
pub fn span(name: &str) -> Option<&'static Span> {
    SPANS.iter().find(|span| span.name == name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique() {
        for (index, probe) in PROBES.iter().enumerate() {
            let first = PROBES.iter().position(|other| other.name == probe.name);
            assert_eq!(
                first,
                Some(index),
                "{} stands twice in the table",
                probe.name
            );
        }
    }

    #[test]
    fn span_probes_carry_their_row_and_edge_in_the_name() {
        for probe in PROBES {
            let suffix = match probe.edge {
                Edge::Begin => "_begin",
                Edge::End => "_end",
                Edge::Point => "",
            };
            assert_eq!(probe.name.strip_suffix(suffix), Some(probe.row));
        }
    }

    #[test]
    fn probes_fit_the_register_operands_of_one_site() {
        for probe in PROBES {
            assert!(
                probe.args.len() <= 6,
                "{} has {} arguments",
                probe.name,
                probe.args.len()
            );
        }
    }
}
