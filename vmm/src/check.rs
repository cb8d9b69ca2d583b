//! What this host's KVM can and cannot do: `--check`.

use std::fmt;

use crate::arch::{self, Finding, has};
use crate::kvm::{self, Capability, Vm};

/// All of them.
#[derive(Clone, Debug)]
pub struct Report(Vec<Finding>);

impl Report {
    /// Asks KVM.
    ///
    /// # Errors
    /// When there is no KVM to ask, or it makes no virtual machine.
    pub fn new() -> Result<Self, kvm::Error> {
        let vm = Vm::new(None)?;
        let mut findings = vec![
            has(
                &vm,
                Capability::Irqfd,
                "interrupts without a system call",
                true,
                "devices",
            ),
            has(
                &vm,
                Capability::Ioeventfd,
                "doorbells without an exit",
                true,
                "virtio devices",
            ),
            has(
                &vm,
                Capability::ImmediateExit,
                "a stop that can't be lost",
                true,
                "migration",
            ),
            has(
                &vm,
                Capability::SignalMsi,
                "message-signalled interrupts",
                true,
                "virtio devices",
            ),
            Finding {
                what: format!("dirty rings of {} entries", vm.dirty_ring_max()),
                there: vm.dirty_ring_max() > 0,
                needed: false,
                without: "--dirty-ring-size does not work",
            },
            Finding {
                what: format!("{} vCPUs in a machine", vm.max_vcpus()),
                there: vm.max_vcpus() > 0,
                needed: true,
                without: "guests",
            },
        ];
        findings.extend(arch::check(&vm));
        Ok(Report(findings))
    }

    /// Whether guests run here, whatever else does not.
    pub fn runs_guests(&self) -> bool {
        self.0
            .iter()
            .all(|finding| finding.there || !finding.needed)
    }
}

/// A line for each, and one that sums them up.
impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "KVM on this host, {}:", arch::NAME)?;
        for finding in &self.0 {
            let Finding { what, without, .. } = finding;
            match (finding.there, finding.needed) {
                (true, _) => writeln!(f, "  yes  {what}")?,
                (false, true) => writeln!(f, "  NO   {what}: without it there are no {without}")?,
                (false, false) => writeln!(f, "  no   {what}: without it, {without}")?,
            }
        }
        f.write_str(if self.runs_guests() {
            "guests run on this host"
        } else {
            "no guest runs on this host"
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn finding(there: bool, needed: bool) -> Finding {
        Finding {
            what: "wings".into(),
            there,
            needed,
            without: "birds",
        }
    }

    #[test]
    fn only_what_is_needed_stops_guests() {
        for (there, needed, runs) in [
            (true, true, true),
            (false, false, true),
            (false, true, false),
        ] {
            let report = Report(vec![finding(true, true), finding(there, needed)]);
            assert_eq!(report.runs_guests(), runs);
            let text = report.to_string();
            assert_eq!(text.contains("NO   wings"), !runs, "{text}");
            assert_eq!(
                text.ends_with("no guest runs on this host"),
                !runs,
                "{text}"
            );
        }
    }
}
