//! What this kernel and this process are: the facts behind the choice of ways to attach.

use std::env::consts::ARCH;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use aya::{Btf, BtfError};
use rustix::mount::{MountFlags, mount};
use rustix::thread::{CapabilitySet, capabilities};

use super::rights::{self, Held, Right};
use super::{Backend, Error};
use crate::usdt::Uprobes;

/// The initial pid namespace (`PROC_PID_INIT_INO`, `include/linux/proc_ns.h`).
const FIRST_PID_NAMESPACE: u64 = 0xefff_fffc;

/// Where tracefs is mounted, by itself or under debugfs.
const TRACEFS: [&str; 2] = ["/sys/kernel/tracing", "/sys/kernel/debug/tracing"];

/// Where the kernel saves registers, as byte offsets.
#[derive(Clone, Copy, Debug)]
pub(super) struct Registers {
    /// A function's return value.
    pub(super) return_value: u64,
    /// A system call's first argument, as it was at the entry.
    pub(super) first_arg: u64,
    /// Its second argument.
    pub(super) second_arg: u64,
    /// Its third argument.
    pub(super) third_arg: u64,
}

/// The registers of this architecture: `struct pt_regs` of `asm/ptrace.h`. On arm64 the first
/// argument's register takes the return value, so the kernel keeps it a second time.
pub(super) fn registers() -> Registers {
    match ARCH {
        "aarch64" => Registers {
            return_value: 0,
            first_arg: 272,
            second_arg: 8,
            third_arg: 16,
        },
        _ => Registers {
            return_value: 80,
            first_arg: 112,
            second_arg: 104,
            third_arg: 96,
        },
    }
}

/// Device and inode of this process's pid namespace, or zeros for the first one, whose ids the
/// kernel has at hand.
pub(super) fn pid_namespace() -> Result<(u64, u64), Error> {
    let path = Path::new("/proc/self/ns/pid");
    let namespace = fs::metadata(path).map_err(|source| Error::Read {
        path: path.to_path_buf(),
        source,
    })?;
    Ok(match namespace.ino() {
        FIRST_PID_NAMESPACE => (0, 0),
        inode => (namespace.dev(), inode),
    })
}

/// Mounts tracefs at its place where no one has, as trace-cmd and perf do too: systemd does it at
/// boot, but minimal systems and containers do not. Without the right to do so nothing happens, and
/// attaching says what is missing.
pub(super) fn mount_tracefs() {
    let [place, elsewhere] = TRACEFS.map(|root| Path::new(root).join("events"));
    if !place.exists() && !elsewhere.exists() {
        let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
        let _ = mount("tracefs", TRACEFS[0], "tracefs", flags, None);
    }
}

/// The kernel's BTF, where a way by it is tried: parsing it takes long.
pub(super) fn btf(backend: Backend) -> Result<Btf, BtfError> {
    if backend.may_be_fentry() {
        Btf::from_sys_fs()
    } else {
        Ok(Btf::new())
    }
}

/// Whether the kernel is at least this version. Distributions backport much, so this is asked only
/// where nothing better can be.
pub(crate) fn is_at_least(major: u32, minor: u32) -> bool {
    let release = rustix::system::uname()
        .release()
        .to_string_lossy()
        .into_owned();
    let mut numbers = release
        .split(['.', '-', '+'])
        .map_while(|number| number.parse().ok());
    (
        numbers.next().unwrap_or(0_u32),
        numbers.next().unwrap_or(0_u32),
    ) >= (major, minor)
}

/// One thing that attaching depends on.
#[derive(Clone, Debug)]
pub struct Fact {
    /// What is asked.
    pub name: &'static str,
    /// Whether the answer is the one that is needed.
    pub good: bool,
    /// Whether `record` works without it.
    pub optional: bool,
    /// What was found.
    pub found: String,
    /// What to do about a bad answer, or what it costs.
    pub help: &'static str,
}

/// Looks at everything that attaching depends on, without attaching anything.
pub fn survey() -> Vec<Fact> {
    let mut facts: Vec<_> = rights::ALL.map(capability).into();
    facts.extend([version(), tracefs(), uprobes(), semaphores(), btf_fact()]);
    facts.extend(lockdown());
    facts.extend([paranoid(), jit()].into_iter().flatten());
    facts.push(kvm());
    facts.extend(pvm());
    facts.push(namespace());
    facts
}

fn fact(name: &'static str, result: Result<String, String>, help: &'static str) -> Fact {
    let good = result.is_ok();
    Fact {
        name,
        good,
        optional: false,
        found: result.unwrap_or_else(|found| found),
        help,
    }
}

/// # Errors
/// [`Error::Rights`] with the first of the rights that loading takes and this process lacks.
pub(super) fn check_rights() -> Result<(), Error> {
    if let Some(right) = rights::missing() {
        return Err(Error::Rights(right));
    }
    match tracefs_id() {
        Err(denied) if denied.kind() == io::ErrorKind::PermissionDenied => {
            Err(Error::Rights(rights::DAC_READ_SEARCH))
        }
        _ => Ok(()),
    }
}

/// Reads from tracefs what attaching reads; gives the path.
fn tracefs_id() -> io::Result<PathBuf> {
    let mut result = Err(io::Error::new(io::ErrorKind::NotFound, "not mounted"));
    for root in TRACEFS {
        let id = Path::new(root).join("events/syscalls/sys_enter_ioctl/id");
        match fs::read(&id) {
            Ok(_) => return Ok(id),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => result = Err(error),
        }
    }
    result
}

fn capability(right: Right) -> Fact {
    let result = match right.held() {
        Ok(Held::Yes) => Ok("yes".to_string()),
        Ok(Held::BySysAdmin) => Ok("by CAP_SYS_ADMIN".to_string()),
        Ok(Held::No) => Err(format!("no; it is needed to {}", right.what_for)),
        Err(error) => Err(error.to_string()),
    };
    let help = "run as root, or: setcap \
                cap_bpf,cap_perfmon,cap_sys_ptrace,cap_dac_read_search+ep blackout";
    let mut fact = fact(right.name, result, help);
    fact.optional = ![rights::BPF, rights::PERFMON].contains(&right);
    fact
}

fn version() -> Fact {
    let release = rustix::system::uname();
    let release = release.release().to_string_lossy().into_owned();
    let result = if is_at_least(5, 15) {
        Ok(release)
    } else {
        Err(release)
    };
    fact(
        "kernel",
        result,
        "Linux 5.15 or later is needed: attach cookies, with which probes are told apart",
    )
}

/// What Debian and Ubuntu have made of this knob: from 3 on their kernels refuse
/// `perf_event_open(2)`, by which uprobes without a multi-link are made.
fn paranoid() -> Option<Fact> {
    let value = number("/proc/sys/kernel/perf_event_paranoid")?;
    let privileged =
        capabilities(None).is_ok_and(|sets| sets.effective.contains(CapabilitySet::SYS_ADMIN));
    let result = if value < 3 || privileged {
        Ok(value.to_string())
    } else {
        Err(value.to_string())
    };
    let mut fact = fact(
        "perf_event_paranoid",
        result,
        "some distributions' kernels then want CAP_SYS_ADMIN besides CAP_PERFMON: \
         sysctl kernel.perf_event_paranoid=2",
    );
    fact.optional = true;
    Some(fact)
}

fn jit() -> Option<Fact> {
    let result = match number("/proc/sys/net/core/bpf_jit_enable")? {
        0 => Err("off".to_string()),
        _ => Ok("on".to_string()),
    };
    let mut fact = fact(
        "eBPF compiler",
        result,
        "programs are interpreted, and each event costs several times as much: \
         sysctl net.core.bpf_jit_enable=1",
    );
    fact.optional = true;
    Some(fact)
}

/// What a file of one number says; nothing without such a file.
fn number(path: &str) -> Option<i64> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

/// A KVM that is a software hypervisor, where there is one.
fn pvm() -> Option<Fact> {
    let found = Path::new("/sys/module/kvm_pvm").exists().then_some("PVM")?;
    let mut fact = fact(
        "guest entries",
        Err(found.to_string()),
        "this KVM tells of no entry to and exit from guest code: guest time is known by the \
         instructions that it emulates, or by KVM_RUN alone",
    );
    fact.optional = true;
    Some(fact)
}

fn tracefs() -> Fact {
    let result = tracefs_id()
        .map(|id| format!("{} is readable", id.display()))
        .map_err(|error| error.to_string());
    let help = "mount -t tracefs tracefs /sys/kernel/tracing; reading it takes root or \
                CAP_DAC_READ_SEARCH, and the kernel needs CONFIG_FTRACE_SYSCALLS";
    fact("tracefs", result, help)
}

fn uprobes() -> Fact {
    let result = Uprobes::discover()
        .map(|_| "yes".to_string())
        .map_err(|error| error.to_string());
    fact(
        "uprobe PMU",
        result,
        "the kernel needs CONFIG_UPROBE_EVENTS",
    )
}

fn semaphores() -> Fact {
    let raises = Uprobes::discover().is_ok_and(|uprobes| uprobes.raises_semaphores());
    let result = if raises {
        Ok("raised by the kernel")
    } else {
        Err("not raised")
    };
    let mut fact = fact(
        "USDT semaphores",
        result.map(str::to_string).map_err(str::to_string),
        "probes with a semaphore stay off before Linux 4.20; those of blackout-vmm have none",
    );
    fact.optional = true;
    fact
}

fn btf_fact() -> Fact {
    let path = "/sys/kernel/btf/vmlinux";
    let result = match fs::File::open(path) {
        Ok(_) => Ok(path.to_string()),
        Err(error) => Err(format!("{path}: {error}")),
    };
    let mut fact = fact(
        "kernel BTF",
        result,
        "without CONFIG_DEBUG_INFO_BTF there is no fentry, and a vCPU that was running when the \
         recording began looks like one that starts",
    );
    fact.optional = true;
    fact
}

/// The lockdown mode, where the kernel knows one.
fn lockdown() -> Option<Fact> {
    let modes = fs::read_to_string("/sys/kernel/security/lockdown").ok()?;
    let mode = modes.split('[').nth(1)?.split(']').next()?;
    let result = match mode {
        "confidentiality" => Err(mode.to_string()),
        mode => Ok(mode.to_string()),
    };
    Some(fact(
        "lockdown",
        result,
        "in this mode the kernel lets no program read memory",
    ))
}

fn kvm() -> Fact {
    let path = "/dev/kvm";
    let result = match fs::OpenOptions::new().read(true).write(true).open(path) {
        Ok(_) => Ok("usable".to_string()),
        Err(error) => Err(error.to_string()),
    };
    let mut fact = fact("/dev/kvm", result, "no virtual machine runs here by KVM");
    fact.optional = true;
    fact
}

fn namespace() -> Fact {
    let result = match pid_namespace() {
        Ok((0, 0)) => Ok("the first".to_string()),
        Ok(_) => Ok("a container's: processes outside it cannot be recorded".to_string()),
        Err(error) => Err(error.to_string()),
    };
    fact("pid namespace", result, "mount /proc")
}
