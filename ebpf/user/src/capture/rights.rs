//! The capabilities that recording takes: which are missing, and how they are given up when they
//! are no longer needed.

use std::io;

use rustix::io::Errno;
use rustix::thread::{
    CapabilitySet, CapabilitySets, capabilities, clear_ambient_capability_set,
    remove_capability_from_bounding_set, set_capabilities, set_no_new_privs,
};

/// A capability that some part of recording takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Right {
    /// Its name in `capabilities(7)`.
    pub name: &'static str,
    /// What it is needed for, as the end of "it takes this to …".
    pub what_for: &'static str,
    set: CapabilitySet,
}

/// Makes maps and loads programs.
pub const BPF: Right = Right {
    name: "CAP_BPF",
    what_for: "load eBPF programs",
    set: CapabilitySet::BPF,
};

/// Attaches programs, and lets them read registers and memory.
pub const PERFMON: Right = Right {
    name: "CAP_PERFMON",
    what_for: "attach eBPF programs, and to let them read memory",
    set: CapabilitySet::PERFMON,
};

/// Reads what has another owner: tracefs, which is root's, and programs that not everybody may read.
pub const DAC_READ_SEARCH: Right = Right {
    name: "CAP_DAC_READ_SEARCH",
    what_for: "read tracefs where it is root's alone, and programs that only their owner may read",
    set: CapabilitySet::DAC_READ_SEARCH,
};

/// Looks at what other users' processes run and have open.
pub const SYS_PTRACE: Right = Right {
    name: "CAP_SYS_PTRACE",
    what_for: "look into another user's process",
    set: CapabilitySet::SYS_PTRACE,
};

/// Every right that recording may take.
pub const ALL: [Right; 4] = [BPF, PERFMON, DAC_READ_SEARCH, SYS_PTRACE];

/// How a right is had.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Held {
    /// By itself.
    Yes,
    /// CAP_SYS_ADMIN stood for it before Linux 5.8, and still does.
    BySysAdmin,
    /// Not at all.
    No,
}

impl Right {
    /// Whether this thread has it now.
    ///
    /// # Errors
    /// The system's.
    pub fn held(self) -> io::Result<Held> {
        let has = capabilities(None)?.effective;
        let stands_for = [BPF, PERFMON].contains(&self);
        Ok(if has.contains(self.set) {
            Held::Yes
        } else if stands_for && has.contains(CapabilitySet::SYS_ADMIN) {
            Held::BySysAdmin
        } else {
            Held::No
        })
    }
}

/// The first right that loading takes and this process lacks.
pub(super) fn missing() -> Option<Right> {
    // Where the question fails the kernel will say itself what it refuses.
    [BPF, PERFMON]
        .into_iter()
        .find(|right| right.held().is_ok_and(|held| held == Held::No))
}

/// What is still to be done when rights are given up.
#[derive(Clone, Copy, Debug, Default)]
pub struct Later {
    /// Programs are attached to processes that come, or that become other programs.
    pub attach: bool,
    /// Signals are passed on to a command, which may run as another user.
    pub signal: bool,
}

impl Later {
    fn takes(self, permitted: CapabilitySet) -> CapabilitySet {
        let mut keep = CapabilitySet::empty();
        if self.attach {
            keep |= ALL.iter().fold(keep, |keep, right| keep | right.set);
            if !permitted.contains(BPF.set | PERFMON.set) {
                keep |= CapabilitySet::SYS_ADMIN;
            }
        }
        if self.signal {
            keep |= CapabilitySet::KILL;
        }
        keep & permitted
    }
}

/// Gives up every capability that `later` does not take, for good. `works` is asked with the reduced
/// rights whether what was opened before can still be used: kernels before 5.19 want CAP_BPF for each
/// look at a map.
///
/// Capabilities are a thread's, so this must be called before any other thread is started.
///
/// # Errors
/// The system's.
pub(super) fn give_up(later: Later, works: impl FnOnce() -> bool) -> io::Result<()> {
    let has = capabilities(None)?;
    let mut keep = later.takes(has.permitted);
    // The right to take capabilities out of the bounding set must be there while this is done.
    if has.effective.contains(CapabilitySet::SETPCAP) {
        for right in CapabilitySet::all().difference(keep).iter() {
            match remove_capability_from_bounding_set(right) {
                // A capability that this kernel does not have yet.
                Ok(()) | Err(Errno::INVAL) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
    clear_ambient_capability_set()?;
    set(keep, has.permitted)?;
    if !works() {
        keep |= has.permitted & (BPF.set | CapabilitySet::SYS_ADMIN);
    }
    set(keep, keep)?;
    Ok(set_no_new_privs(true)?)
}

fn set(effective: CapabilitySet, permitted: CapabilitySet) -> io::Result<()> {
    let sets = CapabilitySets {
        effective,
        permitted,
        inheritable: CapabilitySet::empty(),
    };
    Ok(set_capabilities(None, sets)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_kept_that_nothing_takes() {
        let root = CapabilitySet::all();
        assert!(Later::default().takes(root).is_empty());
        let signal = Later {
            signal: true,
            ..Later::default()
        };
        assert_eq!(signal.takes(root), CapabilitySet::KILL);
    }

    #[test]
    fn who_attaches_later_keeps_what_it_takes_and_no_more() {
        let attach = Later {
            attach: true,
            ..Later::default()
        };
        let four = CapabilitySet::BPF
            | CapabilitySet::PERFMON
            | CapabilitySet::DAC_READ_SEARCH
            | CapabilitySet::SYS_PTRACE;
        assert_eq!(attach.takes(CapabilitySet::all()), four);
        let old = CapabilitySet::SYS_ADMIN | CapabilitySet::CHOWN;
        assert_eq!(attach.takes(old), CapabilitySet::SYS_ADMIN);
    }

    #[test]
    fn what_was_given_up_is_gone_for_good() {
        // Capabilities are a thread's, so a thread of its own is all that is changed.
        let test = std::thread::spawn(|| {
            give_up(Later::default(), || true).unwrap();
            let left = capabilities(None).unwrap();
            assert!(left.permitted.is_empty() && left.effective.is_empty());
            let again = CapabilitySets {
                effective: BPF.set,
                permitted: BPF.set,
                inheritable: CapabilitySet::empty(),
            };
            assert!(set_capabilities(None, again).is_err());
            assert_eq!(missing(), Some(BPF));
        });
        test.join().unwrap();
    }

    #[test]
    fn an_old_kernel_leaves_what_maps_take() {
        let test = std::thread::spawn(|| {
            let before = capabilities(None).unwrap().permitted;
            give_up(Later::default(), || false).unwrap();
            let left = capabilities(None).unwrap().permitted;
            assert_eq!(left, before & (BPF.set | CapabilitySet::SYS_ADMIN));
        });
        test.join().unwrap();
    }
}
