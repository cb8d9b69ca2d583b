//! Hundreds of faults, at every message and at every probe of a migration: at most one copy runs, its
//! progress is neither lost nor repeated, and `query-migrate` says what happened. Slow tier.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use harness::proxy::{Act, At, Meddle, Proxy, Way};
use harness::skip::slow;
use harness::{programs, skip};
use serde_json::{Value, json};

use crate::migrate::{LIMIT, Running, small};
use crate::migrate_tls;

/// Pairs of monitors at a time: most of a fault's time is spent on waiting.
const WORKERS: usize = 6;
/// How long a guest that runs may take to show it.
const GLANCE: Duration = Duration::from_millis(40);
/// A connection that says nothing is given up after 30 s by each side, and by both at the same time.
const GIVEN_UP: Duration = Duration::from_secs(60);

/// Messages by their kind, who sends them, and how many of a kind there are at least.
const MESSAGES: [(&str, u16, Way, u32); 14] = [
    ("hello", 1, Way::ToDestination, 1),
    ("welcome", 2, Way::ToSource, 1),
    ("ping", 3, Way::ToDestination, 8),
    ("pong", 4, Way::ToSource, 8),
    ("ram", 5, Way::ToDestination, 2),
    ("ack", 6, Way::ToSource, 2),
    ("round-end", 7, Way::ToDestination, 2),
    ("round-loaded", 8, Way::ToSource, 1),
    ("device", 9, Way::ToDestination, 3),
    ("end", 10, Way::ToDestination, 1),
    ("loaded", 11, Way::ToSource, 1),
    ("commit", 12, Way::ToDestination, 1),
    ("running", 13, Way::ToSource, 1),
    ("failure", 14, Way::ToSource, 0),
];

/// Probes that the source passes, in the order of the path.
const AT_SOURCE: [&str; 20] = [
    "migration_connect_begin",
    "migration_connect_end",
    "migration_thread_begin",
    "ram_round_begin",
    "ram_round_end",
    "migration_stop_vm_begin",
    "vm_stop_begin",
    "do_vm_stop_begin",
    "pause_all_vcpus_end",
    "vm_state_notify_begin",
    "vm_state_handler_end",
    "migration_stop_vm_end",
    "ram_final_begin",
    "ram_final_end",
    "device_save_begin",
    "device_save_end",
    "switchover_begin",
    "migration_commit_begin",
    "migration_commit_end",
    "switchover_end",
];

/// Probes that the destination passes.
const AT_DESTINATION: [&str; 11] = [
    "migrate_incoming_begin",
    "ram_load_begin",
    "ram_load_end",
    "device_load_begin",
    "device_load_end",
    "migration_verify_begin",
    "migration_verify_end",
    "switchover_begin",
    "switchover_end",
    "vm_start_begin",
    "vm_start_end",
];

/// What happens to a migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    KillSource,
    KillDestination,
    Cut,
    Flip,
    Cancel,
    Stall,
}

/// Where.
#[derive(Clone, Copy, Debug)]
enum Place {
    Message(&'static str, u16, Way, u32),
    Probe(&'static str),
}

/// What the guest goes over.
#[derive(Clone, Copy, Debug)]
enum Over<'a> {
    /// One connection.
    Unix,
    /// Several encrypted ones, with the credentials in this folder.
    TlsLanes(&'a Path),
}

/// How it ended, seen from outside.
type Outcomes = BTreeMap<(String, String), BTreeMap<String, usize>>;

#[test]
fn faults_at_every_message_and_every_probe() -> Result<()> {
    if !slow() {
        skip!("hundreds of migrations: run with --slow");
    }
    let mut faults = Vec::new();
    for repeat in 0..8 {
        for (name, kind, way, count) in MESSAGES.into_iter().filter(|(.., count)| *count > 0) {
            let place = Place::Message(name, kind, way, repeat % count);
            let everywhere = [
                Fault::KillSource,
                Fault::KillDestination,
                Fault::Cut,
                Fault::Flip,
            ];
            faults.extend(everywhere.map(|fault| (place, fault)));
            if repeat == 0 {
                faults.extend([Fault::Cancel, Fault::Stall].map(|fault| (place, fault)));
            }
        }
    }
    if has_bpftrace() {
        faults.extend(at_probes().chain(at_probes()));
    }
    campaign(faults, Over::Unix)
}

#[test]
fn faults_at_every_probe_over_encrypted_connections() -> Result<()> {
    if !slow() {
        skip!("dozens of migrations: run with --slow");
    }
    if !has_bpftrace() {
        skip!("bpftrace kills the monitors at their probes, and is not installed");
    }
    let folder = migrate_tls::credentials()?;
    campaign(at_probes().collect(), Over::TlsLanes(folder.path()))
}

fn has_bpftrace() -> bool {
    Command::new("bpftrace").arg("--version").output().is_ok()
}

fn at_probes() -> impl Iterator<Item = (Place, Fault)> {
    let here = AT_SOURCE.map(|probe| (Place::Probe(probe), Fault::KillSource));
    let there = AT_DESTINATION.map(|probe| (Place::Probe(probe), Fault::KillDestination));
    here.into_iter().chain(there)
}

/// Injects all of them, several at a time, and says how each ended.
fn campaign(faults: Vec<(Place, Fault)>, over: Over<'_>) -> Result<()> {
    let total = faults.len();
    let left = Mutex::new(faults);
    let (outcomes, wrong) = (Mutex::new(Outcomes::new()), Mutex::new(Vec::new()));
    thread::scope(|scope| {
        for _ in 0..WORKERS {
            scope.spawn(|| {
                loop {
                    let next = left.lock().expect("the faults").pop();
                    let Some((place, fault)) = next else { return };
                    let (name, what) = describe(place, fault);
                    match inject(place, fault, over) {
                        Ok(outcome) => {
                            let mut outcomes = outcomes.lock().expect("the outcomes");
                            let row = outcomes.entry((name, what)).or_default();
                            *row.entry(outcome).or_default() += 1;
                        }
                        Err(error) => {
                            let line = format!("{name}, {what}: {error:#}");
                            eprintln!("{line}");
                            wrong.lock().expect("the list").push(line);
                        }
                    }
                }
            });
        }
    });
    let outcomes = outcomes.into_inner().expect("the outcomes");
    for ((place, fault), ends) in &outcomes {
        let ends: Vec<_> = ends.iter().map(|(end, n)| format!("{n} × {end}")).collect();
        eprintln!("{place:26} {fault:17} {}", ends.join(", "));
    }
    let wrong = wrong.into_inner().expect("the list");
    ensure!(wrong.is_empty(), "{} of {total}: {wrong:#?}", wrong.len());
    let injected: usize = outcomes.values().flat_map(BTreeMap::values).sum();
    eprintln!("{injected} faults");
    ensure!(injected >= 500 || total < 500, "{injected} faults");
    Ok(())
}

fn describe(place: Place, fault: Fault) -> (String, String) {
    let place = match place {
        Place::Message(name, ..) => format!("message {name}"),
        Place::Probe(name) => name.to_owned(),
    };
    (place, format!("{fault:?}"))
}

/// Migrates with one fault, judges what is left, and says what that is.
fn inject(place: Place, fault: Fault, over: Over<'_>) -> Result<String> {
    let (mut source, mut destination, uri) = pair(over)?;
    let before = source.guest.counter(0);
    let mut lives = [fault != Fault::KillSource, fault != Fault::KillDestination];
    let mut answers = [Value::Null, Value::Null];
    match place {
        Place::Probe(probe) => {
            let victim = match fault {
                Fault::KillSource => source.vmm.pid(),
                _ => destination.vmm.pid(),
            };
            let mut killer = kill_at(victim, probe)?;
            let uri = json!({ "uri": uri });
            // The source may be killed before it has answered.
            let begun = source.vmm.qmp.execute("migrate", uri);
            ensure!(begun.is_ok() || !lives[0], "{begun:?}");
            let ended = match fault {
                Fault::KillSource => source.vmm.wait_exit(LIMIT),
                _ => destination.vmm.wait_exit(LIMIT),
            };
            killer.kill()?;
            killer.wait()?;
            ended.context("the probe did not fire")?;
        }
        Place::Message(_, kind, way, before) => {
            let act = match fault {
                Fault::Cut => Act::Cut,
                Fault::Flip => Act::Flip,
                _ => Act::Hold,
            };
            let at = At::Message(kind, before);
            let meddle = Meddle { way, at, act };
            let proxy = Proxy::start(&source.vmm.dir(), &destination.path(), meddle)?;
            let uri = json!({ "uri": proxy.uri() });
            source.vmm.qmp.execute("migrate", uri)?;
            proxy.wait_reached(LIMIT)?;
            match fault {
                Fault::KillSource => source.vmm.kill()?,
                Fault::KillDestination => destination.vmm.kill()?,
                Fault::Cancel => drop(source.vmm.qmp.execute("migrate_cancel", Value::Null)?),
                Fault::Stall => answers[0] = source.vmm.qmp.wait_migrated(GIVEN_UP)?,
                Fault::Cut | Fault::Flip => {}
            }
            proxy.release();
        }
    }
    for (side, running) in [&mut source, &mut destination].into_iter().enumerate() {
        if lives[side] {
            answers[side] = match connected(running, fault)? {
                true => running.vmm.qmp.wait_migrated(LIMIT)?,
                false => json!({ "status": "setup" }),
            };
        }
    }
    judge(&mut source, &mut destination, before, &mut lives, &answers)
}

/// Two monitors, and where the second one listens.
fn pair(over: Over<'_>) -> Result<(Running, Running, String)> {
    let Over::TlsLanes(folder) = over else {
        let options = small();
        let source = Running::boot(&options)?;
        let destination = Running::wait_for(&options)?;
        let uri = destination.uri();
        return Ok((source, destination, uri));
    };
    let mut source = Running::boot(&migrate_tls::options(folder, "client"))?;
    let server = migrate_tls::options(folder, "server");
    let (destination, port) = migrate_tls::wait_for(&server, "tls")?;
    migrate_tls::use_lanes(&mut source)?;
    let uri = format!("tls:{}:{port}", migrate_tls::HOST);
    Ok((source, destination, uri))
}

/// Whether a migration is under way or over. A source that died before it connected leaves behind a
/// destination that goes on waiting.
fn connected(running: &mut Running, fault: Fault) -> Result<bool> {
    for _ in 0..20 {
        let answer = running.vmm.qmp.execute("query-migrate", Value::Null)?;
        if fault != Fault::KillSource || answer["status"] != "setup" {
            return Ok(true);
        }
        thread::sleep(GLANCE);
    }
    Ok(false)
}

/// What must hold, whatever happened.
fn judge(
    source: &mut Running,
    destination: &mut Running,
    before: u64,
    lives: &mut [bool; 2],
    answers: &[Value; 2],
) -> Result<String> {
    let here = source.guest.counter(0);
    let there = destination.guest.counter(0);
    thread::sleep(GLANCE);
    let status = |running: &mut Running, lives| match lives {
        true => running.vmm.qmp.status(),
        false => Ok("dead".to_owned()),
    };
    let states = [status(source, lives[0])?, status(destination, lives[1])?];
    let runs = [&states[0] == "running", &states[1] == "running"];
    let what = format!("{states:?} {} {}", text(&answers[0]), text(&answers[1]));
    ensure!(!(runs[0] && runs[1]), "both run: {what}");
    ensure!(
        before <= here,
        "the source went from {before} to {here}: {what}"
    );
    for (side, answer) in answers.iter().enumerate().filter(|(side, _)| lives[*side]) {
        let failed = matches!(answer["status"].as_str(), Some("failed" | "unknown"));
        ensure!(
            !failed || !text(answer).is_empty(),
            "side {side} does not say why: {what}"
        );
        let phases = answer["blackout"]["spans"].as_array().map_or(0, Vec::len);
        let before_all = matches!(answer["status"].as_str(), Some("cancelled" | "setup"));
        ensure!(phases > 0 || before_all, "no phase is named: {what}");
    }
    match runs {
        [true, false] => {
            source.guest.wait_progress(0, LIMIT)?;
            ensure!(
                destination.guest.counter(0) == there,
                "the destination runs: {what}"
            );
            ensure!(answers[0]["status"] != "completed", "{what}");
        }
        [false, true] => {
            ensure!(there >= here, "the guest lost {here} to {there}: {what}");
            destination.guest.wait_progress(0, LIMIT)?;
            ensure!(source.guest.counter(0) == here, "the source runs: {what}");
        }
        _ => {
            let explained = !lives[0]
                || answers[0]["status"] == "unknown"
                || (answers[0]["status"] == "completed" && !lives[1]);
            ensure!(explained, "nobody runs the guest: {what}");
            if lives[0] {
                // A person has looked: the guest is nowhere else.
                ensure!(states[0] == "postmigrate", "{what}");
                source.vmm.qmp.execute("cont", Value::Null)?;
                source.runs()?;
            }
        }
    }
    let status = answers[0]["status"].as_str().unwrap_or("dead");
    Ok(match runs {
        [true, _] => format!("runs at the source ({status})"),
        [_, true] => format!("runs at the destination ({status})"),
        _ if lives[0] => format!("paused at the source ({status}), runs after cont"),
        _ => "died with its monitor".to_owned(),
    })
}

fn text(answer: &Value) -> &str {
    answer["error-desc"].as_str().unwrap_or_default()
}

/// Kills a process when it comes to a probe.
fn kill_at(pid: u32, probe: &str) -> Result<Child> {
    let program = programs::vmm()?;
    let script = format!(
        "BEGIN {{ printf(\"armed\\n\"); }} usdt:{}:vmm:{probe} {{ signal(\"SIGKILL\"); }}",
        program.display()
    );
    let mut child = Command::new("bpftrace")
        .args(["--unsafe", "-p", &pid.to_string(), "-e", &script])
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .context("bpftrace")?;
    let output = child.stdout.take().context("bpftrace's output")?;
    let armed = BufReader::new(output)
        .lines()
        .map_while(Result::ok)
        .any(|line| line == "armed");
    ensure!(armed, "bpftrace does not know the probe {probe}");
    Ok(child)
}
