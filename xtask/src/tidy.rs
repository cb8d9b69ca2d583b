//! `cargo xtask tidy`: the project's own rules, those that no lint knows.

mod imports;
mod readme;
mod scripts;

use std::fmt;
use std::fs;
use std::process::Command;

use anyhow::{Context, Result};

use crate::{command, paths};

/// No file of code is longer.
const LONGEST: usize = 500;

/// Where unsafe code may be: the VMM's and the tool's system calls, guest memory, tap
/// interfaces, the probe sites,
/// the eBPF programs, the bare-metal guests, and the records that both sides of an eBPF map read as
/// plain bytes.
const UNSAFE: [&str; 11] = [
    "vmm/src/kvm/",
    "vmm/src/memory/",
    "vmm/src/probes.rs",
    "vmm/src/devices/virtio/net/tap.rs",
    "ebpf/kern/",
    "ebpf/abi/src/event.rs",
    "ebpf/user/src/usdt/attach.rs",
    "ebpf/user/src/capture/child.rs",
    "ebpf/user/src/capture/multi.rs",
    "ebpf/user/src/doctor/site.rs",
    "tests/guest/",
];

/// Where the VMM and the tool may ask which architecture they are built for.
const ARCHITECTURE: [&str; 3] = [
    "vmm/src/arch/mod.rs",
    "vmm/src/kvm/mod.rs",
    "vmm/src/probes.rs",
];

/// Starts of paths that exist on one person's machine only.
const PRIVATE_PATHS: [&str; 4] = ["/home/", "/work/", "/root/", "/tmp/w/"];

/// Arguments of `cargo xtask tidy`.
#[derive(clap::Args, Default)]
pub(crate) struct Arguments {
    /// Bring the generated part of README.md and the bpftrace scripts up to date.
    #[arg(long)]
    write: bool,
}

/// A file that git knows or would add.
struct Source {
    /// Its path below the workspace.
    path: String,
    text: String,
}

/// A rule that a line breaks.
struct Finding {
    path: String,
    line: usize,
    message: String,
}

/// Runs the verb; the exit code is 1 when a rule is broken.
pub(crate) fn run(arguments: &Arguments) -> Result<u8> {
    if arguments.write {
        readme::write()?;
        scripts::write()?;
    }
    let findings = check()?;
    for finding in &findings {
        println!("{finding}");
    }
    if findings.is_empty() {
        println!("tidy");
    }
    Ok(u8::from(!findings.is_empty()))
}

fn check() -> Result<Vec<Finding>> {
    let mut findings = Vec::new();
    for source in sources()? {
        private_paths(&source, &mut findings);
        if source.path.ends_with(".rs") {
            length(&source, &mut findings);
            unsafe_code(&source, &mut findings);
            architecture(&source, &mut findings);
            imports::check(&source, &mut findings);
        }
    }
    findings.extend(readme::check());
    findings.extend(scripts::check());
    Ok(findings)
}

fn sources() -> Result<Vec<Source>> {
    let list = command::output(
        Command::new("git")
            .args(["ls-files", "--cached", "--others", "--exclude-standard"])
            .current_dir(paths::workspace()),
    )?;
    let mut sources = Vec::new();
    for path in list.lines() {
        let file = paths::workspace().join(path);
        // A deleted file stays in the index until it is committed; what is no text has no lines.
        if !file.is_file() {
            continue;
        }
        let bytes = fs::read(&file).with_context(|| format!("cannot read {}", file.display()))?;
        if let Ok(text) = String::from_utf8(bytes) {
            sources.push(Source {
                path: path.to_owned(),
                text,
            });
        }
    }
    Ok(sources)
}

fn length(source: &Source, findings: &mut Vec<Finding>) {
    let lines = source.text.lines().count();
    if lines > LONGEST {
        findings.push(source.finding(
            lines,
            format!("{lines} lines; split it, {LONGEST} is the most"),
        ));
    }
}

fn unsafe_code(source: &Source, findings: &mut Vec<Finding>) {
    if UNSAFE
        .iter()
        .any(|allowed| source.path.starts_with(allowed))
    {
        return;
    }
    for (number, line) in source.lines_with("(unsafe_code)") {
        if line.contains("allow") || line.contains("expect") {
            findings.push(source.finding(number, "unsafe code has no place in this file"));
        }
    }
}

fn architecture(source: &Source, findings: &mut Vec<Finding>) {
    let bound = source.path.starts_with("vmm/") || source.path.starts_with("ebpf/");
    if !bound || ARCHITECTURE.contains(&source.path.as_str()) {
        return;
    }
    for (number, line) in source.lines_with("target_arch") {
        if line.contains("cfg") && !line.contains("bpf_target_arch") {
            let message = "only arch/mod.rs, kvm/mod.rs and probes.rs may ask for the architecture";
            findings.push(source.finding(number, message));
        }
    }
}

fn private_paths(source: &Source, findings: &mut Vec<Finding>) {
    // This file has to name what it looks for.
    if source.path == "xtask/src/tidy.rs" {
        return;
    }
    for start in PRIVATE_PATHS {
        for (number, _) in source.lines_with(start) {
            findings.push(source.finding(number, format!("a path of one machine: {start}")));
        }
    }
}

impl Source {
    /// Lines that contain `text`, with their numbers from 1.
    fn lines_with(&self, text: &str) -> impl Iterator<Item = (usize, &str)> {
        let found = self
            .text
            .lines()
            .enumerate()
            .filter(move |(_, line)| line.contains(text));
        found.map(|(index, line)| (index + 1, line))
    }

    fn finding(&self, line: usize, message: impl Into<String>) -> Finding {
        Finding {
            path: self.path.clone(),
            line,
            message: message.into(),
        }
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}:{}: {}", self.path, self.line, self.message)
    }
}
