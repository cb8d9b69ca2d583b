//! The records that cross from the eBPF programs to the tool, and the tables that the tool hands
//! to the programs.
//!
//! The programs write records into one ring buffer, so their order in it is the order in which
//! they were made. Each starts with a [`Header`], whose `kind` says which of the record types it
//! is. Every type is `repr(C)`, has no padding and has the size that is asserted below it, so that
//! both sides read the same bytes. Times are nanoseconds of `CLOCK_MONOTONIC`
//! (`bpf_ktime_get_ns`); byte order is the machine's.

/// Most arguments of one USDT site that are read; libbpf and bpftrace read as many.
pub const MAX_ARGS: usize = 12;
/// Most string arguments of one USDT site that are read; further ones arrive as bare addresses.
pub const MAX_TEXTS: usize = 4;
/// Bytes kept of one string argument, its NUL included. A string that fills them was cut.
pub const TEXT_LEN: usize = 128;

/// Declares a record or table row: `repr(C)`, zeroable, of the given size, `Pod` for aya.
macro_rules! shared {
    ($(#[$attr:meta])* pub struct $name:ident: $size:literal { $($(#[$doc:meta])* pub $field:ident: $ty:ty,)* }) => {
        $(#[$attr])*
        #[repr(C)]
        #[derive(Clone, Copy, Debug)]
        pub struct $name { $($(#[$doc])* pub $field: $ty,)* }

        const _: () = assert!(size_of::<$name>() == $size, "size differs from the declared one");
        const _: () = assert!(
            0 $(+ size_of::<$ty>())* == $size,
            "the compiler put padding between the fields"
        );

        #[cfg(feature = "user")]
        #[allow(unsafe_code)]
        // SAFETY: repr(C) of integers and of such structs, with no padding (asserted above), so
        // every bit pattern is a value and every byte of a value is initialised.
        unsafe impl aya::Pod for $name {}
    };
}

/// What a record is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Kind {
    /// A [`Usdt`] record.
    Usdt = 1,
    /// A [`UsdtText`] record: a [`Usdt`] whose site has string arguments.
    UsdtText = 2,
    /// An [`Ioctl`] record.
    Ioctl = 3,
    /// A [`Run`] record.
    Run = 4,
    /// A [`Call`] record.
    Call = 5,
}

impl Kind {
    /// Every kind; [`Lost::by_kind`] has one counter for each, in this order.
    pub const ALL: [Self; 5] = [
        Self::Usdt,
        Self::UsdtText,
        Self::Ioctl,
        Self::Run,
        Self::Call,
    ];

    /// The kind that a [`Header::kind`] names, or `None` for a number that no program writes.
    pub fn from_u32(kind: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|known| *known as u32 == kind)
    }
}

shared! {
    /// What every record starts with.
    pub struct Header: 24 {
        /// When it happened. Of a record with a `start` this is the end.
        pub time: u64,
        /// A [`Kind`].
        pub kind: u32,
        /// The process.
        pub tgid: u32,
        /// The thread.
        pub tid: u32,
        /// The CPU it happened on.
        pub cpu: u32,
    }
}

shared! {
    /// A USDT site was hit.
    pub struct Usdt: 128 {
        /// When and where.
        pub header: Header,
        /// The site's index in the table of [`SiteSpec`]s.
        pub site: u32,
        /// Bit n is set when argument n could not be read.
        pub unread: u16,
        /// Bit n is set when [`UsdtText::texts`]`[n]` was read.
        pub texts: u16,
        /// The arguments, sign- or zero-extended as the site says. Those that it does not have are
        /// undefined.
        pub args: [u64; MAX_ARGS],
    }
}

shared! {
    /// A USDT site with string arguments was hit.
    pub struct UsdtText: 640 {
        /// The hit; its `kind` is [`Kind::UsdtText`].
        pub usdt: Usdt,
        /// NUL-terminated texts of the arguments [`SiteSpec::text_args`]. What follows the NUL is
        /// undefined.
        pub texts: [[u8; TEXT_LEN]; MAX_TEXTS],
    }
}

shared! {
    /// A KVM ioctl (type 0xAE) other than `KVM_RUN` returned. `header.time` is its end.
    pub struct Ioctl: 88 {
        /// When it returned and on which thread.
        pub header: Header,
        /// When it was called.
        pub start: u64,
        /// The file descriptor.
        pub fd: u32,
        /// The request number.
        pub cmd: u32,
        /// The third argument of the call: a value, or the address of a structure.
        pub arg: u64,
        /// What it returned: a negative errno on failure.
        pub ret: i64,
        /// The first `head_len` bytes of the structure that `arg` points to. They are read at the
        /// call, but those of `KVM_CREATE_DEVICE` (`type`, `fd`, `flags`) at the return, since the
        /// kernel writes the new `fd` there. Of `KVM_{SET,GET,HAS}_DEVICE_ATTR` they are the
        /// whole `struct kvm_device_attr`.
        pub head: [u32; 6],
        /// Bytes of `head` that hold anything: 0 when the request passes no structure to the
        /// kernel or when it could not be read.
        pub head_len: u32,
        /// 0.
        pub reserved: u32,
    }
}

/// Why a [`Run`] record was made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum RunEdge {
    /// The thread calls `KVM_RUN` for the first time, at `header.time`.
    First = 1,
    /// The thread calls `KVM_RUN` again, at `header.time`, after it was out of it for longer than
    /// the threshold: since `edges.exit`.
    Gap = 2,
    /// The guest is entered, at `header.time`, for the first time since a `First` or `Gap`. Only
    /// where the kernel's `kvm_entry` fires, or `kvm_emulate_insn` in its place.
    Entry = 3,
    /// The thread ends, at `header.time`; `edges` are its last.
    End = 4,
}

impl RunEdge {
    /// The edge that a [`Run::edge`] names, or `None` for a number that no program writes.
    pub fn from_u32(edge: u32) -> Option<Self> {
        [Self::First, Self::Gap, Self::Entry, Self::End]
            .into_iter()
            .find(|known| *known as u32 == edge)
    }
}

shared! {
    /// One thread's `KVM_RUN` calls, as kept in the kernel. 0 stands for "never", but a `first` of 0
    /// for a first call before the recording began.
    pub struct RunEdges: 72 {
        /// The process.
        pub tgid: u32,
        /// The vCPU's file descriptor; `u32::MAX` if it is not known.
        pub fd: u32,
        /// First call.
        pub first: u64,
        /// Last call. Of one from before the recording began, any time inside it, or 0.
        pub enter: u64,
        /// Last return.
        pub exit: u64,
        /// Last time the guest was entered (`kvm_entry`; where that does not fire, the first
        /// `kvm_emulate_insn` after it was out).
        pub guest_enter: u64,
        /// Last time the guest was left (`kvm_exit`, or the last `kvm_emulate_insn`).
        pub guest_exit: u64,
        /// Calls so far.
        pub runs: u64,
        /// Guest entries so far; 0 where `kvm_entry` does not fire.
        pub entries: u64,
        /// 1 while the next guest entry is to be reported as [`RunEdge::Entry`].
        pub entry_due: u64,
    }
}

shared! {
    /// A vCPU thread started, paused, went on or ended.
    pub struct Run: 104 {
        /// When; what it is the time of depends on `edge`.
        pub header: Header,
        /// A [`RunEdge`].
        pub edge: u32,
        /// 0.
        pub reserved: u32,
        /// The thread's edges. Of a `First` or `Gap` they are those from before this call.
        pub edges: RunEdges,
    }
}

/// The kernel functions that a [`Call`] can be of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Function {
    /// `vgic_its_save_tables_v0`
    ItsSave = 1,
    /// `vgic_its_restore_tables_v0`
    ItsRestore = 2,
    /// `vgic_v3_save_pending_tables`
    PendingSave = 3,
}

impl Function {
    /// Every function.
    pub const ALL: [Self; 3] = [Self::ItsSave, Self::ItsRestore, Self::PendingSave];

    /// The function that a [`Call::function`] names, or `None` for a number that no program writes.
    pub fn from_u32(function: u32) -> Option<Self> {
        Self::ALL
            .into_iter()
            .find(|known| *known as u32 == function)
    }

    /// Its name in the kernel.
    pub fn symbol(self) -> &'static str {
        match self {
            Self::ItsSave => "vgic_its_save_tables_v0",
            Self::ItsRestore => "vgic_its_restore_tables_v0",
            Self::PendingSave => "vgic_v3_save_pending_tables",
        }
    }
}

shared! {
    /// A kernel function returned. `header.time` is its end.
    pub struct Call: 48 {
        /// When it returned and on which thread.
        pub header: Header,
        /// When it was entered.
        pub start: u64,
        /// What it returned: 0, or a negative errno.
        pub ret: i32,
        /// A [`Function`].
        pub function: u32,
        /// 0.
        pub reserved: u64,
    }
}

shared! {
    /// Records that found no room in the ring buffer, on one CPU.
    pub struct Lost: 40 {
        /// One counter for each of [`Kind::ALL`].
        pub by_kind: [u64; 5],
    }
}

/// How one USDT argument is found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Place {
    /// There is no such argument, or it cannot be read (a vector register, an unknown symbol).
    Nowhere = 0,
    /// It is `offset`.
    Constant = 1,
    /// It is in the register at `base`. From here on there is a register.
    Register = 2,
    /// It is in memory, at the register at `base`, plus the one at `index` times `factor`, plus
    /// `offset`. Whatever has fewer parts is put in these terms, for the sake of a short program.
    Memory = 3,
}

shared! {
    /// Where one USDT argument is, for either architecture: registers are given as byte offsets
    /// into the registers that the kernel saved (`struct pt_regs`, `struct user_pt_regs`).
    pub struct ArgSpec: 16 {
        /// A constant, or the displacement of an address.
        pub offset: i64,
        /// Where the register, or the address's base register, was saved.
        pub base: u16,
        /// Where the index register was saved.
        pub index: u16,
        /// What the index is multiplied by; 0 without one.
        pub factor: u8,
        /// A [`Place`].
        pub place: u8,
        /// Its size in bytes: 1, 2, 4 or 8.
        pub size: u8,
        /// [`SIGNED`](Self::SIGNED), or 0.
        pub flags: u8,
    }
}

impl ArgSpec {
    /// The argument is sign-extended to 64 bits; without it, zero-extended.
    pub const SIGNED: u8 = 1;
    /// No argument.
    pub const NONE: Self = Self {
        offset: 0,
        base: 0,
        index: 0,
        factor: 0,
        place: Place::Nowhere as u8,
        size: 8,
        flags: 0,
    };
}

shared! {
    /// What the programs must know of one USDT site; the attach cookie is its index in the table.
    pub struct SiteSpec: 200 {
        /// Arguments that count.
        pub args: u32,
        /// The arguments that are addresses of NUL-terminated strings, which are to be read too. A
        /// number that no argument has ends the list.
        pub text_args: [u8; MAX_TEXTS],
        /// The arguments.
        pub specs: [ArgSpec; MAX_ARGS],
    }
}

/// The record at the start of `bytes`, or `None` when they are too few. The tool calls it on what
/// it reads from the ring buffer, with the type that [`Header::kind`] names.
#[cfg(feature = "user")]
#[allow(unsafe_code)]
pub fn read<T: aya::Pod>(bytes: &[u8]) -> Option<T> {
    if bytes.len() < size_of::<T>() {
        return None;
    }
    // SAFETY: `bytes` holds at least size_of::<T>() initialised bytes, `read_unaligned` asks for
    // no alignment, and every bit pattern is a T because T is Pod.
    Some(unsafe { bytes.as_ptr().cast::<T>().read_unaligned() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_on_the_wire_name_their_variant() {
        for kind in Kind::ALL {
            assert_eq!(Kind::from_u32(kind as u32), Some(kind));
        }
        for function in Function::ALL {
            assert_eq!(Function::from_u32(function as u32), Some(function));
        }
        for edge in [RunEdge::First, RunEdge::Gap, RunEdge::Entry, RunEdge::End] {
            assert_eq!(RunEdge::from_u32(edge as u32), Some(edge));
        }
        assert_eq!(Kind::from_u32(0), None);
        assert_eq!(Function::from_u32(4), None);
        assert_eq!(RunEdge::from_u32(5), None);
    }

    #[test]
    fn a_lost_counter_exists_for_each_kind() {
        for (index, kind) in Kind::ALL.into_iter().enumerate() {
            assert_eq!(kind as usize, index + 1);
        }
    }
}
