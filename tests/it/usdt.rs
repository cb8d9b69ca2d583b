//! Probes of programs that are not ours: C programs with `sys/sdt.h`, whose arguments are wherever the
//! compiler left them, and whose semaphores keep them off until somebody looks.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use anyhow::{Context, Result, ensure};
use blackout::recording::{Frame, Value};
use blackout::usdt::{Binary, Operand};
use harness::skip;

use crate::recorded::{Killed, Recording, finish, need_tool, recorder};

const LEVELS: [&str; 2] = ["-O0", "-O2"];

/// Rounds of the program while it is recorded.
const ROUNDS: u64 = 40;

#[test]
fn every_operand_of_gcc_and_clang_is_read() -> Result<()> {
    need_tool!();
    let dir = tempfile::tempdir()?;
    let mut kinds = BTreeMap::new();
    for compiler in ["gcc", "clang"] {
        for level in LEVELS {
            let Some(program) = build(compiler, level, dir.path())? else {
                skip!("{compiler} or sys/sdt.h (systemtap-sdt-dev) is missing");
            };
            println!("{compiler} {level}");
            for site in Binary::open(&program)?.sites {
                ensure!(
                    site.semaphore.is_some() && !site.semaphore_hazard,
                    "{site:?}"
                );
                for arg in site.args {
                    *kinds.entry(kind(arg.operand)?).or_insert(0) += 1;
                }
            }
            one(&program, dir.path())?;
        }
    }
    println!("{kinds:?}");
    let expected = ["constant", "indexed", "memory", "register"];
    ensure!(
        kinds.keys().eq(&expected),
        "not every kind of operand was met: {kinds:?}"
    );
    Ok(())
}

/// The notes of arm64 programs are read on any machine.
#[test]
fn every_operand_of_arm64_is_understood() -> Result<()> {
    if !Path::new("/usr/aarch64-linux-gnu/include/stdio.h").exists() {
        skip!("libc6-dev-arm64-cross is missing");
    }
    let dir = tempfile::tempdir()?;
    let mut kinds = BTreeMap::new();
    for level in LEVELS {
        let Some(program) = build("aarch64-linux-gnu-gcc", level, dir.path())? else {
            skip!("gcc-aarch64-linux-gnu or systemtap-sdt-dev is missing");
        };
        let sites = Binary::open(&program)?.sites;
        ensure!(sites.len() >= 10, "{} sites", sites.len());
        for arg in sites.into_iter().flat_map(|site| site.args) {
            let kind = kind(arg.operand).with_context(|| arg.text.clone())?;
            *kinds.entry(kind).or_insert(0) += 1;
        }
    }
    println!("{kinds:?}");
    ensure!(
        ["constant", "memory", "register"]
            .iter()
            .all(|kind| kinds.contains_key(kind))
    );
    Ok(())
}

fn kind(operand: Operand) -> Result<&'static str> {
    Ok(match operand {
        Operand::Constant(_) => "constant",
        Operand::Register { .. } => "register",
        Operand::Memory { .. } => "memory",
        Operand::Indexed { .. } => "indexed",
        Operand::Unreadable(why) => anyhow::bail!("unreadable: {why}"),
    })
}

/// Records the program, and holds what arrived against what it says that it gave.
fn one(program: &Path, dir: &Path) -> Result<()> {
    let mut running = Running::start(program)?;
    // Nobody is attached: what a semaphore guards does not run.
    let quiet = running.round(1)?;
    ensure!(
        !quiet.iter().any(|line| line.starts_with("vmstate")),
        "{quiet:?}"
    );
    let whom = ["--probe", "operands:*", "--probe", "qemu:*", "--pid"].map(str::to_owned);
    let pid = running.child.0.id().to_string();
    let recorder = recorder(dir, &[&whom[..], &[pid]].concat())?;
    let mut given = Vec::new();
    for n in 2..2 + ROUNDS {
        given.extend(running.round(n * n)?);
    }
    let recording = finish(recorder, dir)?;
    let quiet = running.round(1)?;
    ensure!(
        !quiet.iter().any(|line| line.starts_with("vmstate")),
        "a semaphore stays raised: {quiet:?}"
    );
    let arrived = told(&recording);
    ensure!(given.len() as u64 == 10 * ROUNDS && arrived.len() == given.len());
    for (given, arrived) in given.iter().zip(&arrived) {
        ensure!(given == arrived, "{arrived} was given as {given}");
    }
    Ok(())
}

/// The hits of a recording in the words of the program.
fn told(recording: &Recording) -> Vec<String> {
    let names = recording.frames.iter().filter_map(|frame| match frame {
        Frame::Probe(probe) => Some((probe.id, probe.name.as_str())),
        _ => None,
    });
    let names: BTreeMap<_, _> = names.collect();
    let hits = recording.frames.iter().filter_map(|frame| match frame {
        Frame::Hit(hit) => Some(hit),
        _ => None,
    });
    let told = hits.map(|hit| {
        let mut line = names.get(&hit.probe).copied().unwrap_or("?").to_owned();
        for value in &hit.args {
            line.push(' ');
            line.push_str(&match value {
                Value::U64(value) => value.to_string(),
                Value::I64(value) => value.to_string(),
                Value::Str(value) => value.clone(),
                Value::Unreadable => "unreadable".to_owned(),
            });
        }
        line
    });
    told.collect()
}

/// Builds the program; `None` where the compiler or the header is missing.
fn build(compiler: &str, level: &str, dir: &Path) -> Result<Option<PathBuf>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("usdt");
    let header = "/usr/include/x86_64-linux-gnu";
    if !Path::new(header).join("sys/sdt.h").exists() || !folder.is_dir() {
        return Ok(None);
    }
    let program = dir.join(format!("operands-{compiler}{level}"));
    let mut command = Command::new(compiler);
    command.args([
        level,
        "-Wall",
        "-Wextra",
        "-Werror",
        "-idirafter",
        header,
        "-o",
    ]);
    command.arg(&program).arg(folder.join("operands.c"));
    let Ok(output) = command.output() else {
        return Ok(None);
    };
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{command:?}: {said}");
    Ok(Some(program))
}

/// The program, which fires its probes once for each line that it is given.
struct Running {
    child: Killed,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Running {
    fn start(program: &Path) -> Result<Self> {
        let mut command = Command::new(program);
        let mut child: Child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let input = child.stdin.take().context("no stdin")?;
        let output = child.stdout.take().context("no stdout")?;
        let mut running = Self {
            child: Killed(child),
            input,
            output: BufReader::new(output),
        };
        ensure!(running.line()? == "ready");
        Ok(running)
    }

    /// Fires every probe once; gives what the program says of each.
    fn round(&mut self, n: u64) -> Result<Vec<String>> {
        writeln!(self.input, "{n} round-{n}")?;
        let mut lines = Vec::new();
        loop {
            let line = self.line()?;
            if line == "done" {
                return Ok(lines);
            }
            lines.push(line);
        }
    }

    fn line(&mut self) -> Result<String> {
        let mut line = String::new();
        ensure!(self.output.read_line(&mut line)? > 0, "the program ended");
        Ok(line.trim_end().to_owned())
    }
}
