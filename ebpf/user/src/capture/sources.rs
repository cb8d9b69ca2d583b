//! What events are about, and by which ways the kernel may give them: for each source the ways stand
//! in the order in which they are tried.

use blackout_abi::event::Function;

/// What events are about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// USDT probes.
    Usdt,
    /// KVM's ioctls, `KVM_RUN` among them.
    Ioctls,
    /// The moments at which guest code is entered and left.
    Guest,
    /// Guest instructions that KVM emulates: all that is seen of guest code where KVM emulates every
    /// one of them, as PVM does for guests that are not made for it. x86-64's.
    Emulated,
    /// The end of threads.
    Threads,
    /// A function of KVM's own.
    Function(Function),
}

/// The ways by which KVM's calls may be seen: its ioctls, and its functions behind them. For the other
/// sources there is only one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Backend {
    /// Tracepoints for the ioctls, trampolines for the functions, or else what the kernel takes.
    #[default]
    Auto,
    /// Tracepoints of the system call: on any kernel, but every system call of the host takes a little
    /// longer.
    Tracepoint,
    /// Trampolines at the functions that serve them: leaves all other system calls alone. Not where KVM
    /// is a module, as it is on x86-64.
    Fentry,
    /// kprobes at those functions. The kernel has room for a few returns only, so where many vCPUs are
    /// in KVM_RUN at once some are not seen.
    Kprobe,
}

impl Backend {
    /// Whether trampolines are tried, for which the kernel's BTF must be parsed.
    pub(super) fn may_be_fentry(self) -> bool {
        match self {
            Self::Auto => std::env::consts::ARCH == "aarch64",
            backend => backend == Self::Fentry,
        }
    }

    fn takes(self, way: &Way) -> bool {
        let kind = way.name.split(' ').next();
        match self {
            Self::Auto => kind != Some("fentry") || self.may_be_fentry(),
            Self::Tracepoint => kind == Some("tracepoint"),
            Self::Fentry => kind == Some("fentry"),
            Self::Kprobe => kind == Some("kprobe"),
        }
    }
}

/// How a source is covered.
#[derive(Clone, Debug)]
pub struct Coverage {
    /// Which source.
    pub source: Source,
    /// The way that the kernel took, if it took any.
    pub way: Option<&'static str>,
    /// The ways before it, or all, and why the kernel did not take them.
    pub refused: Vec<Refusal>,
}

/// A way that the kernel did not take.
#[derive(Clone, Debug)]
pub struct Refusal {
    /// The way.
    pub way: &'static str,
    /// The kernel's reason, in one line.
    pub why: String,
}

/// A way: its name, and the programs that make it up. Returns are attached before calls, so that a
/// call that was seen has its return seen too.
pub(super) struct Way {
    pub(super) name: &'static str,
    pub(super) programs: &'static [(&'static str, Hook)],
}

/// Where a program goes.
#[derive(Clone, Copy)]
pub(super) enum Hook {
    /// Loaded already, by [`multi`](super::multi); the sites of a process are attached by one link.
    Multi,
    /// Loaded only; sites are attached one by one.
    Sites,
    /// A tracepoint by name, without the record that the kernel makes for perf.
    RawTracepoint(&'static str),
    /// A tracepoint by category and name.
    Tracepoint(&'static str, &'static str),
    /// Entry or exit of the source's function, whichever the program is for.
    Function,
    /// Entry or exit of these functions.
    Symbols(&'static [&'static str]),
}

impl Source {
    /// Every source that this architecture can have.
    pub fn all() -> Vec<Self> {
        let mut all = vec![Self::Usdt, Self::Ioctls, Self::Guest, Self::Threads];
        match std::env::consts::ARCH {
            // The ITS is arm64's.
            "aarch64" => all.extend(Function::ALL.map(Self::Function)),
            "x86_64" => all.push(Self::Emulated),
            _ => {}
        }
        all
    }

    /// What the source is, for people.
    pub fn name(self) -> &'static str {
        match self {
            Self::Usdt => "USDT probes",
            Self::Ioctls => "KVM ioctls",
            Self::Guest => "guest entries and exits",
            Self::Emulated => "emulated guest code",
            Self::Threads => "ends of threads",
            Self::Function(function) => function.symbol(),
        }
    }

    /// Whether a recording is worth nothing without it.
    pub fn is_essential(self) -> bool {
        matches!(self, Self::Usdt | Self::Ioctls)
    }

    /// The ways that `backend` allows.
    pub(super) fn ways(self, backend: Backend) -> Vec<&'static Way> {
        let has_choice = matches!(self, Self::Ioctls | Self::Function(_));
        let ways = self.every_way().iter();
        ways.filter(|way| !has_choice || backend.takes(way))
            .collect()
    }

    fn every_way(self) -> &'static [Way] {
        match self {
            Self::Usdt => &[
                Way {
                    name: "uprobe_multi",
                    programs: &[("usdt_sleepable", Hook::Multi)],
                },
                Way {
                    name: "uprobe (sleepable)",
                    programs: &[("usdt_sleepable", Hook::Sites)],
                },
                Way {
                    name: "uprobe",
                    programs: &[("usdt_plain", Hook::Sites)],
                },
            ],
            Self::Ioctls => &[
                Way {
                    name: "tracepoint",
                    programs: &[
                        ("ioctl_exit", Hook::Tracepoint("syscalls", "sys_exit_ioctl")),
                        (
                            "ioctl_enter",
                            Hook::Tracepoint("syscalls", "sys_enter_ioctl"),
                        ),
                    ],
                },
                Way {
                    name: "tracepoint (no BTF)",
                    programs: &[
                        (
                            "ioctl_exit_plain",
                            Hook::Tracepoint("syscalls", "sys_exit_ioctl"),
                        ),
                        (
                            "ioctl_enter",
                            Hook::Tracepoint("syscalls", "sys_enter_ioctl"),
                        ),
                    ],
                },
                Way {
                    name: "fentry",
                    programs: &[
                        ("kvm_dev_fexit", Hook::Symbols(&["kvm_dev_ioctl"])),
                        ("kvm_dev_fentry", Hook::Symbols(&["kvm_dev_ioctl"])),
                        ("kvm_vm_fexit", Hook::Symbols(&["kvm_vm_ioctl"])),
                        ("kvm_vm_fentry", Hook::Symbols(&["kvm_vm_ioctl"])),
                        ("kvm_vcpu_fexit", Hook::Symbols(&["kvm_vcpu_ioctl"])),
                        ("kvm_vcpu_fentry", Hook::Symbols(&["kvm_vcpu_ioctl"])),
                        ("kvm_device_fexit", Hook::Symbols(&["kvm_device_ioctl"])),
                        ("kvm_device_fentry", Hook::Symbols(&["kvm_device_ioctl"])),
                    ],
                },
                Way {
                    name: "kprobe",
                    programs: &[
                        ("kvm_kretprobe", Hook::Symbols(&SERVE_IOCTLS)),
                        ("kvm_kprobe", Hook::Symbols(&SERVE_IOCTLS)),
                    ],
                },
            ],
            Self::Guest => &[
                Way {
                    name: "tracepoint (raw)",
                    programs: &[
                        ("guest_exit_raw", Hook::RawTracepoint("kvm_exit")),
                        ("guest_enter_raw", Hook::RawTracepoint("kvm_entry")),
                    ],
                },
                Way {
                    name: "tracepoint",
                    programs: &[
                        ("guest_exit", Hook::Tracepoint("kvm", "kvm_exit")),
                        ("guest_enter", Hook::Tracepoint("kvm", "kvm_entry")),
                    ],
                },
            ],
            Self::Emulated => &[
                Way {
                    name: "tracepoint (raw)",
                    programs: &[(
                        "guest_emulated_raw",
                        Hook::RawTracepoint("kvm_emulate_insn"),
                    )],
                },
                Way {
                    name: "tracepoint",
                    programs: &[(
                        "guest_emulated",
                        Hook::Tracepoint("kvm", "kvm_emulate_insn"),
                    )],
                },
            ],
            Self::Threads => &[
                Way {
                    name: "tracepoint (raw)",
                    programs: &[("thread_exit_raw", Hook::RawTracepoint("sched_process_exit"))],
                },
                Way {
                    name: "tracepoint",
                    programs: &[(
                        "thread_exit",
                        Hook::Tracepoint("sched", "sched_process_exit"),
                    )],
                },
            ],
            Self::Function(function) => function_ways(function),
        }
    }
}

/// KVM's functions that serve ioctls, by the kind of file (`virt/kvm/kvm_main.c`).
const SERVE_IOCTLS: [&str; 4] = [
    "kvm_dev_ioctl",
    "kvm_vm_ioctl",
    "kvm_vcpu_ioctl",
    "kvm_device_ioctl",
];

/// By trampoline, which costs least; by kprobe where the kernel has no trampolines (arm64 before
/// 6.4) or does not give them out.
fn function_ways(function: Function) -> &'static [Way] {
    macro_rules! ways {
        ($fentry:literal, $fexit:literal, $kprobe:literal, $kretprobe:literal) => {
            &[
                Way {
                    name: "fentry",
                    programs: &[($fexit, Hook::Function), ($fentry, Hook::Function)],
                },
                Way {
                    name: "kprobe",
                    programs: &[($kretprobe, Hook::Function), ($kprobe, Hook::Function)],
                },
            ]
        };
    }
    match function {
        Function::ItsSave => {
            ways!(
                "its_save_fentry",
                "its_save_fexit",
                "its_save_kprobe",
                "its_save_kretprobe"
            )
        }
        Function::ItsRestore => ways!(
            "its_restore_fentry",
            "its_restore_fexit",
            "its_restore_kprobe",
            "its_restore_kretprobe"
        ),
        Function::PendingSave => ways!(
            "pending_save_fentry",
            "pending_save_fexit",
            "pending_save_kprobe",
            "pending_save_kretprobe"
        ),
    }
}
