//! The tool with as few rights as it says that it takes: which it misses, which it keeps.

use std::ffi::OsStr;
use std::fs;
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use harness::{Vmm, VmmOptions, programs, skip};
use nix::sys::signal::Signal;
use serde_json::json;

use crate::recorded::{Killed, Recording, need_tool, wait_for};

const LIMIT: Duration = Duration::from_secs(60);

/// What `record` takes to see another user's monitor.
const NEEDED: [&str; 4] = ["bpf", "perfmon", "dac_read_search", "sys_ptrace"];

/// Their bits, by `include/uapi/linux/capability.h`.
const BITS: u64 = 1 << 39 | 1 << 38 | 1 << 2 | 1 << 19;
const CAP_KILL: u64 = 1 << 5;

/// A folder that everybody may use, with the tool in it.
struct Place {
    dir: tempfile::TempDir,
}

impl Place {
    /// `None` where nobody's rights can be set.
    fn new() -> Result<Option<Self>> {
        // Fails for want of rights as well as for want of the program.
        let runs = Command::new("setpriv")
            .args(["--reuid", "65534", "--clear-groups", "true"])
            .output();
        if !runs.is_ok_and(|output| output.status.success()) {
            return Ok(None);
        }
        let dir = tempfile::tempdir()?;
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o777))?;
        fs::copy(programs::tool()?, dir.path().join("blackout"))?;
        Ok(Some(Self { dir }))
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// The tool, run by nobody, who has `rights` and no others.
    fn tool(&self, rights: &[&str]) -> Command {
        let with = rights.iter().map(|right| format!(",+{right}"));
        let with = with.fold("-all".to_owned(), |all, one| all + &one);
        let mut command = Command::new("setpriv");
        command.args(["--reuid", "65534", "--regid", "65534", "--clear-groups"]);
        for set in ["bounding-set", "inh-caps", "ambient-caps"] {
            command.arg(format!("--{set}={with}"));
        }
        command
            .arg(self.path("blackout"))
            .current_dir(self.dir.path());
        command.stdin(Stdio::null()).stderr(Stdio::piped());
        command
    }

    /// Starts the tool, which tells by `--ready` that it has attached.
    fn start(&self, command: &mut Command) -> Result<Killed> {
        let ready = self.path("ready");
        let _ = fs::remove_file(&ready);
        let running = Killed(command.spawn()?);
        wait_for(&ready)?;
        Ok(running)
    }
}

#[test]
fn a_right_that_is_missing_is_named_in_one_line() -> Result<()> {
    need_tool!();
    let Some(place) = Place::new()? else {
        skip!("it takes root and setpriv to run with fewer rights");
    };
    let vmm = Vmm::spawn(&VmmOptions::default())?;
    for missing in NEEDED {
        let rights = NEEDED.iter().filter(|right| **right != missing);
        let mut command = place.tool(&rights.copied().collect::<Vec<_>>());
        command.args(["record", "--pid", &vmm.pid().to_string()]);
        let output = command.output()?;
        ensure!(output.status.code() == Some(3), "{missing}: {output:?}");
        let said = String::from_utf8(output.stderr)?;
        let name = format!("CAP_{}", missing.to_uppercase());
        ensure!(
            said.contains(&format!("the right {name} is missing")),
            "{said}"
        );
        ensure!(said.lines().count() == 1, "{said}");
    }
    Ok(())
}

#[test]
fn a_recorder_gives_all_its_rights_up_and_goes_on() -> Result<()> {
    need_tool!();
    let Some(place) = Place::new()? else {
        skip!("it takes root and setpriv to run with fewer rights");
    };
    let mut vmm = Vmm::spawn(&VmmOptions::default())?;
    let mut command = place.tool(&NEEDED);
    command.args(["record", "--strict", "--ready", "ready", "--pid"]);
    let mut recorder = place.start(command.arg(vmm.pid().to_string()))?;
    rights_become(recorder.0.id(), 0)?;
    // It has a process to let go of, maps to look at and a file to end still.
    vmm.qmp.execute("stop", json!({}))?;
    vmm.qmp.execute("quit", json!({}))?;
    let status = recorder.0.wait()?;
    ensure!(status.success(), "{status}: {}", said(&mut recorder));
    let recording = Recording::read(&place.path("blackout.rec"))?;
    ensure!(recording.hits("vm_stop_begin").count() >= 1);
    ensure!(recording.ioctls().count() > 0);
    Ok(())
}

#[test]
fn rights_that_are_needed_later_are_kept_and_no_others() -> Result<()> {
    need_tool!();
    let Some(place) = Place::new()? else {
        skip!("it takes root and setpriv to run with fewer rights");
    };
    // As root, who has every right there is.
    let tool = || {
        let mut command = Command::new(place.path("blackout"));
        command.current_dir(place.dir.path());
        command.stdin(Stdio::null()).stderr(Stdio::piped());
        command
    };
    let every = ["record", "--ready", "ready", "--all"];
    let script = ["record", "--ready", "ready", "--", "sleep", "60"];
    let watch = "watch --ready ready --listen 127.0.0.1:0 --folder kept";
    let watch: Vec<_> = watch.split(' ').collect();
    let cases: [(&[&str], u64); 3] = [(&every, BITS), (&script, BITS | CAP_KILL), (&watch, BITS)];
    for (arguments, kept) in cases {
        let mut running = place.start(tool().args(arguments.iter().map(OsStr::new)))?;
        rights_become(running.0.id(), kept).with_context(|| arguments.join(" "))?;
        running.signal(Signal::SIGTERM)?;
        running.0.wait()?;
    }
    Ok(())
}

/// Waits until the process has just these rights: it says that it is ready first.
fn rights_become(pid: u32, expected: u64) -> Result<()> {
    let status = Path::new("/proc").join(pid.to_string()).join("status");
    let end = Instant::now() + LIMIT;
    loop {
        let text = fs::read_to_string(&status)?;
        let sets = ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"].map(|name| {
            let line = text.lines().find_map(|line| line.strip_prefix(name));
            line.and_then(|line| u64::from_str_radix(line.trim_start_matches(':').trim(), 16).ok())
        });
        let [inherited, permitted, effective, bounding, ambient] =
            sets.map(Option::unwrap_or_default);
        let own = [
            inherited,
            ambient,
            permitted ^ expected,
            effective ^ expected,
        ];
        // Whoever lacks CAP_SETPCAP can't reduce what it might be given by another program.
        if own == [0; 4] && bounding & !BITS & !CAP_KILL == 0 {
            return Ok(());
        }
        ensure!(Instant::now() < end, "not {expected:#x} alone: {text}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn said(running: &mut Killed) -> String {
    let mut text = String::new();
    if let Some(stderr) = &mut running.0.stderr {
        let _ = stderr.read_to_string(&mut text);
    }
    text
}
