//! What `blackout record` writes down, of this very process and of monitors.

use std::collections::HashSet;
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use blackout::capture;
use blackout::recording::{Ending, FdKind, Frame, Hit, Value};
use harness::{GuestView, Qmp, Recorder, Vmm, VmmOptions, programs};
use nix::sys::signal::Signal;
use vmm::probes::{self, Guarded};

use crate::recorded::{Killed, Recording, need_tool, wait_for};

const LIMIT: Duration = Duration::from_secs(60);

const KVM_CREATE_VM: u32 = 0xae01;
const KVM_CREATE_VCPU: u32 = 0xae41;
const KVM_RUN: u32 = 0xae80;

#[test]
fn every_hit_arrives_with_its_arguments() -> Result<()> {
    need_tool!();
    let dir = tempfile::tempdir()?;
    let output = dir.path().join("recording");
    let recorder = Recorder::start(&[std::process::id()], &output)?;
    let threads: Vec<_> = (0..4_u64)
        .map(|thread| thread::spawn(move || fire(thread)))
        .collect();
    for thread in threads {
        thread
            .join()
            .map_err(|_| anyhow::anyhow!("a thread panicked"))?;
    }
    recorder.stop()?;
    let recording = Recording::read(&output)?;
    for thread in 0..4_u64 {
        let of_thread = |hit: &&Hit| hit.args.first() == Some(&Value::U64(1000 + thread));
        let samples: Vec<_> = recording.hits("clock_sample").filter(of_thread).collect();
        ensure!(
            samples.len() == 500,
            "{} of 500 hits arrived",
            samples.len()
        );
        let tids: HashSet<_> = samples.iter().map(|hit| hit.tid).collect();
        ensure!(tids.len() == 1, "one thread's hits have the tids {tids:?}");
        for (round, hit) in (0_u64..).zip(&samples) {
            let expected = [1000 + thread, round, u64::MAX - round, 1 << 63].map(Value::U64);
            ensure!(hit.args == expected, "{:?}", hit.args);
        }
        ensure!(
            samples.is_sorted_by_key(|hit| hit.ts_ns),
            "out of order in its thread"
        );
        let own = |hit: &&Hit| tids.contains(&hit.tid);
        let begins: Vec<_> = recording.hits("migrate_begin").filter(own).collect();
        let long = "x".repeat(127);
        let strings = [
            Value::U64(thread),
            Value::Str(long),
            Value::Str("normal".into()),
        ];
        ensure!(begins.len() == 1 && begins[0].args == strings, "{begins:?}");
        let ends: Vec<_> = recording.hits("migrate_end").filter(own).collect();
        let values = [Value::Str("failed".into()), Value::I64(-22)];
        ensure!(ends.len() == 1 && ends[0].args == values, "{ends:?}");
    }
    Ok(())
}

/// Fires probes with arguments of all kinds that the table has.
fn fire(thread: u64) {
    for round in 0..500 {
        probes::clock_sample(1000 + thread, round, u64::MAX - round, 1 << 63);
    }
    // Longer than what is kept of a string.
    let uri = c"xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx";
    let mut migrate = probes::migrate(thread, uri, c"normal");
    migrate.status = c"failed";
    migrate.set_rc(-22);
}

#[test]
fn what_finds_no_room_is_counted() -> Result<()> {
    need_tool!();
    const FIRED: u64 = 20_000;
    let dir = tempfile::tempdir()?;
    let output = dir.path().join("recording");
    // A MiB has room for fewer than 8,000 hits, and the recorder sleeps through them.
    let recorder = Command::new(programs::tool()?)
        .args([
            "record",
            "--strict",
            "--buffer",
            "1",
            "--pid",
            &std::process::id().to_string(),
        ])
        .arg("--output")
        .arg(&output)
        .arg("--ready")
        .arg(dir.path().join("ready"))
        .stderr(Stdio::null())
        .spawn()?;
    let mut recorder = Killed(recorder);
    wait_for(&dir.path().join("ready"))?;
    recorder.signal(Signal::SIGSTOP)?;
    let began_ns = capture::monotonic();
    for n in 0..FIRED {
        probes::downtime_end(77, n);
    }
    let ended_ns = capture::monotonic();
    recorder.signal(Signal::SIGCONT)?;
    recorder.signal(Signal::SIGTERM)?;
    let status = recorder.0.wait()?;
    ensure!(
        status.code() == Some(1),
        "--strict with losses ended with {status}"
    );
    let recording = Recording::read(&output)?;
    let own = |hit: &&Hit| hit.args.first() == Some(&Value::U64(77));
    let arrived = recording.hits("downtime_end").filter(own).count() as u64;
    let lost: u64 = recording.lost();
    // Other tests of this process fire at the same time, and theirs may be lost too.
    ensure!(
        lost > 0 && arrived + lost >= FIRED,
        "{arrived} arrived, {lost} lost"
    );
    ensure!(arrived >= 4000, "only {arrived} of {FIRED} found room");
    // The report marks what ran between the two ends of a loss.
    let mut losses = recording.frames.iter().filter_map(|frame| match frame {
        Frame::Lost {
            since_ns, at_ns, ..
        } => Some((*since_ns, *at_ns)),
        _ => None,
    });
    ensure!(
        losses.any(|(since_ns, at_ns)| (1..=ended_ns).contains(&since_ns) && at_ns >= ended_ns),
        "no loss is said to be from {began_ns} to {ended_ns}"
    );
    Ok(())
}

#[test]
fn a_killed_recorder_leaves_what_it_wrote() -> Result<()> {
    need_tool!();
    let dir = tempfile::tempdir()?;
    let output = dir.path().join("recording");
    let recorder = Command::new(programs::tool()?)
        .args(["record", "--pid", &std::process::id().to_string()])
        .arg("--output")
        .arg(&output)
        .arg("--ready")
        .arg(dir.path().join("ready"))
        .stderr(Stdio::null())
        .spawn()?;
    let mut recorder = Killed(recorder);
    wait_for(&dir.path().join("ready"))?;
    for n in 0..100 {
        probes::downtime_end(78, n);
    }
    // The recorder promises to lose no more than the last second.
    thread::sleep(Duration::from_millis(2500));
    recorder.0.kill()?;
    recorder.0.wait()?;
    let recording = Recording::read(&output)?;
    let own = |hit: &&Hit| hit.args.first() == Some(&Value::U64(78));
    ensure!(recording.hits("downtime_end").filter(own).count() == 100);
    ensure!(
        recording.ending != Ending::Finished,
        "a killed recorder wrote an end"
    );
    Ok(())
}

#[test]
fn a_command_is_recorded_from_its_first_instruction() -> Result<()> {
    need_tool!();
    let dir = tempfile::tempdir()?;
    let output = dir.path().join("recording");
    let socket = dir.path().join("qmp");
    let mut recorder = Command::new(programs::tool()?);
    recorder
        .arg("record")
        .arg("--output")
        .arg(&output)
        .arg("--")
        .arg(programs::vmm()?);
    recorder.args(["--serial", "null", "--paused", "--cpus", "2", "--qmp"]);
    recorder
        .arg(format!("unix:{}", socket.display()))
        .arg("--payload")
        .arg(programs::guest()?);
    let mut recorder = Killed(recorder.stderr(Stdio::null()).spawn()?);
    let mut qmp = Qmp::connect(&socket, LIMIT)?;
    qmp.execute("quit", serde_json::json!({}))?;
    let status = recorder.0.wait()?;
    ensure!(status.success(), "the recorder ended with {status}");
    let recording = Recording::read(&output)?;
    ensure!(recording.ending == Ending::Finished);
    let kinds = |cmd| {
        recording
            .ioctls()
            .filter(move |call| call.cmd == cmd)
            .map(|call| call.fd_kind)
    };
    ensure!(kinds(KVM_CREATE_VM).eq([FdKind::Kvm]), "no KVM_CREATE_VM");
    ensure!(
        kinds(KVM_CREATE_VCPU).eq([FdKind::Vm; 2]),
        "not two KVM_CREATE_VCPU"
    );
    Ok(())
}

#[test]
fn a_monitor_that_runs_is_understood() -> Result<()> {
    need_tool!();
    let mut vmm = Vmm::spawn(&VmmOptions::default())?;
    let guest = GuestView::open(vmm.pid())?;
    guest.wait_ready(LIMIT)?;
    let dir = tempfile::tempdir()?;
    let output = dir.path().join("recording");
    let recorder = Recorder::start(&[vmm.pid()], &output)?;
    // On a busy machine the vCPU may wait for a CPU; what did not run was not seen to stop.
    guest.wait_progress(0, LIMIT)?;
    vmm.qmp.execute("stop", serde_json::json!({}))?;
    thread::sleep(Duration::from_millis(100));
    vmm.qmp.execute("cont", serde_json::json!({}))?;
    guest.wait_progress(0, LIMIT)?;
    recorder.stop()?;
    let recording = Recording::read(&output)?;

    let last = recording.frames.iter().rev().find_map(|frame| match frame {
        Frame::VcpuEdges(edges) => Some(edges),
        _ => None,
    });
    let edges = last.context("nothing is known of the vCPU")?;
    ensure!(edges.vcpu == Some(0), "{edges:?}");
    ensure!(
        edges.first_enter_ns == 0,
        "a vCPU that ran before looks like a new one: {edges:?}"
    );
    let gaps = recording.frames.iter().filter_map(|frame| match frame {
        Frame::VcpuGap(gap) if gap.tid == edges.tid => Some(gap),
        _ => None,
    });
    let gap = gaps
        .max_by_key(|gap| gap.enter_ns - gap.exit_ns)
        .context("no gap")?;
    ensure!(
        gap.enter_ns - gap.exit_ns > 90_000_000,
        "the pause of 100 ms is not seen: {gap:?}"
    );
    ensure!(
        recording.ioctls().all(|call| call.cmd != KVM_RUN),
        "KVM_RUN is in the recording"
    );

    let names: HashSet<_> = recording.names().collect();
    ensure!(
        names.contains("vm_stop_begin") && names.contains("vm_start_end"),
        "{names:?}"
    );
    let unknown: Vec<_> = recording
        .ioctls()
        .filter(|call| call.fd_kind == FdKind::Unknown)
        .collect();
    ensure!(unknown.is_empty(), "not told what they are: {unknown:?}");
    if cfg!(target_arch = "aarch64") {
        saves(&recording)?;
    }
    let guest = recording.frames.iter().any(|frame| match frame {
        Frame::VcpuGuest(guest) => {
            guest.tid == edges.tid
                && guest.left_ns.is_some_and(|left| left <= gap.exit_ns)
                && guest
                    .entered_ns
                    .is_some_and(|entered| entered >= gap.enter_ns)
        }
        _ => false,
    });
    ensure!(
        guest,
        "guest code was not seen to be left and entered around {gap:?}"
    );
    Ok(())
}

/// What a stop on arm64 does besides: both tables are saved, each by an ioctl on its own device.
fn saves(recording: &Recording) -> Result<()> {
    for (kind, attr, function) in [
        (FdKind::Its, 1, "vgic_its_save_tables_v0"),
        (FdKind::Gic, 3, "vgic_v3_save_pending_tables"),
    ] {
        let saved = recording.ioctls().find(|call| {
            let what = call.attr.map(|what| (what.group, what.attr));
            call.fd_kind == kind && what == Some((4, attr))
        });
        let saved = saved.with_context(|| format!("no save on {kind:?}"))?;
        ensure!(saved.ret == 0);
        let inner = recording.frames.iter().find_map(|frame| match frame {
            Frame::KernelFn(call) if call.function == function => Some(call),
            _ => None,
        });
        let inner = inner.with_context(|| format!("{function} was not seen"))?;
        ensure!(inner.tid == saved.tid && inner.ret == 0);
        ensure!(saved.enter_ns <= inner.enter_ns && inner.exit_ns <= saved.exit_ns);
    }
    Ok(())
}
