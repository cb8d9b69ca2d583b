//! What the programs are attached to, and by which way: for each source of events the ways are
//! tried in order, and the first that the kernel takes is it.

use std::error::Error as _;
use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use aya::Btf;
use aya::programs::{Program, ProgramError};
use blackout_abi::event::Function;

use super::{Error, Programs, kernel};

/// What events are about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// USDT probes.
    Usdt,
    /// KVM's ioctls, `KVM_RUN` among them.
    Ioctls,
    /// The moments at which guest code is entered and left.
    Guest,
    /// The end of threads.
    Threads,
    /// A function of KVM's own.
    Function(Function),
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
struct Way {
    name: &'static str,
    programs: &'static [(&'static str, Hook)],
}

/// Where a program goes.
#[derive(Clone, Copy)]
enum Hook {
    /// Loaded only; sites are attached one by one.
    Sites,
    /// A tracepoint by category and name.
    Tracepoint(&'static str, &'static str),
    /// Entry or exit of the source's function, whichever the program is for.
    Function,
}

impl Source {
    /// Every source that this architecture can have.
    pub fn all() -> Vec<Self> {
        let mut all = vec![Self::Usdt, Self::Ioctls, Self::Guest, Self::Threads];
        // The ITS is arm64's.
        if std::env::consts::ARCH == "aarch64" {
            all.extend(Function::ALL.map(Self::Function));
        }
        all
    }

    /// What the source is, for people.
    pub fn name(self) -> &'static str {
        match self {
            Self::Usdt => "USDT probes",
            Self::Ioctls => "KVM ioctls",
            Self::Guest => "guest entries and exits",
            Self::Threads => "ends of threads",
            Self::Function(function) => function.symbol(),
        }
    }

    /// Whether a recording is worth nothing without it.
    pub fn is_essential(self) -> bool {
        matches!(self, Self::Usdt | Self::Ioctls)
    }

    fn ways(self) -> &'static [Way] {
        match self {
            Self::Usdt => &[
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
            ],
            Self::Guest => &[Way {
                name: "tracepoint",
                programs: &[
                    ("guest_exit", Hook::Tracepoint("kvm", "kvm_exit")),
                    ("guest_enter", Hook::Tracepoint("kvm", "kvm_entry")),
                ],
            }],
            Self::Threads => &[Way {
                name: "tracepoint",
                programs: &[(
                    "thread_exit",
                    Hook::Tracepoint("sched", "sched_process_exit"),
                )],
            }],
            Self::Function(function) => function_ways(function),
        }
    }
}

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

impl Programs {
    /// Attaches what the kernel takes, and says what it took. Without a process to trace this costs
    /// the host next to nothing.
    ///
    /// # Errors
    /// [`Error::Foreign`], if the object lacks a program. What the kernel refuses is no error here.
    pub fn attach(&mut self) -> Result<Vec<Coverage>, Error> {
        kernel::mount_tracefs();
        Source::all()
            .into_iter()
            .map(|source| self.cover(source))
            .collect()
    }

    /// The program for USDT sites, once [`attach`](Self::attach) found one.
    pub(super) fn usdt_program(&self) -> Option<BorrowedFd<'_>> {
        let loaded = Source::Usdt.ways().iter().flat_map(|way| way.programs);
        let mut programs = loaded.filter_map(|(name, _)| self.ebpf.program(name)?.fd().ok());
        programs.next().map(|program| program.as_fd())
    }

    /// Runs of all programs so far and the time they took, ns, if the kernel counts them.
    pub(super) fn cost(&self) -> io::Result<(u64, u64)> {
        let mut cost = (0, 0);
        for (_, program) in self.ebpf.programs() {
            let Ok(fd) = program.fd() else {
                continue;
            };
            let path = format!("/proc/self/fdinfo/{}", fd.as_fd().as_raw_fd());
            let text = fs::read_to_string(path)?;
            cost.0 += field(&text, "run_cnt:");
            cost.1 += field(&text, "run_time_ns:");
        }
        Ok(cost)
    }

    fn cover(&mut self, source: Source) -> Result<Coverage, Error> {
        let mut coverage = Coverage {
            source,
            way: None,
            refused: Vec::new(),
        };
        for way in source.ways() {
            match self.try_way(source, way)? {
                Ok(()) => {
                    coverage.way = Some(way.name);
                    break;
                }
                Err(error) => {
                    coverage.refused.push(Refusal {
                        way: way.name,
                        why: why(&error),
                    });
                }
            }
        }
        Ok(coverage)
    }

    /// Attaches all programs of a way, or none.
    fn try_way(&mut self, source: Source, way: &Way) -> Result<Result<(), ProgramError>, Error> {
        for (index, (name, hook)) in way.programs.iter().enumerate() {
            let program = self.ebpf.program_mut(name).ok_or(Error::Foreign(name))?;
            if let Err(error) = attach(program, source, *hook) {
                for (name, _) in &way.programs[..=index] {
                    if let Some(program) = self.ebpf.program_mut(name) {
                        unload(program);
                    }
                }
                return Ok(Err(error));
            }
        }
        Ok(Ok(()))
    }
}

fn attach(program: &mut Program, source: Source, hook: Hook) -> Result<(), ProgramError> {
    let symbol = match source {
        Source::Function(function) => function.symbol(),
        _ => "",
    };
    match (program, hook) {
        (Program::UProbe(program), Hook::Sites) => program.load(),
        (Program::TracePoint(program), Hook::Tracepoint(category, name)) => {
            program.load()?;
            program.attach(category, name).map(drop)
        }
        (Program::FEntry(program), Hook::Function) => {
            program.load(symbol, &Btf::from_sys_fs()?)?;
            program.attach().map(drop)
        }
        (Program::FExit(program), Hook::Function) => {
            program.load(symbol, &Btf::from_sys_fs()?)?;
            program.attach().map(drop)
        }
        (Program::KProbe(program), Hook::Function) => {
            program.load()?;
            program.attach(symbol, 0).map(drop)
        }
        _ => Err(ProgramError::UnexpectedProgramType),
    }
}

/// Detaches the program and takes it out of the kernel. One that was not loaded needs nothing.
fn unload(program: &mut Program) {
    let _ = match program {
        Program::TracePoint(program) => program.unload(),
        Program::FEntry(program) => program.unload(),
        Program::FExit(program) => program.unload(),
        Program::KProbe(program) => program.unload(),
        Program::UProbe(program) => program.unload(),
        _ => Ok(()),
    };
}

/// The reason in one line: the system's error, and the last thing that the verifier said.
fn why(error: &ProgramError) -> String {
    if let ProgramError::LoadError {
        io_error,
        verifier_log,
    } = error
    {
        let log = verifier_log.to_string();
        let mut said = log.lines().map(str::trim).filter(|line| {
            !line.is_empty() && !line.starts_with("processed ") && !line.starts_with("verification")
        });
        return match said.next_back() {
            Some(said) => format!("{io_error}: {said}"),
            None => io_error.to_string(),
        };
    }
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let more = error.to_string();
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        cause = error.source();
    }
    text
}

fn field(text: &str, name: &str) -> u64 {
    let value = text.lines().find_map(|line| line.strip_prefix(name));
    value
        .and_then(|value| value.trim().parse().ok())
        .unwrap_or(0)
}
