//! The bare-metal guest.

use std::time::Duration;

use anyhow::{Context, Result};
use harness::pair::free_port;
use harness::{GuestView, Vmm, VmmOptions};

use super::{Arguments, Stage};

/// How long the guest may take to set itself up, and the migration to end: the testbed is slow.
const LIMIT: Duration = Duration::from_secs(120);

/// Migrates it once.
pub(super) fn run(arguments: &Arguments, stage: &Stage) -> Result<()> {
    let Arguments {
        devices,
        events,
        memory,
        dirty,
        cpus,
        ..
    } = arguments;
    let memory = memory.as_deref().unwrap_or("128M");
    stage.say(format!(
        "booting a guest: {cpus} vCPU, {memory} of RAM, {dirty} of it kept dirty"
    ));
    let options = VmmOptions {
        memory: memory.to_owned(),
        cpus: *cpus,
        cmdline: format!("its_devices={devices} its_events={events} dirty={dirty} cpus={cpus}"),
        ..VmmOptions::default()
    };
    let mut source = Vmm::spawn(&options)?;
    let guest = GuestView::open(source.pid())?;
    guest
        .wait_ready(LIMIT)
        .with_context(|| format!("the console says: {}", source.console()))?;
    guest.wait_progress(0, LIMIT)?;
    if guest.events() > 0 {
        stage.say(format!(
            "the guest's ITS maps {} devices, {} events",
            guest.devices(),
            guest.events()
        ));
    }

    let uri = if arguments.unix {
        format!("unix:{}", source.dir().join("migration").display())
    } else {
        format!("tcp:127.0.0.1:{}", free_port()?)
    };
    let destination = Vmm::spawn(&options.incoming(&uri))?;
    let recorder = stage.record(&mut source, &destination)?;
    guest.wait_progress(0, LIMIT)?;

    stage.say(format!("QMP migrate {uri}"));
    stage.keep(&source.qmp.migrate(&uri, LIMIT)?)?;
    GuestView::open(destination.pid())?.wait_progress(0, LIMIT)?;
    stage.say("the guest runs at the destination");
    stage.report(recorder)
}
