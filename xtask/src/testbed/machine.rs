//! One run of a testbed: an emulated arm64 computer with EL2, a GICv3 and its ITS, or an x86-64 one
//! with SVM.
//!
//! QEMU's TCG needs neither root nor KVM. Inside, a stock Debian kernel offers a working `/dev/kvm`,
//! so the VMM's arm64 half meets the real `KVM_DEV_ARM_ITS_SAVE_TABLES`, and its x86-64 half boots
//! Linux wherever this machine's own KVM can't.

use std::collections::BTreeSet;
use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::kernel::{Arch, Kernel};
use crate::{artifacts::Artifacts, command, initramfs::Initramfs, paths};

use super::heartbeat::Heartbeat;

/// What the testbed's clock counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    /// Two CPUs, each on a thread of its own: the quickest way to see whether something works.
    Function,
    /// One CPU whose clock advances 1 ns an instruction: costs repeat from boot to boot.
    Counting,
}

/// The line that parts the output of a run that hung from the output of its repetition.
pub(crate) const STARTED_AGAIN: &str = "testbed: an emulated CPU hung; starting again";

/// How often a testbed is started before its hangs are taken for something else.
const ATTEMPTS: u32 = 3;

/// A testbed to be started, with the files that it will hold.
pub(crate) struct Testbed {
    kernel: Kernel,
    mode: Mode,
    memory_mib: u32,
    files: Vec<(PathBuf, String)>,
    environment: Vec<(String, String)>,
    /// Further arguments of QEMU.
    devices: Vec<String>,
    folder: PathBuf,
}

/// How a program in the testbed ended, and how long it took by this machine's clock.
#[derive(Debug)]
pub(crate) struct Finished {
    /// The program's exit status as the shell gives it: 128 + n for signal n.
    pub(crate) status: i32,
    /// From the start of QEMU to its end.
    pub(crate) elapsed: Duration,
}

/// How a run ended.
enum Ended {
    Finished(Finished),
    /// An emulated CPU hung.
    Hung,
}

impl Testbed {
    /// A testbed with `kernel` whose working files go to `target/testbed/NAME`.
    ///
    /// Two testbeds that run at the same time need different names.
    pub(crate) fn new(kernel: Kernel, name: &str) -> Self {
        Self {
            kernel,
            mode: Mode::Function,
            memory_mib: 2048,
            files: Vec::new(),
            environment: Vec::new(),
            devices: Vec::new(),
            folder: paths::target().join("testbed").join(name),
        }
    }

    /// Chooses what the testbed's clock counts.
    pub(crate) fn mode(mut self, mode: Mode) -> Self {
        self.mode = mode;
        self
    }

    /// Sets the size of the testbed's memory.
    pub(crate) fn memory_mib(mut self, mib: u32) -> Self {
        self.memory_mib = mib;
        self
    }

    /// Puts the file `host` of this machine at the absolute path `guest`, executable.
    pub(crate) fn file(mut self, host: impl Into<PathBuf>, guest: impl Into<String>) -> Self {
        self.files.push((host.into(), guest.into()));
        self
    }

    /// Puts the built programs into `/bin`, and tells the harness so.
    pub(crate) fn programs(mut self, artifacts: &Artifacts) -> Self {
        for (name, file) in artifacts.files() {
            self = self.file(file, format!("/bin/{name}"));
        }
        for (name, value) in artifacts.environment(Some("/bin")) {
            self = self.env(name, value);
        }
        self
    }

    /// Lets the testbed see `folder` of this machine, and what is in it, as `/share/NAME`: large files
    /// that not every test needs.
    pub(crate) fn shared(self, folder: &Path, name: &str) -> Result<Self> {
        let target = self.share().join(name);
        fs::create_dir_all(&target)
            .with_context(|| format!("cannot create {}", target.display()))?;
        for entry in fs::read_dir(folder)? {
            let entry = entry.with_context(|| format!("cannot list {}", folder.display()))?;
            let (file, copy) = (entry.path(), target.join(entry.file_name()));
            let _ = fs::remove_file(&copy);
            fs::hard_link(&file, &copy)
                .or_else(|_| fs::copy(&file, &copy).map(drop))
                .with_context(|| format!("cannot write {}", copy.display()))?;
        }
        Ok(self)
    }

    /// Sets an environment variable of the program.
    pub(crate) fn env(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.environment.push((name.into(), value.into()));
        self
    }

    /// Gives it a network card, `eth0`, behind QEMU's network `backend`.
    pub(crate) fn network(mut self, backend: &str) -> Self {
        // Two testbeds on one network need different addresses.
        let [.., a, b] = number_of(&self.folder).to_be_bytes();
        let card = format!("virtio-net-pci,netdev=net,mac=52:54:00:77:{a:02x}:{b:02x}");
        let arguments = ["-netdev", &format!("{backend},id=net"), "-device", &card];
        self.devices.extend(arguments.map(str::to_owned));
        self
    }

    /// Mounts `folder` of this machine, which it can't change, as `/usr`: programs with their libraries.
    pub(crate) fn usr(mut self, folder: &Path) -> Self {
        let folder = option(folder);
        let shared = format!("local,path={folder},mount_tag=usr,security_model=none,readonly=on");
        self.devices.extend(["-virtfs".to_owned(), shared]);
        self
    }

    /// Lets its clock begin at `date`.
    pub(crate) fn clock(mut self, date: &str) -> Self {
        self.devices
            .extend(["-rtc".to_owned(), format!("base={date}")]);
        self
    }

    /// The folder of this machine that the testbed sees as `/share`.
    pub(crate) fn share(&self) -> PathBuf {
        self.folder.join("share")
    }

    /// Boots, runs `program` (a path or a name on PATH, then its arguments), and powers off.
    ///
    /// Every line that it prints on standard output or standard error is handed to `line` at once.
    /// `/share/out` in the testbed is emptied first and is `share()/out` here afterwards.
    ///
    /// When an emulated CPU hangs, `line` gets [`STARTED_AGAIN`], and the program runs again from its
    /// start.
    ///
    /// # Errors
    /// When QEMU cannot be started, when the testbed ends without reporting a status (a panic of
    /// its kernel, say), or when `timeout` passes. QEMU is gone in every case.
    pub(crate) fn run(
        &self,
        program: &[&str],
        timeout: Duration,
        mut line: impl FnMut(&str),
    ) -> Result<Finished> {
        // Once in a while an emulated CPU stops taking interrupts, whatever it runs.
        for attempt in 0..ATTEMPTS {
            if attempt > 0 {
                line(STARTED_AGAIN);
            }
            if let Ended::Finished(finished) = self.boot(program, timeout, &mut line)? {
                return Ok(finished);
            }
        }
        let log = self.kernel_log();
        bail!("an emulated CPU hung, {ATTEMPTS} times\n{log}")
    }

    fn boot(&self, program: &[&str], timeout: Duration, line: impl FnMut(&str)) -> Result<Ended> {
        self.prepare(program, false)?;
        let started = Instant::now();
        let mut qemu = self.qemu_command()?;
        qemu.args(["-chardev", "file,id=output,path=/dev/stdout"])
            .args(["-device", "virtserialport,chardev=output,nr=1"]);
        let mut heartbeat = Heartbeat::of(self.heartbeat_file());
        // Where instructions are counted, a heart would be counted, too.
        let mut hung = || self.mode == Mode::Function && heartbeat.stands_still();
        let give_up = || started.elapsed() >= timeout || hung();
        let exit = command::stream_until(&mut qemu, give_up, line)?;
        if hung() || self.kernel_found_it_hung() {
            return Ok(Ended::Hung);
        }
        let Some(exit) = exit else {
            let (seconds, log) = (timeout.as_secs(), self.kernel_log());
            bail!("the testbed did not finish within {seconds} s\n{log}");
        };
        self.finished(exit, started).map(Ended::Finished)
    }

    /// Boots with the terminal attached to a shell, or to `program` if it is not empty.
    pub(crate) fn interact(&self, program: &[&str]) -> Result<Finished> {
        let program = if program.is_empty() {
            &["sh", "-l"]
        } else {
            program
        };
        self.prepare(program, true)?;
        let started = Instant::now();
        let exit = self
            .qemu_command()?
            .args([
                "-chardev",
                "stdio,id=output,mux=on,signal=off",
                "-mon",
                "chardev=output",
            ])
            .args(["-device", "virtconsole,chardev=output"])
            .status()
            .context("cannot start QEMU")?;
        self.finished(exit, started)
    }

    /// Writes the initramfs and empties the results of an earlier run.
    fn prepare(&self, program: &[&str], interactive: bool) -> Result<()> {
        let results = self.share().join("out");
        if results.exists() {
            fs::remove_dir_all(&results)
                .with_context(|| format!("cannot empty {}", results.display()))?;
        }
        fs::create_dir_all(&results)
            .with_context(|| format!("cannot create {}", results.display()))?;
        for stale in [self.status_file(), self.log_file(), self.heartbeat_file()] {
            fs::write(&stale, "").with_context(|| format!("cannot write {}", stale.display()))?;
        }

        let mut initramfs = Initramfs::create(&self.initramfs_file())?;
        initramfs.file("/init", include_bytes!("init.sh"))?;
        initramfs.copy(&self.kernel.busybox, "/bin/busybox")?;
        initramfs.copy(&self.kernel.busybox, "/bin/sh")?;
        for (name, file) in &self.kernel.modules {
            initramfs.copy(file, &format!("/modules/{name}.ko"))?;
        }
        let modules: Vec<_> = self
            .kernel
            .modules
            .iter()
            .map(|(name, _)| name.as_str())
            .collect();
        initramfs.file("/etc/modules", modules.join("\n").as_bytes())?;
        for (host, guest) in &self.files {
            initramfs.copy(host, guest)?;
        }
        for library in self.libraries()? {
            initramfs.copy(&library, &library.display().to_string())?;
        }
        initramfs.file("/etc/command", self.shell_command(program).as_bytes())?;
        if interactive {
            initramfs.file("/etc/interactive", b"")?;
        }
        if self.mode == Mode::Function {
            initramfs.file("/etc/heartbeat", b"")?;
        }
        initramfs.finish()
    }

    /// The shared libraries of the programs that were built for this machine itself.
    fn libraries(&self) -> Result<BTreeSet<PathBuf>> {
        let mut libraries = BTreeSet::new();
        if self.kernel.arch == Arch::X86_64 {
            for (program, _) in &self.files {
                // It fails for what is no program, or a static one.
                let listed = command::probe(Command::new("ldd").arg(program));
                libraries.extend(listed_libraries(&listed.unwrap_or_default()));
            }
        }
        Ok(libraries)
    }

    fn shell_command(&self, program: &[&str]) -> String {
        let mut script = String::new();
        for (name, value) in &self.environment {
            script += &format!("export {name}={}\n", quote(value));
        }
        let words: Vec<_> = program.iter().map(|word| quote(word)).collect();
        script + "exec " + &words.join(" ") + "\n"
    }

    /// QEMU's SVM helpers change `CPUState.interrupt_request` without the lock that its devices hold when
    /// they raise an interrupt there. Once in some 10,000 interrupts one is lost so, and when that is the
    /// timer's, and the CPU is in a guest that does not exit, the testbed stands still for good. Each change
    /// is one instruction, so nothing is lost while all of QEMU's threads share one CPU.
    fn qemu_command(&self) -> Result<Command> {
        let (program, machine, cpu, console) = match self.kernel.arch {
            Arch::Aarch64 => (
                "qemu-system-aarch64",
                "virt,virtualization=on,gic-version=3,its=on,dtb-kaslr-seed=off",
                "max,pauth-impdef=on",
                "ttyAMA0",
            ),
            // Emulated CPUs now and then lose their flags in a 16-byte exchange that a guest is left in.
            Arch::X86_64 => ("qemu-system-x86_64", "q35", "max,+svm,-cx16", "ttyS0"),
        };
        // setpriv ends QEMU when this process dies, however it dies.
        let mut qemu = Command::new("setpriv");
        qemu.args(["--pdeathsig", "KILL"]);
        if self.kernel.arch == Arch::X86_64 {
            qemu.args(["taskset", "--cpu-list", &last_cpu()?]);
        }
        qemu.arg(program)
            .args(["-machine", machine, "-cpu", cpu])
            .args(["-m", &self.memory_mib.to_string()])
            .args(["-nodefaults", "-display", "none", "-no-reboot"])
            .arg("-serial")
            .arg(format!("file:{}", option(&self.log_file())))
            .arg("-kernel")
            .arg(&self.kernel.image)
            .arg("-initrd")
            .arg(self.initramfs_file())
            .arg("-append")
            .arg(format!(
                "console={console} quiet nokaslr panic=-1 nmi_watchdog=panic,1"
            ))
            .args(["-device", "virtio-serial-pci"])
            .arg("-chardev")
            .arg(format!(
                "file,id=status,path={}",
                option(&self.status_file())
            ))
            .args(["-device", "virtserialport,chardev=status,nr=2"])
            .arg("-chardev")
            .arg(format!(
                "file,id=heartbeat,path={}",
                option(&self.heartbeat_file())
            ))
            .args(["-device", "virtserialport,chardev=heartbeat,nr=3"])
            .arg("-virtfs")
            .arg(format!(
                "local,path={},mount_tag=share,security_model=none",
                option(&self.share())
            ));
        qemu.args(&self.devices);
        match self.mode {
            // CPUs of x86-64 that change code under each other get confused when each has its thread.
            Mode::Function if self.kernel.arch == Arch::X86_64 => {
                qemu.args(["-accel", "tcg", "-smp", "1"])
            }
            Mode::Function => qemu.args(["-accel", "tcg,thread=multi", "-smp", "2"]),
            Mode::Counting => qemu.args(["-icount", "shift=0,sleep=off", "-smp", "1"]),
        };
        Ok(qemu)
    }

    fn finished(&self, exit: ExitStatus, started: Instant) -> Result<Finished> {
        let elapsed = started.elapsed();
        if !exit.success() {
            bail!("QEMU failed: {exit}; if it is not there, run `cargo xtask setup`");
        }
        let text = fs::read_to_string(self.status_file()).context("cannot read the status file")?;
        match text.trim().parse() {
            Ok(status) => Ok(Finished { status, elapsed }),
            Err(_) => bail!("the testbed ended without a status\n{}", self.kernel_log()),
        }
    }

    /// Whether the kernel found that one of its CPUs does not answer; it panics then.
    fn kernel_found_it_hung(&self) -> bool {
        let log = fs::read(self.log_file()).unwrap_or_default();
        String::from_utf8_lossy(&log).contains("hard LOCKUP")
    }

    /// The end of what the kernel wrote on its console: the reason when a testbed fails.
    fn kernel_log(&self) -> String {
        let log = fs::read(self.log_file()).unwrap_or_default();
        let log = String::from_utf8_lossy(&log);
        let lines: Vec<_> = log.lines().collect();
        let tail = lines[lines.len().saturating_sub(20)..].join("\n");
        format!(
            "its kernel's last words ({}):\n{tail}",
            self.log_file().display()
        )
    }

    fn status_file(&self) -> PathBuf {
        self.folder.join("status")
    }

    fn heartbeat_file(&self) -> PathBuf {
        self.folder.join("heartbeat")
    }

    fn log_file(&self) -> PathBuf {
        self.folder.join("kernel.log")
    }

    fn initramfs_file(&self) -> PathBuf {
        self.folder.join("initramfs.cpio")
    }
}

/// The last of the CPUs that this process may use.
fn last_cpu() -> Result<String> {
    let status =
        fs::read_to_string("/proc/self/status").context("cannot read /proc/self/status")?;
    let list = status
        .lines()
        .find_map(|line| line.strip_prefix("Cpus_allowed_list:"));
    let list = list.context("/proc/self/status has no Cpus_allowed_list")?;
    Ok(last_of(list).to_owned())
}

/// The last number in a list such as `0-3,8`.
fn last_of(list: &str) -> &str {
    list.rsplit([',', '-']).next().unwrap_or(list).trim()
}

/// A number that differs between testbeds.
fn number_of(folder: &Path) -> u64 {
    let mut hasher = DefaultHasher::new();
    folder.hash(&mut hasher);
    hasher.finish()
}

/// The paths in what `ldd` printed.
fn listed_libraries(listed: &str) -> impl Iterator<Item = PathBuf> {
    let paths = listed
        .split_whitespace()
        .filter(|word| word.starts_with('/'));
    paths.map(PathBuf::from)
}

/// `path` as a value within one of QEMU's comma-separated options.
fn option(path: &Path) -> String {
    path.display().to_string().replace(',', ",,")
}

/// `word` as one word of a POSIX shell.
fn quote(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_reach_the_shell_as_they_are() {
        assert_eq!(quote("it's $HOME"), r"'it'\''s $HOME'");
    }

    #[test]
    fn libraries_are_found_in_what_ldd_prints() {
        let listed = "\tlinux-vdso.so.1 (0x7ffc)\n\tlibc.so.6 => /lib/libc.so.6 (0x7f)\n\t/lib64/ld.so (0x7f)\n";
        let found: Vec<_> = listed_libraries(listed).collect();
        assert_eq!(found, ["/lib/libc.so.6", "/lib64/ld.so"].map(PathBuf::from));
    }

    #[test]
    fn the_last_cpu_is_found_in_a_list() {
        let lists = ["\t0-3,8\n", "\t0-1", "5"];
        assert_eq!(lists.map(last_of), ["8", "1", "5"]);
    }

    #[test]
    fn commas_do_not_end_an_option() {
        assert_eq!(option(Path::new("/a,b/c")), "/a,,b/c");
    }
}
