//! Every way to see KVM's calls sees the same, or says in one line why this kernel does not give it.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use blackout::analysis::describe;
use blackout::recording::Frame;
use harness::{GuestView, Vmm, VmmOptions, tool};

use crate::recorded::{Recording, finish, need_tool, recorder};

/// The testbed is emulated, and may share its machine.
const LIMIT: Duration = Duration::from_secs(300);

/// What each migration shows, whoever looks.
const SEEN: [&str; 2] = ["KVM_GET_DIRTY_LOG", "KVM_SET_USER_MEMORY_REGION"];

/// What it shows besides on arm64.
const TABLES: [&str; 3] = [
    "ITS_SAVE_TABLES",
    "VGIC_SAVE_PENDING_TABLES",
    "ITS_RESTORE_TABLES",
];

#[test]
fn tracepoints_see_a_migration() -> Result<()> {
    need_tool!();
    sees("tracepoint")
}

#[test]
fn trampolines_see_a_migration_or_say_why_not() -> Result<()> {
    need_tool!();
    sees("fentry")
}

#[test]
fn kprobes_see_a_migration_or_say_why_not() -> Result<()> {
    need_tool!();
    sees("kprobe")
}

/// Migrates a guest under a recorder that has to use `backend`.
fn sees(backend: &str) -> Result<()> {
    let options = VmmOptions {
        memory: "32M".into(),
        cmdline: "its_devices=16 its_events=16".into(),
        ..VmmOptions::default()
    };
    let mut source = Vmm::spawn(&options)?;
    GuestView::open(source.pid())?.wait_ready(LIMIT)?;
    // Both are there before the recorder is: it may attach to a new one later than that has migrated.
    let uri = format!("unix:{}", source.dir().join("migration").display());
    let destination = Vmm::spawn(&options.incoming(&uri))?;
    let dir = tempfile::tempdir()?;
    let how = ["--all", "--backend", backend];
    let recorder = match recorder(dir.path(), &how) {
        Ok(recorder) => recorder,
        Err(error) => return refused(backend, &format!("{error:#}")),
    };
    source.qmp.migrate(&uri, LIMIT)?;
    GuestView::open(destination.pid())?.wait_progress(0, LIMIT)?;
    let pids = [source.pid(), destination.pid()];
    let recording = finish(recorder, dir.path())?;

    let Some(Frame::Header(header)) = recording.frames.first() else {
        anyhow::bail!("no header");
    };
    let backends = &header.backends;
    ensure!(backends.iter().any(|way| way == backend), "{backends:?}");
    let ours = recording.ioctls().filter(|call| pids.contains(&call.pid));
    let names: BTreeSet<_> = ours.map(describe::ioctl).collect();
    let tables = TABLES.iter().filter(|_| cfg!(target_arch = "aarch64"));
    let missing: Vec<_> = SEEN
        .iter()
        .chain(tables)
        .filter(|name| !names.contains(**name))
        .collect();
    ensure!(
        missing.is_empty(),
        "{backend} does not see {missing:?}: {names:?}"
    );
    functions(backend, &recording)?;

    let report = tool::report(&dir.path().join("recording"))?;
    let migration = report["migrations"]
        .as_array()
        .and_then(|all| all.iter().find(|one| one["view"] == "probes"))
        .context("no migration")?;
    let ns = |name: &str| migration[name].as_u64().filter(|ns| *ns > 0);
    let (downtime_ns, blackout_ns) = (ns("downtime_ns"), ns("blackout_ns"));
    println!("{backend}: downtime {downtime_ns:?} ns, blackout {blackout_ns:?} ns, {backends:?}");
    ensure!(
        downtime_ns.is_some() && blackout_ns.is_some(),
        "{migration}"
    );
    Ok(())
}

/// KVM's functions behind the tables are seen by the two ways that look into KVM.
fn functions(backend: &str, recording: &Recording) -> Result<()> {
    let seen: BTreeSet<_> = recording
        .frames
        .iter()
        .filter_map(|frame| match frame {
            Frame::KernelFn(function) => Some(function.function.as_str()),
            _ => None,
        })
        .collect();
    println!("{backend}: functions {seen:?}");
    let looks = cfg!(target_arch = "aarch64") && backend != "tracepoint";
    ensure!(
        !looks || seen.contains("vgic_its_save_tables_v0"),
        "{backend} sees only {seen:?}"
    );
    Ok(())
}

/// A kernel that has not this way: the tool names it and the kernel's reason in one line, and goes
/// another way when it is left the choice.
fn refused(backend: &str, error: &str) -> Result<()> {
    let said = error
        .split_once(": ")
        .map_or(error, |(_, said)| said)
        .trim();
    println!("{backend}: {said}");
    ensure!(said.lines().count() == 1, "not one line: {said}");
    ensure!(
        said.contains("KVM ioctls"),
        "does not say what is missing: {said}"
    );
    ensure!(backend != "tracepoint", "tracepoints are everywhere");
    let dir = tempfile::tempdir()?;
    let recording = finish(recorder(dir.path(), &["--all"])?, dir.path())?;
    let Some(Frame::Header(header)) = recording.frames.first() else {
        anyhow::bail!("no header");
    };
    ensure!(
        header.backends.iter().any(|way| way == "tracepoint"),
        "{:?}",
        header.backends
    );
    Ok(())
}
