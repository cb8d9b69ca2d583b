//! Whatever goes wrong, the guest is in one place, and QMP says what it was.

use std::env::consts::ARCH;
use std::net::{TcpListener, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use blackout_abi::guest::command;
use harness::pair::free_port;
use harness::proxy::{Act, At, Meddle, Proxy, Way, kind};
use harness::skip::slow;
use harness::{Vmm, skip};
use serde_json::{Value, json};

use super::migrate::{LIMIT, Running, small};

/// A source, a destination, and a man in the middle.
struct Faulty {
    source: Running,
    destination: Running,
    proxy: Proxy,
}

impl Faulty {
    fn new(way: Way, at: At, act: Act) -> Result<Self> {
        let options = small();
        let source = Running::boot(&options)?;
        let destination = Running::wait_for(&options)?;
        let meddle = Meddle { way, at, act };
        let proxy = Proxy::start(&source.vmm.dir(), &destination.path(), meddle)?;
        Ok(Faulty {
            source,
            destination,
            proxy,
        })
    }

    /// Starts the migration and waits until the stream is held at its place.
    fn hold(&mut self) -> Result<()> {
        self.source
            .vmm
            .qmp
            .execute("migrate", json!({ "uri": self.proxy.uri() }))?;
        self.proxy.wait_reached(LIMIT)
    }

    /// Lets the stream go on and waits for the end of the migration at the source.
    fn outcome(&mut self) -> Result<Value> {
        self.proxy.release();
        self.source.vmm.qmp.wait_migrated(LIMIT)
    }
}

/// What must hold after every failure before the commit: the guest runs on at the source, and QMP
/// names the cause.
fn failed(source: &mut Running, answer: &Value, cause: &str) -> Result<()> {
    ensure!(answer["status"] == "failed", "{answer}");
    let error = answer["error-desc"].as_str().context("no error-desc")?;
    ensure!(error.contains(cause), "'{error}' does not name '{cause}'");
    ensure!(
        answer["blackout"]["spans"].is_array(),
        "the breakdown is not kept"
    );
    source.runs()
}

#[test]
fn a_refused_connection() -> Result<()> {
    let mut source = Running::boot(&small())?;
    let port = free_port()?;
    let uri = format!("tcp:127.0.0.1:{port}");
    let answer = source.vmm.qmp.migrate(&uri, LIMIT)?;
    let cause = format!("connecting to {uri}: Connection refused");
    failed(&mut source, &answer, &cause)?;
    let answer = source.vmm.qmp.migrate("unix:/nowhere/at/all", LIMIT)?;
    failed(
        &mut source,
        &answer,
        "connecting to unix:/nowhere/at/all: No such file or directory",
    )
}

#[test]
fn a_bad_uri() -> Result<()> {
    let mut source = Running::boot(&small())?;
    for (uri, cause) in [
        ("nonsense", "migration URI 'nonsense': unknown transport"),
        ("tcp:localhost", "there is no port"),
        ("tcp:localhost:99999", "the port is not a number"),
        ("unix:", "there is no path"),
        ("defer", "'defer' is for a destination"),
    ] {
        let error = source
            .vmm
            .qmp
            .expect_error("migrate", json!({ "uri": uri }))?;
        ensure!(error.class == "GenericError", "{error}");
        ensure!(error.desc.contains(cause), "{error}");
        ensure!(
            error
                .desc
                .contains("use tcp:HOST:PORT, tls:HOST:PORT, unix:PATH"),
            "{error}"
        );
    }
    source.runs()
}

#[test]
fn a_machine_that_can_not_take_a_guest_in() -> Result<()> {
    let mut source = Running::boot(&small())?;
    let here = json!({ "uri": "tcp:127.0.0.1:0" });
    let error = source.vmm.qmp.expect_error("migrate-incoming", here)?;
    ensure!(
        error
            .desc
            .contains("a VM that is running can't take in a migration"),
        "{error}"
    );

    let mut waiting = Vmm::spawn(&small().incoming("defer"))?;
    let error = waiting
        .qmp
        .expect_error("migrate", json!({ "uri": "tcp:a:1" }))?;
    ensure!(
        error.desc == "Guest is waiting for an incoming migration",
        "{error}"
    );
    let bad = json!({ "uri": "unix:/nowhere/at/all" });
    let error = waiting.qmp.expect_error("migrate-incoming", bad)?;
    ensure!(error.desc.contains("/nowhere/at/all"), "{error}");
    Ok(())
}

#[test]
fn a_destination_of_another_shape() -> Result<()> {
    let mut source = Running::boot(&small())?;
    let mut options = small();
    options.memory = "64M".into();
    let destination = Running::wait_for(&options)?;
    let answer = source.vmm.qmp.migrate(&destination.uri(), LIMIT)?;
    failed(&mut source, &answer, "its RAM is 0x4000000 bytes at")
}

#[test]
fn a_destination_killed_before_the_migration() -> Result<()> {
    let mut source = Running::boot(&small())?;
    let mut destination = Running::wait_for(&small())?;
    let uri = destination.uri();
    destination.vmm.kill()?;
    let answer = source.vmm.qmp.migrate(&uri, LIMIT)?;
    failed(&mut source, &answer, "connecting to unix:")
}

/// Kills the destination when the stream is at a place before the commit.
fn killed_at(way: Way, kind: u16, before: u32) -> Result<()> {
    let mut faulty = Faulty::new(way, At::Message(kind, before), Act::Hold)?;
    faulty.hold()?;
    faulty.destination.vmm.kill()?;
    let answer = faulty.outcome()?;
    failed(&mut faulty.source, &answer, "migration stream")
}

#[test]
fn a_destination_killed_during_the_ram_rounds() -> Result<()> {
    killed_at(Way::ToDestination, kind::RAM, 1)
}

#[test]
fn a_destination_killed_after_the_ram_rounds() -> Result<()> {
    killed_at(Way::ToDestination, kind::DEVICE, 0)
}

#[test]
fn a_destination_killed_with_everything_sent() -> Result<()> {
    killed_at(Way::ToDestination, kind::END, 0)
}

#[test]
fn a_destination_killed_after_the_commit() -> Result<()> {
    let mut faulty = Faulty::new(Way::ToDestination, At::Message(kind::COMMIT, 0), Act::Hold)?;
    faulty.hold()?;
    faulty.destination.vmm.kill()?;
    let answer = faulty.outcome()?;
    ensure!(answer["status"] == "unknown", "{answer}");
    let error = answer["error-desc"].as_str().context("no error-desc")?;
    ensure!(
        error.contains("it is unknown whether the destination runs the guest"),
        "{error}"
    );
    let qmp = &mut faulty.source.vmm.qmp;
    ensure!(qmp.status()? == "postmigrate");
    let again = qmp.expect_error("migrate", json!({ "uri": "tcp:a:1" }))?;
    ensure!(
        again.desc.contains("paused due to previous migration"),
        "{again}"
    );
    // A person has made sure that the destination is dead.
    qmp.execute("cont", Value::Null)?;
    faulty.source.runs()
}

#[test]
fn a_connection_lost_after_the_destination_started() -> Result<()> {
    let mut faulty = Faulty::new(Way::ToSource, At::Message(kind::RUNNING, 0), Act::Cut)?;
    faulty
        .source
        .vmm
        .qmp
        .execute("migrate", json!({ "uri": faulty.proxy.uri() }))?;
    let answer = faulty.outcome()?;
    ensure!(answer["status"] == "unknown", "{answer}");
    faulty.destination.runs()?;
    ensure!(faulty.source.vmm.qmp.status()? == "postmigrate");
    let stopped = faulty.source.guest.counter(0);
    faulty.destination.guest.wait_progress(0, LIMIT)?;
    ensure!(faulty.source.guest.counter(0) == stopped, "both run");
    Ok(())
}

#[test]
fn a_destination_that_is_told_to_quit_while_it_waits_for_the_commit() -> Result<()> {
    let mut faulty = Faulty::new(Way::ToSource, At::Message(kind::LOADED, 0), Act::Hold)?;
    faulty.hold()?;
    let asked = Instant::now();
    faulty.destination.vmm.qmp.execute("quit", Value::Null)?;
    faulty.destination.vmm.wait_exit(LIMIT)?;
    let took = asked.elapsed();
    ensure!(took < Duration::from_secs(15), "{took:?}");
    faulty.proxy.release();
    // Whether the source hears of the end before it commits is a matter of who is quicker.
    let answer = faulty.source.vmm.qmp.wait_migrated(LIMIT)?;
    if answer["status"] == "unknown" {
        faulty.source.vmm.qmp.execute("cont", Value::Null)?;
    } else {
        ensure!(answer["status"] == "failed", "{answer}");
    }
    faulty.source.runs()
}

#[test]
fn a_source_killed_before_the_commit() -> Result<()> {
    let mut faulty = Faulty::new(Way::ToSource, At::Message(kind::LOADED, 0), Act::Hold)?;
    faulty.hold()?;
    faulty.source.vmm.kill()?;
    faulty.proxy.release();
    let answer = faulty.destination.vmm.qmp.wait_migrated(LIMIT)?;
    ensure!(answer["status"] == "failed", "{answer}");
    ensure!(faulty.destination.vmm.qmp.status()? == "internal-error");
    let error = faulty
        .destination
        .vmm
        .qmp
        .expect_error("cont", Value::Null)?;
    ensure!(
        error.desc == "Resetting the Virtual Machine is required",
        "{error}"
    );
    Ok(())
}

#[test]
fn a_truncated_stream_says_where_and_can_be_tried_again() -> Result<()> {
    for byte in [4, 20, 100, 5_000, 250_000] {
        let mut faulty = Faulty::new(Way::ToDestination, At::Byte(byte), Act::Cut)?;
        let answer = faulty.source.vmm.qmp.migrate(&faulty.proxy.uri(), LIMIT)?;
        failed(&mut faulty.source, &answer, "migration stream")?;
        let there = faulty.destination.vmm.qmp.wait_migrated(LIMIT)?;
        let error = there["error-desc"].as_str().unwrap_or_default();
        let place = format!("the migration stream ends at byte {byte}, ");
        // It may be about to acknowledge pages when the connection goes.
        let cut = error.starts_with(&place) || error.contains("Broken pipe");
        ensure!(cut, "{there}");

        ensure!(faulty.destination.vmm.qmp.status()? == "inmigrate");
        let uri = faulty.destination.uri();
        faulty
            .destination
            .vmm
            .qmp
            .execute("migrate-incoming", json!({ "uri": uri }))?;
        let answer = faulty.source.vmm.qmp.migrate(&uri, LIMIT)?;
        ensure!(answer["status"] == "completed", "{answer}");
        faulty.destination.runs()?;
    }
    Ok(())
}

#[test]
fn a_flipped_bit_is_found() -> Result<()> {
    for (byte, cause) in [
        (2, "does not speak this monitor's migration protocol"),
        (9, "is corrupt in the frame at byte 8: its checksum"),
        (600, "migration stream is corrupt in the frame at byte"),
        (250_000, "migration stream is corrupt in the frame at byte"),
    ] {
        let mut faulty = Faulty::new(Way::ToDestination, At::Byte(byte), Act::Flip)?;
        let answer = faulty.source.vmm.qmp.migrate(&faulty.proxy.uri(), LIMIT)?;
        failed(&mut faulty.source, &answer, cause)?;
        let there = faulty.destination.vmm.qmp.wait_migrated(LIMIT)?;
        let error = there["error-desc"].as_str().unwrap_or_default();
        ensure!(error.contains(cause), "{there}");
    }
    Ok(())
}

#[test]
fn a_switchover_that_is_held_answers_and_can_be_cancelled() -> Result<()> {
    let mut faulty = Faulty::new(Way::ToSource, At::Message(kind::LOADED, 0), Act::Hold)?;
    faulty.hold()?;
    let qmp = &mut faulty.source.vmm.qmp;
    let answer = qmp.execute("query-migrate", Value::Null)?;
    ensure!(answer["status"] == "device", "{answer}");
    ensure!(qmp.status()? == "finish-migrate");
    let error = qmp.expect_error("cont", Value::Null)?;
    ensure!(error.desc == "Migration is not finalized yet", "{error}");
    let busy = qmp.expect_error("migrate", json!({ "uri": "tcp:a:1" }))?;
    ensure!(
        busy.desc == "There's a migration process in progress",
        "{busy}"
    );
    qmp.execute("migrate_cancel", Value::Null)?;
    let answer = qmp.wait_migrated(LIMIT)?;
    ensure!(answer["status"] == "cancelled", "{answer}");
    faulty.source.runs()?;
    faulty.proxy.release();
    let there = faulty.destination.vmm.qmp.wait_migrated(LIMIT)?;
    ensure!(there["status"] == "failed", "{there}");
    Ok(())
}

#[test]
fn a_cancel_while_nobody_answers() -> Result<()> {
    let mut source = Running::boot(&small())?;
    // Once the queue of a listener that never accepts is full, the kernel drops what comes.
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let address = listener.local_addr()?;
    let mut queue = Vec::new();
    while let Ok(stream) = TcpStream::connect_timeout(&address, Duration::from_millis(200)) {
        queue.push(stream);
    }
    let uri = format!("tcp:{address}");
    let qmp = &mut source.vmm.qmp;
    qmp.execute("migrate", json!({ "uri": uri }))?;
    thread::sleep(Duration::from_millis(100));
    ensure!(qmp.execute("query-migrate", Value::Null)?["status"] == "setup");
    let cancelled = Instant::now();
    qmp.execute("migrate_cancel", Value::Null)?;
    let answer = qmp.wait_migrated(LIMIT)?;
    ensure!(answer["status"] == "cancelled", "{answer}");
    ensure!(
        cancelled.elapsed() < Duration::from_secs(5),
        "{:?}",
        cancelled.elapsed()
    );
    source.runs()
}

#[test]
fn a_connection_that_stalls_during_the_switchover() -> Result<()> {
    if !slow() {
        skip!("it takes half a minute: run with --slow");
    }
    let mut faulty = Faulty::new(Way::ToSource, At::Message(kind::LOADED, 0), Act::Hold)?;
    faulty.hold()?;
    let answer = faulty.source.vmm.qmp.wait_migrated(LIMIT)?;
    failed(&mut faulty.source, &answer, "timed out (os error 110)")?;
    let there = faulty.destination.vmm.qmp.wait_migrated(LIMIT)?;
    ensure!(there["status"] == "failed", "{there}");
    Ok(())
}

#[test]
fn a_cancel_during_the_ram_rounds() -> Result<()> {
    let mut faulty = Faulty::new(Way::ToDestination, At::Message(kind::RAM, 1), Act::Hold)?;
    faulty.hold()?;
    let qmp = &mut faulty.source.vmm.qmp;
    ensure!(qmp.execute("query-migrate", Value::Null)?["status"] == "active");
    qmp.execute("migrate_cancel", Value::Null)?;
    let answer = qmp.wait_migrated(LIMIT)?;
    ensure!(answer["status"] == "cancelled", "{answer}");
    faulty.source.runs()
}

#[test]
fn a_guest_that_was_paused_arrives_paused() -> Result<()> {
    let mut source = Running::boot(&small())?;
    let mut destination = Running::wait_for(&small())?;
    source.vmm.qmp.execute("stop", Value::Null)?;
    let answer = source.vmm.qmp.migrate(&destination.uri(), LIMIT)?;
    ensure!(
        answer["status"] == "completed" && answer["downtime"].is_null(),
        "{answer}"
    );
    destination.vmm.qmp.wait_migrated(LIMIT)?;
    ensure!(destination.vmm.qmp.status()? == "paused");
    destination.vmm.qmp.execute("cont", Value::Null)?;
    destination.runs()
}

/// The guest itself can make its ITS one that can't move, which KVM finds when it saves the tables or
/// only when it restores them.
#[test]
fn an_its_that_can_not_be_moved() -> Result<()> {
    if ARCH != "aarch64" {
        skip!("only arm64 has an ITS");
    }
    let mut options = small();
    options.cmdline = "its_devices=16 its_events=4 dirty=256K".into();
    let mut source = Running::boot(&options)?;
    for (way, span) in [(1, "its_restore_tables"), (2, "its_save_tables")] {
        source.guest.command(command::BREAK_ITS, way, LIMIT)?;
        let destination = Running::wait_for(&options)?;
        let answer = source.vmm.qmp.migrate(&destination.uri(), LIMIT)?;
        failed(&mut source, &answer, "its")?;
        failed(&mut source, &answer, "Bad address (os error 14)")?;
        let spans = answer["blackout"]["spans"].as_array().context("no spans")?;
        let Some(span) = spans.iter().find(|found| found["name"] == span) else {
            bail!("{span} is not in the breakdown: {answer}");
        };
        ensure!(span["rc"].as_i64().unwrap_or_default() < 0, "{span}");
        source.guest.command(command::MEND_ITS, 0, LIMIT)?;
    }
    let mut destination = Running::wait_for(&options)?;
    let answer = source.vmm.qmp.migrate(&destination.uri(), LIMIT)?;
    ensure!(answer["status"] == "completed", "{answer}");
    destination.runs()
}
