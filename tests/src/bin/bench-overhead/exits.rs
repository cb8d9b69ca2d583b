//! How often a guest exits that does nothing else, while somebody watches and while nobody does: in a
//! second of its vCPU's CPU time, so that other work on the machine does not count.

use std::thread;
use std::time::Duration;

use anyhow::Result;
use harness::cpus::OnCpu;
use harness::{GuestView, Vmm, VmmOptions};
use serde_json::json;

use crate::attached::{Attached, Watcher};
use crate::{Arguments, LIMIT, rotated};

/// How long exits are counted.
const WINDOW: Duration = Duration::from_secs(1);

pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    let options = VmmOptions {
        memory: "32M".into(),
        cmdline: "exits=1".into(),
        ..VmmOptions::default()
    };
    let vmm = Vmm::spawn(&options)?;
    let guest = GuestView::open(vmm.pid())?;
    guest.wait_ready(LIMIT)?;
    let vcpu = OnCpu::open(vmm.pid())?;
    let mut kinds = vec![Watcher::Nobody, Watcher::Tool];
    if arguments.bpftrace {
        kinds.push(Watcher::Bpftrace);
    }
    for round in 0..arguments.runs {
        for watcher in rotated(&kinds, round) {
            let attached = Attached::start(watcher, &[vmm.pid()], &vmm.dir())?;
            // Whatever attaching has stirred up is over by then.
            thread::sleep(WINDOW / 4);
            let (before, start) = (guest.counter(0), vcpu.ns()?);
            thread::sleep(WINDOW);
            let (exits, ns) = (guest.counter(0) - before, vcpu.ns()? - start);
            let cpu = attached.as_ref().map(Attached::cpu).transpose()?;
            if let Some(attached) = attached {
                attached.stop()?;
            }
            let line = json!({
                "part": "exits",
                "round": round,
                "watcher": watcher,
                "per_second": exits as f64 * 1e9 / ns as f64,
                "watcher_cpu_ms": cpu.map(|cpu| cpu.as_secs_f64() * 1e3),
            });
            println!("{line}");
        }
    }
    Ok(())
}
