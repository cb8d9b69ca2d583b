//! A monitor as a child process.

use std::fs::{self, File};
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::json;
use tempfile::TempDir;

use crate::skip::emulated;
use crate::{Qmp, Shell, programs};

/// How long a monitor may take until its QMP socket answers.
const START: Duration = Duration::from_secs(120);
/// The downtime limit under emulation, where a stop with many interrupts takes longer than the default
/// allows: a monitor refuses to exceed its limit.
const EMULATED_LIMIT_MS: u64 = 20_000;

/// How to start a monitor.
#[derive(Clone, Debug)]
pub struct VmmOptions {
    /// The program, if it is not [`programs::vmm`].
    pub program: Option<PathBuf>,
    /// `--memory`.
    pub memory: String,
    /// `--cpus`.
    pub cpus: u32,
    /// `--cmdline`: the guest's words.
    pub cmdline: String,
    /// `--kernel`: the name of a file in the folder of Linux guests, whose initramfs goes with it and
    /// whose console then is a socket. Without it the guest is the bare-metal one.
    pub linux: Option<String>,
    /// `--incoming`: with it there is no program.
    pub incoming: Option<String>,
    /// Further arguments.
    pub extra: Vec<String>,
}

impl Default for VmmOptions {
    fn default() -> Self {
        VmmOptions {
            program: None,
            memory: "128M".into(),
            cpus: 1,
            cmdline: String::new(),
            linux: None,
            incoming: None,
            extra: Vec::new(),
        }
    }
}

impl VmmOptions {
    /// The same machine as a destination that listens at `uri`.
    pub fn incoming(&self, uri: &str) -> Self {
        VmmOptions {
            incoming: Some(uri.to_owned()),
            ..self.clone()
        }
    }
}

/// A running monitor; killed when it is dropped.
#[derive(Debug)]
pub struct Vmm {
    child: Child,
    dir: TempDir,
    /// A QMP client of it.
    pub qmp: Qmp,
}

impl Vmm {
    /// Starts a monitor and waits until its QMP answers.
    pub fn spawn(options: &VmmOptions) -> Result<Self> {
        let dir = TempDir::with_prefix("blackout-")?;
        let mut vmm = Vmm::start(blackout(options, &dir)?, dir)?;
        if emulated() {
            let limit = json!({ "downtime-limit": EMULATED_LIMIT_MS });
            vmm.qmp.execute("migrate-set-parameters", limit)?;
        }
        Ok(vmm)
    }

    /// Starts Debian's QEMU in its place, with the same guest in a like machine.
    pub fn spawn_qemu(options: &VmmOptions) -> Result<Self> {
        let dir = TempDir::with_prefix("blackout-")?;
        Vmm::start(qemu(options, &dir)?, dir)
    }

    fn start(mut command: Command, dir: TempDir) -> Result<Self> {
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::create(dir.path().join("stderr"))?);
        let mut child = command
            .spawn()
            .with_context(|| format!("starting {command:?}"))?;
        match Qmp::connect(&dir.path().join("qmp"), START) {
            Ok(qmp) => Ok(Vmm { child, dir, qmp }),
            Err(error) => {
                let _ = child.kill();
                let status = child.wait()?;
                let stderr = fs::read_to_string(dir.path().join("stderr")).unwrap_or_default();
                Err(error.context(format!("the monitor ended with {status}: {stderr}")))
            }
        }
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// A directory of its own, gone with it.
    pub fn dir(&self) -> PathBuf {
        self.dir.path().to_owned()
    }

    /// The shell of a Linux guest.
    pub fn shell(&self) -> Result<Shell> {
        Shell::connect(&self.dir.path().join("console"))
    }

    /// What the guest wrote to its console.
    pub fn console(&self) -> String {
        self.text("console")
    }

    /// What the monitor said.
    pub fn stderr(&self) -> String {
        self.text("stderr")
    }

    /// Kills it at once, as an accident would.
    pub fn kill(&mut self) -> Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }

    /// Waits until it ends by itself.
    pub fn wait_exit(&mut self, limit: Duration) -> Result<ExitStatus> {
        let deadline = Instant::now() + limit;
        loop {
            if let Some(status) = self.child.try_wait()? {
                return Ok(status);
            }
            if Instant::now() > deadline {
                bail!(
                    "the monitor did not end within {limit:?}; it said: {}",
                    self.stderr()
                );
            }
            thread::sleep(Duration::from_millis(5));
        }
    }

    fn text(&self, name: &str) -> String {
        let bytes = fs::read(self.dir.path().join(name)).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }
}

fn blackout(options: &VmmOptions, dir: &TempDir) -> Result<Command> {
    let file = |name| dir.path().join(name).display().to_string();
    let mut command = match &options.program {
        Some(program) => Command::new(program),
        None => Command::new(programs::vmm()?),
    };
    command
        .args(["--memory", &options.memory])
        .args(["--cpus", &options.cpus.to_string()])
        .args(["--qmp", &format!("unix:{}", file("qmp"))])
        .args(&options.extra);
    let kind = if options.linux.is_some() {
        "unix"
    } else {
        "file"
    };
    command.args(["--serial", &format!("{kind}:{}", file("console"))]);
    match (&options.incoming, &options.linux) {
        (Some(uri), _) => command.args(["--incoming", uri]),
        (None, Some(kernel)) => {
            let folder = programs::linux().context("there are no Linux guests here")?;
            // Each character on the console costs an exit.
            let cmdline = format!("console={CONSOLE} quiet panic=-1 {}", options.cmdline);
            command
                .arg("--kernel")
                .arg(folder.join(kernel))
                .arg("--initrd")
                .arg(folder.join("initramfs"))
                .args(["--cmdline", &cmdline])
        }
        (None, None) => command
            .arg("--payload")
            .arg(programs::guest()?)
            .args(["--cmdline", &options.cmdline]),
    };
    Ok(command)
}

/// What Linux calls the serial port.
const CONSOLE: &str = if cfg!(target_arch = "aarch64") {
    "ttyAMA0"
} else {
    "ttyS0"
};

/// QEMU's machine with the controller that this monitor's machine has, and RAM in the backend `ram`.
const QEMU_MACHINE: &str = if cfg!(target_arch = "aarch64") {
    "virt,gic-version=3,its=on,memory-backend=ram"
} else {
    "pc,memory-backend=ram"
};

/// Its CPU. KVM on a development machine does not know `arch-capabilities`, and QEMU asks for it.
const QEMU_CPU: &str = if cfg!(target_arch = "aarch64") {
    "host"
} else {
    "host,-arch-capabilities"
};

/// What QEMU needs to run the bare-metal guest with KVM and to be looked into from outside.
fn qemu(options: &VmmOptions, dir: &TempDir) -> Result<Command> {
    let file = |name| dir.path().join(name).display().to_string();
    let memory = &options.memory;
    let mut command = Command::new(programs::qemu());
    command
        .args(["-accel", "kvm", "-M", QEMU_MACHINE, "-cpu", QEMU_CPU])
        .args(["-nodefaults", "-display", "none", "-m", memory])
        .args(["-smp", &options.cpus.to_string()])
        .arg("-object")
        .arg(format!(
            "memory-backend-memfd,id=ram,size={memory},share=on"
        ))
        .args(["-name", "guest,debug-threads=on"])
        .args(["-serial", &format!("file:{}", file("console"))])
        .args(["-qmp", &format!("unix:{},server=on,wait=off", file("qmp"))])
        .args(["-append", &options.cmdline])
        .arg("-kernel")
        .arg(programs::guest()?)
        .args(&options.extra);
    if let Some(uri) = &options.incoming {
        command.args(["-incoming", uri]);
    }
    Ok(command)
}

impl Drop for Vmm {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
