//! How fast a large idle guest full of incompressible pages migrates, and what that costs in CPU
//! time: this project's monitor and QEMU in turn, beside their limit, the sockets alone, and beside plain
//! reads from these sockets into memory that is fresh, as a destination's is.
//! `cargo xtask bench throughput` runs it and says what comes of it.
//!
//! Prints one JSON object a line for each run.

use std::fs;
use std::hint::black_box;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::ExitCode;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::Parser;
use harness::VmmOptions;
use harness::cpus::vcpu_threads;
use harness::pair::{Monitor, Pair, Transport};
use nix::unistd::{SysconfVar, sysconf};
use serde_json::json;

/// How long a guest may take to set itself up, and a migration to end.
const LIMIT: Duration = Duration::from_secs(300);

/// The guest's own pages lie below; they are not to be overwritten.
const KEPT: u64 = 16 << 20;

/// Bytes of one write or read of the bare sockets.
const CHUNK: usize = 256 << 10;

/// The smallest pages that memory comes in.
const PAGE: usize = 4096;

/// Migrates a large idle guest and measures how long it takes.
#[derive(Parser)]
#[command(name = "bench-throughput")]
struct Arguments {
    /// Whose migrations to measure; they take turns.
    #[arg(long, value_enum, required = true, value_delimiter = ',')]
    monitors: Vec<Monitor>,
    /// What to migrate over: tcp, tls, or multifd with four connections.
    #[arg(long, value_enum, required = true, value_delimiter = ',')]
    transports: Vec<Transport>,
    /// Guest RAM, GiB.
    #[arg(long, default_value_t = 4)]
    gib: u64,
    /// Migrations of each.
    #[arg(long, default_value_t = 3)]
    runs: usize,
}

fn main() -> ExitCode {
    harness::exit(&run(&Arguments::parse()))
}

fn run(arguments: &Arguments) -> Result<()> {
    for _ in 0..arguments.runs {
        for &transport in &arguments.transports {
            let connections = match transport {
                Transport::Multifd => 4,
                _ => 1,
            };
            for (what, fresh) in [("sockets", false), ("fresh", true)] {
                let took = sockets(arguments.gib << 30, connections, fresh)?;
                let run = json!({ "what": what, "transport": transport, "ns": ns(took) });
                println!("{run}");
            }
            for &monitor in &arguments.monitors {
                let (took, cpu) = migrate(arguments, monitor, transport)?;
                let (ns, cpu_ns) = (ns(took), ns(cpu));
                let run = json!({
                    "what": monitor, "transport": transport, "ns": ns, "cpu_ns": cpu_ns
                });
                println!("{run}");
            }
        }
    }
    Ok(())
}

/// Migrates a fresh guest: how long that took, and how much CPU time of both sides.
fn migrate(
    arguments: &Arguments,
    monitor: Monitor,
    transport: Transport,
) -> Result<(Duration, Duration)> {
    let options = VmmOptions {
        memory: format!("{}G", arguments.gib),
        cmdline: "idle=1".into(),
        ..VmmOptions::default()
    };
    let mut pair = Pair::spawn(monitor, transport, &options, LIMIT)?;
    pair.guest.fill(KEPT, arguments.gib << 30)?;
    // The rest of a limit that would keep a monitor from what the sockets can do.
    let unlimited = json!({ "max-bandwidth": 1u64 << 40 });
    if monitor == Monitor::Qemu {
        pair.source
            .qmp
            .execute("migrate-set-parameters", unlimited)?;
    }
    warm_up(arguments.gib << 30)?;
    let pids = [pair.source.pid(), pair.destination.pid()];
    let cpu = || {
        pids.iter()
            .try_fold(Duration::ZERO, |sum, pid| anyhow::Ok(sum + cpu_time(*pid)?))
    };
    let before = cpu()?;
    let start = Instant::now();
    let answer = pair.source.qmp.migrate(&pair.uri, LIMIT)?;
    let took = start.elapsed();
    let used = cpu()? - before;
    ensure!(answer["status"] == "completed", "{answer}");
    Ok((took, used))
}

/// The CPU time of a process so far, its vCPUs left out: a guest's work is not its monitor's.
fn cpu_time(pid: u32) -> Result<Duration> {
    let whole = ticks(&format!("/proc/{pid}/stat"))?;
    let mut guest = 0;
    for task in vcpu_threads(pid)? {
        guest += ticks(&task.join("stat").display().to_string())?;
    }
    let per_second = sysconf(SysconfVar::CLK_TCK)?.context("CLK_TCK")?;
    let seconds = whole.saturating_sub(guest) as f64 / per_second as f64;
    Ok(Duration::from_secs_f64(seconds))
}

/// User and system time of a process with all threads that it had, or of a thread, in clock ticks.
fn ticks(stat: &str) -> Result<u64> {
    let text = fs::read_to_string(stat)?;
    // The name in parentheses may hold anything; user and system time are fields 14 and 15.
    let (_, fields) = text.rsplit_once(')').context("stat")?;
    let mut times = fields.split_whitespace().skip(11);
    let mut next = || anyhow::Ok(times.next().context("stat")?.parse::<u64>()?);
    Ok(next()? + next()?)
}

/// Moves `bytes` from memory to memory over so many connections by TCP on loopback. If the memory that they
/// go to is used again and again, nothing that does more can be faster. If it is `fresh`, the kernel makes
/// each page as it is read into, which is what a destination does that does nothing else, and not the
/// fastest way.
fn sockets(bytes: u64, connections: u64, fresh: bool) -> Result<Duration> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let address = listener.local_addr()?;
    let mut pairs = Vec::new();
    for _ in 0..connections {
        pairs.push((TcpStream::connect(address)?, listener.accept()?.0));
    }
    let part = usize::try_from(bytes / connections)?;
    warm_up(bytes)?;
    let start = Instant::now();
    thread::scope(|scope| {
        let mut threads = Vec::new();
        for (mut out, mut back) in pairs {
            threads.push(scope.spawn(move || {
                let chunk = vec![0x5a; CHUNK];
                (0..part / CHUNK).try_for_each(|_| out.write_all(&chunk))?;
                anyhow::Ok(Duration::ZERO)
            }));
            threads.push(scope.spawn(move || {
                let mut memory = vec![0; if fresh { part } else { CHUNK }];
                for number in 0..part / CHUNK {
                    let at = number * CHUNK % memory.len();
                    back.read_exact(&mut memory[at..at + CHUNK])?;
                }
                Ok(start.elapsed())
            }));
        }
        // To give memory back takes time that is nobody's.
        let mut last = Duration::ZERO;
        for thread in threads {
            last = last.max(thread.join().ok().context("a thread panicked")??);
        }
        Ok(last)
    })
}

/// Touches so many bytes of memory by all CPUs at once, and gives them back. A virtual machine's memory may
/// be its own host's to find, at a cost that is neither monitor's, and is taken back within seconds once it
/// is free.
fn warm_up(bytes: u64) -> Result<()> {
    let threads = thread::available_parallelism()?.get();
    let part = usize::try_from(bytes)? / threads;
    let touch = || {
        let mut fresh = vec![0u8; part];
        fresh.chunks_mut(PAGE).for_each(|page| page[0] = 1);
        black_box(fresh)
    };
    thread::scope(|scope| {
        let parts: Vec<_> = (0..threads).map(|_| scope.spawn(touch)).collect();
        let parts: Option<Vec<_>> = parts.into_iter().map(|part| part.join().ok()).collect();
        parts.context("a thread panicked").map(drop)
    })
}

fn ns(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}
