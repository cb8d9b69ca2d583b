//! Whom `blackout record` finds: programs that were replaced, that live in namespaces of their own,
//! that start as another program; and how it ends together with a command.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use harness::{Qmp, programs, skip};
use nix::sys::signal::Signal;
use serde_json::json;

use crate::recorded::{Killed, Recording, finish, need_tool, recorder, wait_for};

const LIMIT: Duration = Duration::from_secs(60);

#[test]
fn a_program_that_was_replaced_is_found_and_understood() -> Result<()> {
    need_tool!();
    let dir = tempfile::tempdir()?;
    let program = dir.path().join("monitor");
    fs::copy(programs::vmm()?, &program)?;
    let monitor = monitor(Command::new(&program), dir.path())?;
    let mut qmp = Qmp::connect(&dir.path().join("qmp"), LIMIT)?;
    // What an upgrade does: another file, which has no probes, in the place of the first.
    fs::remove_file(&program)?;
    fs::write(&program, "another")?;
    let recorder = recorder(dir.path(), &["--exe", &program.to_string_lossy()])?;
    qmp.execute("stop", json!({}))?;
    let recording = finish(recorder, dir.path())?;
    let hits: Vec<_> = recording.hits("vm_stop_begin").collect();
    ensure!(hits.len() == 1 && hits[0].pid == monitor.0.id(), "{hits:?}");
    Ok(())
}

#[test]
fn a_program_in_namespaces_of_its_own_is_found_and_understood() -> Result<()> {
    need_tool!();
    let dir = tempfile::tempdir()?;
    let inside = dir.path().join("inside");
    fs::create_dir(&inside)?;
    // The program is on a file system that nobody outside sees, and has the id 1 there.
    let unshare = || {
        let mut unshare = Command::new("unshare");
        unshare.args(["--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]);
        unshare
    };
    if !unshare()
        .arg("true")
        .status()
        .is_ok_and(|status| status.success())
    {
        skip!("no namespaces: unshare does not run");
    }
    let mut container = unshare();
    container.args(["sh", "-c"]).arg(
        "mount -t tmpfs none \"$1\" && cp \"$2\" \"$1/contained\" && shift 2 && exec \"$0\" \"$@\"",
    );
    let program = inside.join("contained");
    container.arg(&program).arg(&inside).arg(programs::vmm()?);
    let monitor = monitor(container, dir.path())?;
    let mut qmp = Qmp::connect(&dir.path().join("qmp"), LIMIT)?;
    ensure!(!program.exists(), "the program is to be seen from outside");
    let recorder = recorder(dir.path(), &["--name", "contained"])?;
    qmp.execute("stop", json!({}))?;
    qmp.execute("cont", json!({}))?;
    let recording = finish(recorder, dir.path())?;
    let hits: Vec<_> = recording.hits("vm_stop_begin").collect();
    ensure!(hits.len() == 1, "{hits:?}");
    // It is known by the id that it has here, which is not that of `unshare`.
    let pid = hits[0].pid;
    ensure!(pid != 1 && pid != monitor.0.id());
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    ensure!(status.contains(&format!("NSpid:\t{pid}\t1\n")), "{status}");
    ensure!(recording.ioctls().any(|call| call.pid == pid), "no ioctls");
    Ok(())
}

#[test]
fn a_command_that_becomes_another_program_is_followed() -> Result<()> {
    need_tool!();
    let dir = tempfile::tempdir()?;
    let mut command = vec!["--".to_owned(), "sh".into(), "-c".into()];
    command.push("exec \"$0\" \"$@\"".into());
    command.push(programs::vmm()?.to_string_lossy().into_owned());
    command.extend(arguments(dir.path())?);
    let mut recorder = recorder(dir.path(), &command)?;
    let mut qmp = Qmp::connect(&dir.path().join("qmp"), LIMIT)?;
    // It looks for other programs a few times a second.
    thread::sleep(Duration::from_secs(1));
    qmp.execute("stop", json!({}))?;
    qmp.execute("quit", json!({}))?;
    recorder.0.wait()?;
    let recording = Recording::read(&dir.path().join("recording"))?;
    ensure!(recording.hits("vm_stop_begin").count() == 1);
    Ok(())
}

#[test]
fn a_command_gives_its_exit_code_and_is_given_signals() -> Result<()> {
    need_tool!();
    let dir = tempfile::tempdir()?;
    let mut ended = recorder(dir.path(), &["--", "sh", "-c", "exit 7"])?;
    let code = ended.0.wait()?.code();
    ensure!(code == Some(7), "the command's code 7 became {code:?}");

    let touched = dir.path().join("touched");
    let script = format!(
        "trap 'touch {0}.term; exit 9' TERM; touch {0}; while true; do sleep 0.05; done",
        touched.display()
    );
    for (signal, expected) in [(Signal::SIGTERM, 9), (Signal::SIGINT, 130)] {
        let _ = fs::remove_file(&touched);
        let mut told = recorder(dir.path(), &["--", "sh", "-c", &script])?;
        wait_for(&touched)?;
        told.signal(signal)?;
        let code = told.0.wait()?.code();
        ensure!(code == Some(expected), "after {signal}: {code:?}");
    }
    ensure!(touched.with_extension("term").exists());
    Ok(())
}

/// Starts a monitor by `command`, to which its arguments are added.
fn monitor(mut command: Command, dir: &Path) -> Result<Killed> {
    command.args(arguments(dir)?);
    command.stdout(Stdio::null()).stderr(Stdio::null());
    let child = command.spawn();
    Ok(Killed(
        child.with_context(|| format!("starting {command:?}"))?,
    ))
}

fn arguments(dir: &Path) -> Result<Vec<String>> {
    let qmp = format!("unix:{}", dir.join("qmp").display());
    let guest = programs::guest()?.to_string_lossy().into_owned();
    let arguments = ["--serial", "null", "--qmp", &qmp, "--payload", &guest];
    Ok(arguments.map(str::to_owned).into())
}
