//! What a monitor costs by itself: the time from its start to the guest's first instruction, and the
//! memory that it has besides the guest's. `cargo xtask bench boot` runs it.
//!
//! The guest is a handful of instructions that write a byte to the console, so what is measured is
//! the monitor: it ends when that byte comes out of the monitor's standard output.

use std::env::consts::ARCH;
use std::fs;
use std::io::{Read, Write};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::Parser;
use harness::programs;
use serde_json::json;
use tempfile::NamedTempFile;

/// Prints one JSON object for each start of a monitor.
#[derive(Parser)]
struct Arguments {
    /// Starts.
    #[arg(long, default_value_t = 20)]
    runs: usize,
    /// The guest's vCPUs.
    #[arg(long, default_value_t = 1)]
    cpus: u32,
    /// The guest's RAM.
    #[arg(long, default_value = "128M")]
    memory: String,
}

/// `mov $0x3f8, %dx; mov $'!', %al; out %al, %dx; hlt; jmp` back to `hlt`.
const X86_64: [u8; 10] = [0x66, 0xba, 0xf8, 0x03, 0xb0, b'!', 0xee, 0xf4, 0xeb, 0xfd];

/// `movz x1, #0x900, lsl #16; movz w2, #'!'; strb w2, [x1]; wfi; b` back to `wfi`.
const AARCH64: [u32; 5] = [
    0xd2a1_2001,
    0x5280_0422,
    0x3900_0022,
    0xd503_207f,
    0x17ff_ffff,
];

/// How long a started guest is left alone before its monitor's memory is looked at.
const SETTLE: Duration = Duration::from_millis(100);

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let mut payload = NamedTempFile::new()?;
    payload.write_all(&match ARCH {
        "aarch64" => AARCH64.map(u32::to_le_bytes).as_flattened().to_vec(),
        _ => X86_64.to_vec(),
    })?;
    for _ in 0..arguments.runs {
        let mut command = Command::new(programs::vmm()?);
        command
            .arg("--payload")
            .arg(payload.path())
            .args(["--cpus", &arguments.cpus.to_string()])
            .args(["--memory", &arguments.memory])
            .stdin(Stdio::null())
            .stdout(Stdio::piped());
        let started = Instant::now();
        let mut monitor = Killed(command.spawn().context("starting the monitor")?);
        let mut byte = [0];
        let mut stdout = monitor.0.stdout.take().context("no stdout")?;
        stdout
            .read_exact(&mut byte)
            .context("the guest wrote nothing")?;
        let took = started.elapsed();
        ensure!(byte == *b"!", "the guest wrote {byte:?}");
        thread::sleep(SETTLE);
        let (written, private) = memory(monitor.0.id())?;
        let ns = u64::try_from(took.as_nanos())?;
        println!(
            "{}",
            json!({ "ns": ns, "written_kib": written, "private_kib": private })
        );
    }
    Ok(())
}

/// KiB that a monitor has for itself besides guest RAM: what it has written, and that with what only
/// it has mapped of its program.
fn memory(pid: u32) -> Result<(u64, u64)> {
    let maps = fs::read_to_string(format!("/proc/{pid}/smaps"))?;
    let (mut written, mut clean) = (0, 0);
    let mut guest = false;
    for line in maps.lines() {
        let mut words = line.split_whitespace();
        match (
            words.next(),
            words.next().and_then(|word| word.parse::<u64>().ok()),
        ) {
            (Some("Private_Dirty:"), Some(kib)) if !guest => written += kib,
            (Some("Private_Clean:"), Some(kib)) if !guest => clean += kib,
            // A mapping's first line starts with its addresses.
            (Some(first), _) if first.contains('-') => guest = line.contains("blackout-ram"),
            _ => {}
        }
    }
    Ok((written, written + clean))
}

/// A monitor that is killed when it is dropped.
struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
