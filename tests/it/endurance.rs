//! Recorders that come and go, and that are killed, while a guest migrates without end: the guest and
//! its monitors never notice.

use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::os::unix::fs::FileExt;
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use blackout::recording::Ending;
use blackout::usdt::Binary;
use harness::skip::slow;
use harness::{GuestView, Vmm, VmmOptions, programs, skip};
use nix::sys::signal::Signal;

use crate::recorded::{Killed, Recording, finish, need_tool, recorder, wait_for};

const LIMIT: Duration = Duration::from_secs(120);

/// Recorders, one after the other.
const CYCLES: usize = 1000;

/// Every so manyth is killed in the middle of it, and leaves its programs to the kernel to clear away.
const KILLED: usize = 10;

#[test]
fn a_thousand_recorders_leave_no_trace_in_a_guest_that_migrates() -> Result<()> {
    if !slow() {
        skip!("it takes a quarter of an hour: cargo xtask test --slow");
    }
    need_tool!();
    let options = VmmOptions {
        memory: "32M".into(),
        cmdline: "dirty=1M".into(),
        ..VmmOptions::default()
    };
    let first = Vmm::spawn(&options)?;
    GuestView::open(first.pid())?.wait_ready(LIMIT)?;
    let monitors = Mutex::new(vec![first.pid()]);
    let (over, migrations) = (AtomicBool::new(false), AtomicUsize::new(0));
    let last = thread::scope(|scope| {
        let migrating = scope.spawn(|| {
            let moved = migrate_on(first, &options, &monitors, &over, &migrations);
            over.store(true, Ordering::Relaxed);
            moved
        });
        let recorded = record_again_and_again(&monitors, &over);
        over.store(true, Ordering::Relaxed);
        let last = migrating.join().ok().context("the migrations panicked")?;
        recorded?;
        last
    })?;
    let count = migrations.load(Ordering::Relaxed);
    println!("{CYCLES} recorders, {count} migrations");
    ensure!(count >= 20, "only {count} migrations");
    GuestView::open(last.pid())?.wait_progress(0, LIMIT)?;
    probes_are_nops(last.pid())
}

/// Moves the guest on and on; gives the monitor that has it in the end.
fn migrate_on(
    mut source: Vmm,
    options: &VmmOptions,
    monitors: &Mutex<Vec<u32>>,
    over: &AtomicBool,
    migrations: &AtomicUsize,
) -> Result<Vmm> {
    while !over.load(Ordering::Relaxed) {
        let uri = format!("unix:{}", source.dir().join("migration").display());
        let destination = Vmm::spawn(&options.incoming(&uri))?;
        *monitors.lock().unwrap() = vec![source.pid(), destination.pid()];
        let answer = source.qmp.migrate(&uri, LIMIT)?;
        ensure!(answer["status"] == "completed", "{answer}");
        GuestView::open(destination.pid())?.wait_progress(0, LIMIT)?;
        *monitors.lock().unwrap() = vec![destination.pid()];
        source = destination;
        migrations.fetch_add(1, Ordering::Relaxed);
    }
    Ok(source)
}

fn record_again_and_again(monitors: &Mutex<Vec<u32>>, over: &AtomicBool) -> Result<()> {
    let dir = tempfile::tempdir()?;
    let (ready, output) = (dir.path().join("ready"), dir.path().join("recording"));
    let mut random = fastrand::Rng::with_seed(1);
    for cycle in 0..CYCLES {
        ensure!(!over.load(Ordering::Relaxed), "a migration failed");
        let pids = monitors.lock().unwrap().clone();
        let _ = fs::remove_file(&ready);
        let mut command = Command::new(programs::tool()?);
        command.args(["record", "--ready"]).arg(&ready);
        command.arg("--output").arg(&output);
        command.args(pids.iter().map(|pid| format!("--pid={pid}")));
        let mut one = Killed(command.stderr(Stdio::null()).spawn()?);
        let kill = cycle % KILLED == 0;
        if kill {
            // While it attaches, as often as afterwards.
            thread::sleep(Duration::from_millis(random.u64(..200)));
            one.0.kill()?;
            one.0.wait()?;
            continue;
        }
        if !is_ready(&mut one, &ready)? {
            // The source was gone before it could be attached to, which is said and no fault.
            ensure!(one.0.wait()?.code() == Some(3), "cycle {cycle}");
            continue;
        }
        thread::sleep(Duration::from_millis(random.u64(..50)));
        one.signal(Signal::SIGTERM)?;
        let status = one.0.wait()?;
        ensure!(status.success(), "cycle {cycle}: {status}");
        let recording = Recording::read(&output)?;
        ensure!(recording.ending == Ending::Finished, "cycle {cycle}");
        ensure!(recording.lost() == 0, "cycle {cycle}");
    }
    Ok(())
}

/// Waits until the recorder has attached; false if it ends before.
fn is_ready(recorder: &mut Killed, ready: &std::path::Path) -> Result<bool> {
    while recorder.0.try_wait()?.is_none() {
        if ready.exists() {
            return Ok(true);
        }
        thread::sleep(Duration::from_millis(2));
    }
    Ok(ready.exists())
}

/// Every probe in the memory of the process is what it is in its file.
fn probes_are_nops(pid: u32) -> Result<()> {
    let exe = format!("/proc/{pid}/exe");
    let (file, memory) = (File::open(&exe)?, File::open(format!("/proc/{pid}/mem"))?);
    let maps = BufReader::new(File::open(format!("/proc/{pid}/maps"))?);
    let program = fs::read_link(&exe)?;
    let mut code = Vec::new();
    for line in maps.lines() {
        let line = line?;
        let words: Vec<_> = line.split_whitespace().collect();
        if let [range, rights, offset, _, _, path] = words[..]
            && rights.contains('x')
            && program.as_os_str() == path
        {
            let (from, to) = range.split_once('-').context("a range")?;
            let number = |text| u64::from_str_radix(text, 16);
            code.push((number(from)?, number(to)?, number(offset)?));
        }
    }
    let sites = Binary::open(exe.as_ref())?.sites;
    ensure!(!sites.is_empty());
    for site in sites {
        let place = code.iter().find_map(|(from, to, offset)| {
            let at = from + site.offset.checked_sub(*offset)?;
            (at < *to).then_some(at)
        });
        let place = place.with_context(|| format!("{} is not mapped", site.name))?;
        let (mut now, mut before) = ([0; 4], [0; 4]);
        memory.read_exact_at(&mut now, place)?;
        file.read_exact_at(&mut before, site.offset)?;
        ensure!(now == before, "{}: {now:x?} was {before:x?}", site.name);
    }
    Ok(())
}

#[test]
fn a_recording_of_a_monitor_that_is_killed_is_whole() -> Result<()> {
    need_tool!();
    let mut vmm = Vmm::spawn(&VmmOptions::default())?;
    let guest = GuestView::open(vmm.pid())?;
    guest.wait_ready(LIMIT)?;
    let dir = tempfile::tempdir()?;
    let mut recorder = recorder(dir.path(), &[format!("--pid={}", vmm.pid())])?;
    guest.wait_progress(0, LIMIT)?;
    vmm.kill()?;
    // There is nobody left to record.
    let status = recorder.0.wait()?;
    ensure!(status.success(), "{status}");
    let recording = Recording::read(&dir.path().join("recording"))?;
    ensure!(recording.ending == Ending::Finished);
    Ok(())
}

/// What a monitor that is recorded has in memory is changed by that, and back again.
#[test]
fn a_recorder_takes_its_uprobes_with_it() -> Result<()> {
    need_tool!();
    let vmm = Vmm::spawn(&VmmOptions::default())?;
    let dir = tempfile::tempdir()?;
    let recorder = recorder(dir.path(), &[format!("--pid={}", vmm.pid())])?;
    wait_for(&dir.path().join("ready"))?;
    ensure!(probes_are_nops(vmm.pid()).is_err(), "nothing is attached");
    finish(recorder, dir.path())?;
    probes_are_nops(vmm.pid())
}
