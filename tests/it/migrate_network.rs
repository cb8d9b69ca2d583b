//! Migrations over a network that is slow, that is gone for a while, and that never comes back. Each has a
//! network namespace of its own.

use std::io;
use std::process::Command;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use harness::skip::slow;
use harness::{Qmp, VmmOptions, skip};
use nix::errno::Errno;
use nix::sched::{CloneFlags, unshare};
use serde_json::{Value, json};

use crate::migrate::{LIMIT, Running};
use crate::migrate_control::{wait_status, wait_until};
use crate::migrate_tls;

/// The loopback of a namespace, which monitors that this thread starts are in.
struct Network;

impl Network {
    /// Calls `test` in a new namespace, unless this user or machine can't have one.
    fn with(test: impl FnOnce(&Network) -> Result<()> + Send) -> Result<()> {
        if let Err(error) = Command::new("ip").arg("-V").output() {
            ensure!(error.kind() == io::ErrorKind::NotFound, "{error}");
            skip!("iproute2 is not installed");
        }
        thread::scope(|scope| {
            // Under the test's name, by which it is skipped.
            let name = thread::current().name().unwrap_or_default().to_owned();
            let inside = thread::Builder::new().name(name).spawn_scoped(scope, || {
                match unshare(CloneFlags::CLONE_NEWNET) {
                    Err(Errno::EPERM) => skip!("this user can't make a network namespace"),
                    made => made.context("a network namespace")?,
                }
                Network.plug(true)?;
                test(&Network)
            })?;
            inside.join().expect("a test that does not panic")
        })
    }

    /// Plugs the cable in, or pulls it: what is sent then is lost, and nobody is told.
    fn plug(&self, in_: bool) -> Result<()> {
        let state = if in_ { "up" } else { "down" };
        run("ip", &["link", "set", "lo", state])
    }

    /// Calls `test` where packets go out by the queueing discipline `how`, unless there is none here.
    fn shaped(how: &[&str], test: impl FnOnce() -> Result<()> + Send) -> Result<()> {
        Network::with(|_| {
            let version = Command::new("tc").arg("-V").output();
            if !version.is_ok_and(|said| said.stdout.starts_with(b"tc utility, iproute2")) {
                skip!("iproute2's tc is not installed");
            }
            let device = ["qdisc", "add", "dev", "lo", "root"];
            match run("tc", &[&device, how].concat()) {
                Err(error) if error.to_string().contains("qdisc kind is unknown") => {
                    skip!("this kernel has no {}", how[0])
                }
                made => made.and_then(|()| test()),
            }
        })
    }
}

fn run(program: &str, arguments: &[&str]) -> Result<()> {
    let output = Command::new(program).args(arguments).output();
    let output = output.with_context(|| format!("starting {program}"))?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{program} {arguments:?}: {said}");
    Ok(())
}

fn options() -> VmmOptions {
    VmmOptions {
        memory: "32M".into(),
        cmdline: "dirty=256K".into(),
        extra: vec!["--verify-ram".into()],
        ..VmmOptions::default()
    }
}

/// Begins to migrate over TCP, from a source that was told what `set` tells it.
fn begin(set: impl FnOnce(&mut Qmp) -> Result<Value>) -> Result<(Running, Running)> {
    begin_with(&options(), set)
}

fn begin_with(
    options: &VmmOptions,
    set: impl FnOnce(&mut Qmp) -> Result<Value>,
) -> Result<(Running, Running)> {
    let mut source = Running::boot(options)?;
    let (destination, port) = migrate_tls::wait_for(options, "tcp")?;
    set(&mut source.vmm.qmp)?;
    let uri = format!("tcp:{}:{port}", migrate_tls::HOST);
    source.vmm.qmp.execute("migrate", json!({ "uri": uri }))?;
    Ok((source, destination))
}

/// RAM takes long enough to pull a cable meanwhile.
fn slowly(qmp: &mut Qmp) -> Result<Value> {
    let slowly = json!({ "max-bandwidth": 200_000 });
    qmp.execute("migrate-set-parameters", slowly)
}

fn paused(qmp: &mut Qmp) -> Result<Value> {
    let pause = json!([{ "capability": "pause-before-switchover", "state": true }]);
    qmp.execute("migrate-set-capabilities", json!({ "capabilities": pause }))
}

/// Neither side hears of the other any more: the guest is the source's, and both say why.
fn given_up(mut source: Running, mut destination: Running) -> Result<()> {
    for side in [&mut source, &mut destination] {
        let answer = side.vmm.qmp.wait_migrated(LIMIT)?;
        ensure!(answer["status"] == "failed", "{answer}");
        let why = answer["error-desc"].as_str().unwrap_or_default();
        ensure!(!why.is_empty(), "{answer}");
        eprintln!("{why}");
        let spans = answer["blackout"]["spans"].as_array();
        ensure!(spans.is_some_and(|spans| !spans.is_empty()), "{answer}");
    }
    let there = destination.guest.counter(0);
    source.runs()?;
    ensure!(destination.guest.counter(0) == there, "both run");
    Ok(())
}

#[test]
fn a_cable_that_is_pulled_while_ram_is_sent_leaves_the_guest_where_it_is() -> Result<()> {
    if !slow() {
        skip!("a side that is silent is given up after half a minute: run with --slow");
    }
    Network::with(|network| {
        let (mut source, destination) = begin(slowly)?;
        wait_until(&mut source, |answer| answer["ram"]["normal"] != 0)?;
        network.plug(false)?;
        given_up(source, destination)
    })
}

#[test]
fn a_cable_that_is_pulled_before_the_switchover_leaves_the_guest_where_it_is() -> Result<()> {
    if !slow() {
        skip!("a side that is silent is given up after half a minute: run with --slow");
    }
    Network::with(|network| {
        let (mut source, destination) = begin(paused)?;
        wait_status(&mut source, "pre-switchover")?;
        network.plug(false)?;
        let on = json!({ "state": "pre-switchover" });
        source.vmm.qmp.execute("migrate-continue", on)?;
        given_up(source, destination)
    })
}

#[test]
fn a_cable_that_is_plugged_in_again_lets_the_guest_go() -> Result<()> {
    Network::with(|network| {
        let (mut source, mut destination) = begin(slowly)?;
        wait_until(&mut source, |answer| answer["ram"]["normal"] != 0)?;
        network.plug(false)?;
        let fast = json!({ "max-bandwidth": 0 });
        source.vmm.qmp.execute("migrate-set-parameters", fast)?;
        thread::sleep(Duration::from_secs(1));
        let answer = source.vmm.qmp.execute("query-migrate", Value::Null)?;
        ensure!(answer["status"] == "active", "{answer}");
        network.plug(true)?;
        let answer = source.vmm.qmp.wait_migrated(LIMIT)?;
        ensure!(answer["status"] == "completed", "{answer}");
        destination.runs()
    })
}

/// The network's rate, and not the one at which buffers take bytes, is what the stop is decided by.
#[test]
fn a_slow_network_is_known_before_the_guest_is_stopped() -> Result<()> {
    let slow = ["tbf", "rate", "40mbit", "burst", "128kb", "latency", "2s"];
    let limit = |qmp: &mut Qmp| {
        let limit = json!({ "downtime-limit": 300 });
        qmp.execute("migrate-set-parameters", limit)
    };
    // Sums of all memory take longer than the rest of a stop does, and no limit knows of them.
    let options = VmmOptions {
        extra: Vec::new(),
        ..options()
    };
    Network::shaped(&slow, || {
        let (mut source, mut destination) = begin_with(&options, limit)?;
        let answer = source.vmm.qmp.wait_migrated(LIMIT)?;
        ensure!(answer["status"] == "completed", "{answer}");
        let downtime = answer["downtime"].as_u64().context("no downtime")?;
        ensure!(
            downtime <= 300,
            "{downtime} ms with a limit of 300: {answer}"
        );
        let mbps = answer["ram"]["mbps"].as_f64().context("no rate")?;
        ensure!(mbps < 60.0, "{mbps} Mbit/s over 40");
        destination.runs()
    })
}

/// One packet of fifty never arrives, and those that do come late: nothing of it reaches the guest.
#[test]
fn a_network_that_loses_packets_loses_no_memory() -> Result<()> {
    Network::shaped(&["netem", "delay", "5ms", "2ms", "loss", "2%"], || {
        let (mut source, mut destination) = begin(|_| Ok(Value::Null))?;
        let answer = source.vmm.qmp.wait_migrated(LIMIT)?;
        ensure!(answer["status"] == "completed", "{answer}");
        destination.runs()
    })
}
