//! Guests that go into files, through commands, and through what a client passed.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use harness::{GuestView, Vmm, VmmOptions, skip};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use serde_json::{Value, json};

use crate::migrate::{LIMIT, Running};

fn options() -> VmmOptions {
    VmmOptions {
        memory: "64M".into(),
        cmdline: "dirty=1M".into(),
        extra: vec!["--verify-ram".into()],
        ..VmmOptions::default()
    }
}

/// Saves the guest to `uri`, and returns how far it was then.
fn save(source: &mut Running, uri: &str) -> Result<u64> {
    let answer = source.vmm.qmp.migrate(uri, LIMIT)?;
    ensure!(answer["status"] == "completed", "{answer}");
    ensure!(source.vmm.qmp.status()? == "postmigrate");
    Ok(source.guest.counter(0))
}

/// A monitor that takes in what was saved, and has.
fn restore(uri: &str, saved: u64) -> Result<Running> {
    let mut vmm = Vmm::spawn(&options().incoming(uri))?;
    let guest = GuestView::open(vmm.pid())?;
    let answer = vmm.qmp.wait_migrated(LIMIT)?;
    ensure!(answer["status"] == "completed", "{answer}");
    let mut restored = Running { vmm, guest };
    restored.runs()?;
    let now = restored.guest.counter(0);
    ensure!(now > saved, "the guest went from {saved} to {now}");
    Ok(restored)
}

#[test]
fn a_guest_is_restored_from_a_file_as_often_as_one_likes() -> Result<()> {
    let mut source = Running::boot(&options())?;
    let uri = format!(
        "file:{},offset=4k",
        source.vmm.dir().join("guest").display()
    );
    let saved = save(&mut source, &uri)?;
    let mut first = restore(&uri, saved)?;
    // The saved guest is a copy now: whoever saved it can go on too.
    source.vmm.qmp.execute("cont", Value::Null)?;
    source.runs()?;
    // And one that was restored can be saved again.
    let again = format!("file:{}", source.vmm.dir().join("again").display());
    let saved_again = save(&mut first, &again)?;
    restore(&again, saved_again)?;
    restore(&uri, saved)?;
    Ok(())
}

/// A guest whose pages have places of their own in the file, however often they are written.
#[test]
fn a_guest_is_restored_from_a_file_that_is_no_longer_than_it() -> Result<()> {
    const RAM: u64 = 64 << 20;
    let mut source = Running::boot(&options())?;
    mapped(&mut source.vmm)?;
    let path = source.vmm.dir().join("guest");
    let uri = format!("file:{},offset=4k", path.display());
    // It can't be stopped before it has dirtied its pages a few times.
    let qmp = &mut source.vmm.qmp;
    let slow = json!({ "max-bandwidth": 20_000_000, "downtime-limit": 10 });
    qmp.execute("migrate-set-parameters", slow)?;
    qmp.execute("migrate", json!({ "uri": uri }))?;
    let rounds = |answer: &Value| answer["ram"]["dirty-sync-count"].as_u64();
    while rounds(&qmp.execute("query-migrate", Value::Null)?) < Some(5) {}
    qmp.execute("migrate-set-parameters", json!({ "downtime-limit": 300 }))?;
    let answer = qmp.wait_migrated(LIMIT)?;
    ensure!(answer["status"] == "completed", "{answer}");
    let saved = source.guest.counter(0);
    let file = fs::metadata(&path)?;
    ensure!(
        file.len() < RAM + (3 << 20),
        "the file has {} bytes",
        file.len()
    );
    let used = file.blocks() * 512;
    ensure!(
        used < RAM / 2,
        "{used} bytes for a guest that wrote a few MiB"
    );

    let mut first = restore(&uri, saved)?;
    mapped(&mut first.vmm)?;
    let again = format!("file:{}", source.vmm.dir().join("again").display());
    let saved_again = save(&mut first, &again)?;
    restore(&again, saved_again)?;
    restore(&uri, saved)?;

    let elsewhere = json!({ "uri": "tcp:127.0.0.1:9" });
    let error = source.vmm.qmp.expect_error("migrate", elsewhere)?;
    ensure!(
        error.desc == "Migration requires seekable transport (e.g. file)",
        "{error}"
    );
    Ok(())
}

fn mapped(vmm: &mut Vmm) -> Result<()> {
    let on = json!([{ "capability": "mapped-ram", "state": true }]);
    let capabilities = json!({ "capabilities": on });
    vmm.qmp.execute("migrate-set-capabilities", capabilities)?;
    Ok(())
}

#[test]
fn a_guest_goes_through_commands() -> Result<()> {
    let mut source = Running::boot(&options())?;
    let path = source.vmm.dir().join("guest.gz");
    let saved = save(&mut source, &format!("exec:gzip -1c > {}", path.display()))?;
    restore(&format!("exec:gzip -dc {}", path.display()), saved)?;
    Ok(())
}

#[test]
fn a_guest_goes_over_a_socket_that_was_passed() -> Result<()> {
    let mut source = Running::boot(&options())?;
    let mut vmm = Vmm::spawn(&options().incoming("defer"))?;
    let (here, there) = UnixStream::pair()?;
    source.vmm.qmp.pass("out", &here)?;
    vmm.qmp.pass("in", &there)?;
    drop((here, there));
    vmm.qmp
        .execute("migrate-incoming", json!({ "uri": "fd:in" }))?;
    let answer = source.vmm.qmp.migrate("fd:out", LIMIT)?;
    ensure!(answer["status"] == "completed", "{answer}");
    ensure!(
        answer["downtime"].is_u64(),
        "it is a connection: the destination says when the guest runs"
    );
    let gone = source
        .vmm
        .qmp
        .expect_error("closefd", json!({ "fdname": "out" }))?;
    ensure!(
        gone.desc == "File descriptor named 'out' not found",
        "{gone}"
    );
    let guest = GuestView::open(vmm.pid())?;
    Running { vmm, guest }.runs()
}

#[test]
fn a_disk_that_is_full_lets_the_guest_run_on() -> Result<()> {
    full_disk(Running::boot(&options())?)
}

#[test]
fn a_disk_that_is_full_has_no_place_for_pages_and_lets_the_guest_run_on() -> Result<()> {
    let mut source = Running::boot(&options())?;
    mapped(&mut source.vmm)?;
    full_disk(source)
}

fn full_disk(mut source: Running) -> Result<()> {
    let small = source.vmm.dir().join("small");
    let Some(_mounted) = Mounted::new(&small, "size=64k")? else {
        skip!("this user can't mount a file system");
    };
    let path = small.join("guest");
    let answer = source
        .vmm
        .qmp
        .migrate(&format!("file:{}", path.display()), LIMIT)?;
    ensure!(answer["status"] == "failed", "{answer}");
    let why = answer["error-desc"].as_str().unwrap_or_default();
    ensure!(why.contains("No space left on device"), "{why}");
    ensure!(fs::metadata(&path)?.len() == 0, "its room is not free");
    source.runs()?;

    // What did not fit is no guest, and one with more room is.
    let elsewhere = source.vmm.dir().join("guest");
    let saved = save(&mut source, &format!("file:{}", elsewhere.display()))?;
    restore(&format!("file:{}", elsewhere.display()), saved)?;
    Ok(())
}

#[test]
fn a_monitor_that_dies_while_it_saves_leaves_no_guest_behind() -> Result<()> {
    let mut source = Running::boot(&options())?;
    let path = source.vmm.dir().join("guest");
    let uri = format!("file:{}", path.display());
    let slow = json!({ "max-bandwidth": 100_000 });
    source.vmm.qmp.execute("migrate-set-parameters", slow)?;
    source.vmm.qmp.execute("migrate", json!({ "uri": uri }))?;
    while !fs::metadata(&path).is_ok_and(|file| file.len() > 0) {}
    let mut other = Vmm::spawn(&options().incoming("defer"))?;
    let incoming = json!({ "uri": uri });
    let busy = other
        .qmp
        .expect_error("migrate-incoming", incoming.clone())?;
    ensure!(
        busy.desc.ends_with("another process uses the file"),
        "{busy}"
    );
    source.vmm.kill()?;
    other.qmp.execute("migrate-incoming", incoming)?;
    let answer = other.qmp.wait_migrated(LIMIT)?;
    ensure!(answer["status"] == "failed", "{answer}");
    let why = answer["error-desc"].as_str().context("no reason")?;
    ensure!(why.contains("the migration stream ends at byte"), "{why}");
    Ok(())
}

/// A file system of its own, gone when this is.
struct Mounted<'a>(&'a Path);

impl<'a> Mounted<'a> {
    fn new(path: &'a Path, options: &str) -> Result<Option<Self>> {
        fs::create_dir(path)?;
        let (none, kind) = (None::<&str>, Some("tmpfs"));
        let mounted = mount(none, path, kind, MsFlags::empty(), Some(options));
        Ok(mounted.ok().map(|()| Mounted(path)))
    }
}

impl Drop for Mounted<'_> {
    fn drop(&mut self) {
        let _ = umount2(self.0, MntFlags::MNT_DETACH);
    }
}
