//! The monitor's control socket and the process around it, with a real guest.

#[path = "../qmp/transcript.rs"]
mod transcript;

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};
use std::{env, fs};

use anyhow::{Context, Result, bail, ensure};
use blackout_abi::guest::command;
use harness::{GuestView, Qmp, Vmm, VmmOptions, programs, skip};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

const LIMIT: Duration = Duration::from_secs(60);

fn paused(name: &str) -> VmmOptions {
    let extra = ["--paused", "--name", name].map(str::to_owned).to_vec();
    VmmOptions {
        extra,
        ..VmmOptions::default()
    }
}

#[test]
fn the_dialogue_is_qemus() -> Result<()> {
    let vmm = Vmm::spawn(&paused("vm"))?;
    replay(&vmm.dir().join("qmp"))
}

/// What is compared with has to be true itself.
#[test]
fn the_transcript_is_what_qemu_says() -> Result<()> {
    const QEMU: &str = "qemu-system-x86_64";
    if !Path::new("/usr/bin").join(QEMU).exists() {
        skip!("{QEMU} is not installed here");
    }
    let dir = tempfile::tempdir()?;
    let socket = dir.path().join("qmp");
    let child = Command::new(QEMU)
        .args(["-M", "q35", "-accel", "kvm", "-m", "32", "-nodefaults"])
        .args(["-display", "none", "-S", "-name", "vm", "-qmp"])
        .arg(format!("unix:{},server=on,wait=off", socket.display()))
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .spawn()?;
    let _qemu = Killed(child);
    let deadline = Instant::now() + LIMIT;
    while !socket.exists() && Instant::now() < deadline {
        thread::sleep(Duration::from_millis(10));
    }
    replay(&socket)
}

/// Speaks the transcript's requests to the server at `socket` and compares its answers.
fn replay(socket: &Path) -> Result<()> {
    let mut writer = UnixStream::connect(socket)?;
    writer.set_read_timeout(Some(LIMIT))?;
    let mut reader = BufReader::new(writer.try_clone()?);
    let mut read = || -> Result<Value> {
        let mut line = String::new();
        reader.read_line(&mut line)?;
        serde_json::from_str(&line).with_context(|| format!("{line:?}"))
    };
    ensure!(read()?.get("QMP").is_some(), "no greeting");
    for row in transcript::rows() {
        writer.write_all(row.request.as_bytes())?;
        for expected in &row.answers {
            let answer = read().with_context(|| row.request.clone())?;
            let agree = transcript::agrees(&answer, expected);
            ensure!(agree, "{}: {answer}, but expected {expected}", row.request);
        }
    }
    Ok(())
}

#[test]
fn qemus_own_client_drives_it() -> Result<()> {
    let Some(python) = env::var_os("BLACKOUT_PYTHON") else {
        skip!("BLACKOUT_PYTHON is not set: no Python with qemu.qmp here");
    };
    let mut source = Vmm::spawn(&paused("vm"))?;
    let mut destination = Vmm::spawn(&VmmOptions::default().incoming("defer"))?;
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/qmp/client.py");
    let output = Command::new(python)
        .arg(script)
        .args([&source, &destination].map(|vmm| vmm.dir().join("qmp")))
        .arg(format!("unix:{}", source.dir().join("migration").display()))
        .output()?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(output.status.success(), "{script}: {said}");
    for vmm in [&mut source, &mut destination] {
        ensure!(vmm.wait_exit(LIMIT)?.success(), "{}", vmm.stderr());
    }
    Ok(())
}

#[test]
fn a_plain_socat_session_drives_it() -> Result<()> {
    if Command::new("socat").arg("-V").output().is_err() {
        skip!("socat is not installed here");
    }
    let mut source = Vmm::spawn(&VmmOptions::default())?;
    let mut destination = Vmm::spawn(&VmmOptions::default().incoming("defer"))?;
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/qmp/session.sh");
    let output = Command::new("sh")
        .arg(script)
        .args([&source, &destination].map(|vmm| vmm.dir().join("qmp")))
        .arg(format!("unix:{}", source.dir().join("migration").display()))
        .output()?;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let wrong = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(output.status.success(), "{script}: {wrong}\n{said}");
    let lines: Result<Vec<Value>, _> = said.lines().map(serde_json::from_str).collect();
    let lines = lines.with_context(|| said.clone())?;
    let refused = lines.iter().find(|line| line.get("error").is_some());
    ensure!(refused.is_none(), "{said}");
    let states = lines
        .iter()
        .filter_map(|line| line["return"]["status"].as_str());
    let states: Vec<_> = states.collect();
    ensure!(states == ["completed", "postmigrate", "running"], "{said}");
    for vmm in [&mut source, &mut destination] {
        ensure!(vmm.wait_exit(LIMIT)?.success(), "{}", vmm.stderr());
    }
    Ok(())
}

#[test]
fn a_stopped_guest_stands_still_and_goes_on_after_cont() -> Result<()> {
    let options = VmmOptions {
        cpus: 2,
        ..VmmOptions::default()
    };
    let mut vmm = Vmm::spawn(&options)?;
    let guest = GuestView::open(vmm.pid())?;
    guest.wait_ready(LIMIT)?;
    for _ in 0..20 {
        guest.wait_progress(0, LIMIT)?;
        vmm.qmp.execute("stop", Value::Null)?;
        ensure!(vmm.qmp.status()? == "paused");
        let before = guest.counters(2);
        thread::sleep(Duration::from_millis(5));
        ensure!(guest.counters(2) == before, "a paused guest moved");
        vmm.qmp.execute("cont", Value::Null)?;
        ensure!(vmm.qmp.status()? == "running");
    }
    guest.wait_progress(1, LIMIT)
}

#[test]
fn every_client_hears_of_it_and_a_hostile_one_harms_nobody() -> Result<()> {
    let mut vmm = Vmm::spawn(&paused("vm"))?;
    let socket = vmm.dir().join("qmp");
    let mut other = Qmp::connect(&socket, LIMIT)?;
    let mut hostile = UnixStream::connect(&socket)?;
    let garbage: Vec<u8> = (0..=255).cycle().take(1 << 16).collect();
    thread::spawn(move || {
        for _ in 0..64 {
            // It never reads, so at some point its writes are no longer taken.
            let _ = hostile.set_write_timeout(Some(Duration::from_secs(1)));
            if hostile.write_all(&garbage).is_err() {
                break;
            }
        }
    });
    for _ in 0..50 {
        vmm.qmp.execute("cont", Value::Null)?;
        vmm.qmp.execute("stop", Value::Null)?;
        other.wait_event("RESUME", LIMIT)?;
        other.wait_event("STOP", LIMIT)?;
    }
    Ok(())
}

#[test]
fn the_process_ends_as_it_is_asked_to() -> Result<()> {
    type Ask = fn(&mut Vmm, &GuestView) -> Result<()>;
    let rows: [(Ask, bool, &str); 4] = [
        (
            |vmm, _| vmm.qmp.execute("quit", Value::Null).map(drop),
            false,
            "host-qmp-quit",
        ),
        (|vmm, _| terminate(vmm), false, "host-signal"),
        (
            |_, guest| order(guest, command::SHUTDOWN),
            true,
            "guest-shutdown",
        ),
        (|_, guest| order(guest, command::RESET), true, "guest-reset"),
    ];
    for (ask, by_guest, reason) in rows {
        let options = VmmOptions {
            extra: vec!["--no-reboot".into()],
            ..VmmOptions::default()
        };
        let mut vmm = Vmm::spawn(&options)?;
        let guest = GuestView::open(vmm.pid())?;
        guest.wait_ready(LIMIT)?;
        ask(&mut vmm, &guest).context(reason)?;
        let event = vmm.qmp.wait_event("SHUTDOWN", LIMIT).context(reason)?;
        ensure!(
            event["data"] == json!({ "guest": by_guest, "reason": reason }),
            "{event}"
        );
        let status = vmm.wait_exit(LIMIT)?;
        ensure!(
            status.code() == Some(0),
            "{reason}: {status}: {}",
            vmm.stderr()
        );
        ensure!(
            !vmm.dir().join("qmp").exists(),
            "{reason}: the socket is still there"
        );
    }
    Ok(())
}

fn terminate(vmm: &Vmm) -> Result<()> {
    Ok(kill(
        Pid::from_raw(vmm.pid().cast_signed()),
        Signal::SIGTERM,
    )?)
}

/// The guest may not live to say that it is done.
fn order(guest: &GuestView, command: u64) -> Result<()> {
    let _ = guest.command(command, 0, Duration::from_millis(200));
    Ok(())
}

#[test]
fn what_is_wrong_is_said_in_one_line() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let text = dir.path().join("text");
    fs::write(&text, "no socket")?;
    let guest = programs::guest()?.display().to_string();
    let (text, absent) = (text.display().to_string(), "/nonexistent/file");
    let qmp_at_text = format!("unix:{text}");
    let qmp_absent = format!("unix:{absent}");
    let serial_absent = format!("file:{absent}");
    let rows: [(&[&str], i32, &str); 7] = [
        (&[], 2, "--payload"),
        (
            &["--payload", &guest, "--memory", "1Q"],
            2,
            "unknown unit 'Q'",
        ),
        (&["--payload", absent], 1, absent),
        (
            &["--payload", &guest, "--qmp", &qmp_at_text],
            1,
            "it is no socket",
        ),
        (&["--payload", &guest, "--qmp", &qmp_absent], 1, absent),
        (
            &["--payload", &guest, "--serial", &serial_absent],
            1,
            absent,
        ),
        (&["--payload", &guest, "--log", "a=b=c"], 1, "--log"),
    ];
    for (arguments, code, expected) in rows {
        let output = run(arguments)?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(
            output.status.code() == Some(code),
            "{arguments:?}: {}",
            output.status
        );
        ensure!(said.contains(expected), "{arguments:?}: {said}");
        ensure!(
            said.trim_end().lines().count() == 1,
            "{arguments:?}: {said}"
        );
    }
    Ok(())
}

#[test]
fn it_says_what_kvm_can_do() -> Result<()> {
    let output = run(&["--check"])?;
    let said = String::from_utf8_lossy(&output.stdout);
    ensure!(output.status.success(), "{said}");
    ensure!(said.contains("vCPUs in a machine"), "{said}");
    ensure!(said.ends_with("guests run on this host\n"), "{said}");
    print!("{said}");
    Ok(())
}

/// Runs a monitor that can't get far.
fn run(arguments: &[&str]) -> Result<Output> {
    let mut command = Command::new(programs::vmm()?);
    command.args(arguments).stdin(Stdio::null());
    let child = command
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    let mut child = Killed(child);
    let deadline = Instant::now() + LIMIT;
    while child.0.try_wait()?.is_none() {
        if Instant::now() > deadline {
            bail!("{arguments:?} did not end");
        }
        thread::sleep(Duration::from_millis(2));
    }
    let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
    std::io::copy(&mut child.0.stdout.take().context("stdout")?, &mut stdout)?;
    std::io::copy(&mut child.0.stderr.take().context("stderr")?, &mut stderr)?;
    Ok(Output {
        status: child.0.wait()?,
        stdout,
        stderr,
    })
}

/// Killed when it is dropped.
struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
