//! Something that watches monitors: the tool, or bpftrace with a script that gathers the same.

use std::fmt::Write;
use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use blackout_abi::probes::{ArgKind, PROBES, PROVIDER};
use harness::{attached, programs};
use nix::unistd::{SysconfVar, sysconf};
use serde::Serialize;

use crate::LIMIT;

/// After bpftrace's first sign of life: it attaches one probe after the other.
const SETTLE: Duration = Duration::from_secs(2);

/// Who watches.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Watcher {
    /// Nobody.
    Nobody,
    /// `blackout record`.
    Tool,
    /// A bpftrace script.
    Bpftrace,
}

/// A watcher that has attached.
pub(crate) struct Attached {
    child: Child,
    /// From its start to everything being attached.
    pub(crate) took: Duration,
    before: Duration,
}

impl Attached {
    /// Has `who` watch the monitors `pids`, with its files in `folder`; `None` for nobody.
    pub(crate) fn start(who: Watcher, pids: &[u32], folder: &Path) -> Result<Option<Self>> {
        let start = Instant::now();
        let (ready, traced) = (folder.join("ready"), folder.join("traced"));
        let _ = fs::remove_file(&ready);
        let _ = fs::remove_file(&traced);
        let (mut command, sign) = match who {
            Watcher::Nobody => return Ok(None),
            Watcher::Tool => (tool(pids, folder, &ready)?, ready),
            Watcher::Bpftrace => (bpftrace(pids, folder, &traced)?, traced),
        };
        let child = command.stdin(Stdio::null()).stderr(Stdio::null()).spawn();
        let child = child.with_context(|| format!("starting {command:?}"))?;
        let mut attached = Attached {
            child,
            took: Duration::ZERO,
            before: Duration::ZERO,
        };
        attached.wait(&sign)?;
        attached.took = start.elapsed();
        if who == Watcher::Bpftrace {
            thread::sleep(SETTLE);
        }
        attached.before = cpu(attached.child.id())?;
        Ok(Some(attached))
    }

    /// Waits until the file `sign` has something in it.
    fn wait(&mut self, sign: &Path) -> Result<()> {
        let end = Instant::now() + LIMIT;
        while fs::metadata(sign).map_or(0, |file| file.len()) == 0 {
            if let Some(status) = self.child.try_wait()? {
                bail!("a watcher ended with {status} before it had attached");
            }
            ensure!(Instant::now() < end, "a watcher did not attach");
            thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }

    /// Its process.
    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// CPU time that it has used since it attached.
    pub(crate) fn cpu(&self) -> Result<Duration> {
        Ok(cpu(self.child.id())?.saturating_sub(self.before))
    }

    /// Ends it as Ctrl-C would; whether it says that all went well.
    pub(crate) fn stop(mut self) -> Result<bool> {
        attached::end(&mut self.child)?;
        Ok(self.child.wait()?.success())
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn tool(pids: &[u32], folder: &Path, ready: &Path) -> Result<Command> {
    let mut command = Command::new(programs::tool()?);
    command.args(["record", "--strict", "--output"]);
    command.arg(folder.join("recording"));
    command.arg("--ready").arg(ready);
    command.args(pids.iter().map(|pid| format!("--pid={pid}")));
    command.stdout(Stdio::null());
    Ok(command)
}

fn bpftrace(pids: &[u32], folder: &Path, traced: &Path) -> Result<Command> {
    let file = folder.join("same.bt");
    fs::write(&file, script(pids)?)?;
    let mut command = Command::new("bpftrace");
    // "Attaching N probes..." is the first thing in the file.
    command.args(["-B", "line", "-o"]).arg(traced);
    command.arg(file).stdout(Stdio::null());
    Ok(command)
}

/// What the tool records, as a person would gather it: every probe with its arguments, KVM's ioctls with
/// their times, the edges of `KVM_RUN` and of guest code, gaps above 200 us.
fn script(pids: &[u32]) -> Result<String> {
    let is_monitor: Vec<_> = pids.iter().map(|pid| format!("pid == {pid}")).collect();
    let is_monitor = is_monitor.join(" || ");
    let vmm = programs::vmm()?;
    let mut text = String::new();
    for probe in PROBES {
        let mut format = String::new();
        let mut values = String::new();
        for (index, arg) in probe.args.iter().enumerate() {
            let (kind, value) = match arg.kind {
                ArgKind::U64 => ("%llu", format!("arg{index}")),
                ArgKind::I64 => ("%lld", format!("arg{index}")),
                ArgKind::Str => ("%s", format!("str(arg{index})")),
            };
            write!(format, " {kind}")?;
            write!(values, ", {value}")?;
        }
        writeln!(
            text,
            "usdt:{}:{PROVIDER}:{name} {{ printf(\"%llu %d %d {name}{format}\\n\", nsecs, pid, tid{values}); }}",
            vmm.display(),
            name = probe.name,
        )?;
    }
    writeln!(
        text,
        "tracepoint:syscalls:sys_enter_ioctl /({is_monitor}) && ((args->cmd >> 8) & 0xff) == 0xae/ {{
  if (args->cmd == 0xae80) {{
    if (@exit[tid] && nsecs - @exit[tid] > 200000) {{ printf(\"%llu %d gap %llu\\n\", nsecs, tid, @exit[tid]); }}
    @enter[tid] = nsecs; @runs[tid] = @runs[tid] + 1;
  }} else {{
    @start[tid] = nsecs; @cmd[tid] = args->cmd; @fd[tid] = args->fd; @arg[tid] = args->arg;
  }}
}}
tracepoint:syscalls:sys_exit_ioctl /{is_monitor}/ {{
  if (@enter[tid] > @exit[tid]) {{ @exit[tid] = nsecs; }}
  else if (@start[tid]) {{
    printf(\"%llu %llu %d %d %x %d %llx %d\\n\", @start[tid], nsecs, pid, tid, @cmd[tid], @fd[tid], @arg[tid], args->ret);
    delete(@start[tid]); delete(@cmd[tid]); delete(@fd[tid]); delete(@arg[tid]);
  }}
}}
tracepoint:kvm:kvm_entry /@enter[tid]/ {{ @guest_enter[tid] = nsecs; }}
tracepoint:kvm:kvm_exit /@enter[tid]/ {{ @guest_exit[tid] = nsecs; }}
tracepoint:sched:sched_process_exit /@enter[tid]/ {{ printf(\"%llu %d end\\n\", nsecs, tid); }}"
    )?;
    if cfg!(target_arch = "x86_64") {
        text += "tracepoint:kvm:kvm_emulate_insn /@enter[tid]/ { @guest_exit[tid] = nsecs; }\n";
    }
    Ok(text)
}

/// CPU time of a process so far: `utime` and `stime` of `proc_pid_stat(5)`.
fn cpu(pid: u32) -> Result<Duration> {
    let path = format!("/proc/{pid}/stat");
    let text = fs::read_to_string(&path).with_context(|| path.clone())?;
    // The name may have blanks in it.
    let (_, rest) = text.rsplit_once(')').with_context(|| path.clone())?;
    let fields = rest.split_whitespace().skip(11).take(2);
    let ticks: u64 = fields.map(str::parse::<u64>).sum::<Result<_, _>>()?;
    let a_second = sysconf(SysconfVar::CLK_TCK)?.unwrap_or(100).cast_unsigned();
    Ok(Duration::from_secs_f64(ticks as f64 / a_second as f64))
}
