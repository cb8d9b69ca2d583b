//! What may keep the events of one monitor from being seen.

use std::env::consts::ARCH;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use crate::capture::kernel::{Fact, is_at_least};
use crate::capture::sites::Pattern;
use crate::usdt::{Binary, Machine, Operand, Site};

/// What a probe without anybody on it does nothing by: the longest that is told apart, as
/// `systemtap-sdt-dev`'s `nop; cs nopw` is.
const NOP: usize = 10;

/// `nopl 0x0(%rax,%rax,1)`
const NOP5: [u8; 5] = [0x0f, 0x1f, 0x44, 0, 0];

/// `cs nopw 0x0(%rax,%rax,1)`
const NOP10: [u8; 6] = [0x66, 0x2e, 0x0f, 0x1f, 0x84, 0];

/// Looks at the program at `path`.
pub fn examine_file(path: &Path) -> Vec<Fact> {
    let binary = match Binary::open(path) {
        Ok(binary) => binary,
        Err(error) => {
            let help = "nothing but KVM's ioctls is seen of a program that cannot be read";
            return vec![bad("program", error.to_string(), help)];
        }
    };
    let code = code_at(path, &binary.sites);
    let mut facts = vec![machine(&binary), probes(&binary)];
    facts.extend(semaphores(&binary.sites));
    facts.extend(long_nops(&code));
    facts.extend(operands(&binary.sites));
    facts.extend(dangling(&binary));
    facts
}

/// Looks at a process and its program.
pub fn examine_process(pid: u32) -> Vec<Fact> {
    let exe = PathBuf::from(format!("/proc/{pid}/exe"));
    let mut facts = Vec::new();
    match fs::read_link(&exe) {
        Ok(link) => facts.push(good("process", format!("{pid} runs {}", link.display()))),
        Err(error) => {
            let help = "it has ended, or is another user's, which takes CAP_SYS_PTRACE";
            return vec![bad("process", format!("{}: {error}", exe.display()), help)];
        }
    }
    facts.push(if crate::capture::with_vm().contains(&pid) {
        good("VM", "it has one".to_string())
    } else {
        let help = "it is no monitor, or not yet one: `record` waits for its first ioctl of KVM";
        optional(bad("VM", "it has none".to_string(), help))
    });
    facts.extend(examine_file(&exe));
    facts
}

fn good(name: &'static str, found: String) -> Fact {
    Fact {
        name,
        good: true,
        optional: false,
        found,
        help: "",
    }
}

fn bad(name: &'static str, found: String, help: &'static str) -> Fact {
    Fact {
        good: false,
        help,
        ..good(name, found)
    }
}

fn optional(fact: Fact) -> Fact {
    Fact {
        optional: true,
        ..fact
    }
}

fn machine(binary: &Binary) -> Fact {
    let (name, arch) = match binary.machine {
        Machine::X86_64 => ("x86-64", "x86_64"),
        Machine::Aarch64 => ("arm64", "aarch64"),
    };
    let found = format!("ELF for {name}");
    if arch == ARCH {
        good("program", found)
    } else {
        bad("program", found, "this machine is of another architecture")
    }
}

fn probes(binary: &Binary) -> Fact {
    let understood = Pattern::understood();
    let (mut by_default, mut others) = (0, 0);
    for site in &binary.sites {
        let mut patterns = understood.iter();
        if patterns.any(|pattern| pattern.matches(&site.provider, &site.name)) {
            by_default += 1;
        } else {
            others += 1;
        }
    }
    let found = format!("{by_default} sites that are recorded by default, {others} others");
    if by_default > 0 {
        good("USDT probes", found)
    } else {
        let help =
            "its migrations are seen by KVM's ioctls alone, without the monitor's own layers";
        optional(bad("USDT probes", found, help))
    }
}

/// rustc's default linker on x86-64, rust-lld, puts read-only-after-relocation data and other data into
/// two writable mappings that share a page of the file. The kernel raises the semaphore in the first
/// mapping of that page that it finds, where the program never looks.
fn semaphores(sites: &[Site]) -> Option<Fact> {
    let with = sites.iter().filter(|site| site.semaphore.is_some()).count();
    let hazards = sites.iter().filter(|site| site.semaphore_hazard).count();
    if with == 0 {
        return None;
    }
    if hazards == 0 {
        let found = format!("{with} sites have one, each where the kernel finds it");
        return Some(good("semaphores", found));
    }
    let found = format!("{hazards} of {with} are in a page that is mapped twice");
    let help = "the kernel raises the wrong copy, and these probes never fire in a process that \
                starts after the recorder has attached (rust-lld's layout): link with \
                -C link-arg=-Wl,-z,separate-loadable-segments, or start the program first";
    Some(bad("semaphores", found, help))
}

/// The instructions at the sites; a site that cannot be read has none, and fails when it is attached.
fn code_at(path: &Path, sites: &[Site]) -> Vec<[u8; NOP]> {
    let Ok(file) = File::open(path) else {
        return Vec::new();
    };
    let read = |site: &Site| {
        let mut code = [0; NOP];
        file.read_exact_at(&mut code, site.offset).ok()?;
        Some(code)
    };
    sites.iter().filter_map(read).collect()
}

/// Since 6.18 an x86-64 kernel turns a long nop under a uprobe into a call, whose return address it
/// puts where a leaf function may keep its variables.
fn long_nops(code: &[[u8; NOP]]) -> Option<Fact> {
    let begin_with = |nop: &[u8]| code.iter().filter(|code| code.starts_with(nop)).count();
    let (five, ten) = (begin_with(&NOP5), begin_with(&NOP10));
    if ARCH != "x86_64" {
        return None;
    }
    if ten > 0 {
        let help = "the kernel refuses a uprobe there, and nothing of this program is recorded: \
                    choose others by --probe, or build it with a one-byte nop before each";
        return Some(bad(
            "nops",
            format!("{ten} sites begin with `cs nopw`"),
            help,
        ));
    }
    if five == 0 {
        return None;
    }
    let found = format!("{five} sites are 5-byte nops");
    if !is_at_least(6, 18) {
        return Some(good("nops", found));
    }
    let help = "this kernel turns them into calls, which overwrite the red zone below the stack \
                pointer: the program may misbehave while it is recorded. Build it with one-byte nops \
                or with -mno-red-zone";
    Some(bad("nops", found, help))
}

fn operands(sites: &[Site]) -> Option<Fact> {
    let args = || sites.iter().flat_map(|site| &site.args);
    let unreadable = args().filter(|arg| matches!(arg.operand, Operand::Unreadable(_)));
    let (count, first) = (
        unreadable.clone().count(),
        unreadable.map(|arg| &arg.text).next()?,
    );
    let found = format!("{count} cannot be read, the first is `{first}`");
    let help = "these arguments are missing from the report; `blackout list -v` says which and why";
    Some(optional(bad("arguments", found, help)))
}

fn dangling(binary: &Binary) -> Option<Fact> {
    let first = binary.dangling.first()?;
    let found = format!(
        "{} have no code, the first is {}:{}",
        binary.dangling.len(),
        first.provider,
        first.name
    );
    let help = "the linker dropped the functions that they were in; they cannot fire";
    Some(optional(bad("notes", found, help)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn site(semaphore: Option<u64>, semaphore_hazard: bool) -> Site {
        Site {
            provider: "p".into(),
            name: "n".into(),
            args: Vec::new(),
            offset: 0,
            semaphore,
            semaphore_hazard,
        }
    }

    #[test]
    fn a_semaphore_in_a_page_that_is_mapped_twice_is_a_fault() {
        assert!(semaphores(&[site(None, false)]).is_none());
        let sound = semaphores(&[site(Some(8), false)]).unwrap();
        assert!(sound.good, "{sound:?}");
        let fault = semaphores(&[site(Some(8), false), site(Some(10), true)]).unwrap();
        assert!(!fault.good && !fault.optional);
        assert_eq!(fault.found, "1 of 2 are in a page that is mapped twice");
    }

    #[test]
    fn long_nops_are_told_from_short_ones() {
        if ARCH != "x86_64" {
            return;
        }
        let short = [0x90, 0x0f, 0x1f, 0x44, 0, 0, 0, 0, 0, 0];
        assert!(long_nops(&[short]).is_none());
        let mut ten = [0; NOP];
        ten[..6].copy_from_slice(&NOP10);
        let fact = long_nops(&[short, ten]).unwrap();
        assert!(!fact.good && fact.found.starts_with("1 sites"), "{fact:?}");
        let mut five = [0; NOP];
        five[..5].copy_from_slice(&NOP5);
        assert_eq!(long_nops(&[five]).unwrap().good, !is_at_least(6, 18));
    }

    #[test]
    fn what_is_no_program_is_said() {
        let facts = examine_file(Path::new("/proc/self/status"));
        assert!(facts.len() == 1 && !facts[0].good, "{facts:?}");
        let own = examine_process(std::process::id());
        assert!(own[0].good && own[0].name == "process", "{own:?}");
        assert!(!examine_process(u32::MAX)[0].good);
    }
}
