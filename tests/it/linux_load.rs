//! Linux at work is moved back and forth, and nothing of its work is lost or done twice.

use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::net::TcpListener;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use harness::linux::{ADDRESS, Linux, MAC, machine};
use harness::skip::slow;
use harness::{Bridge, bridge, programs, skip};

/// Under emulation, and with others on the same machine, everything takes long.
const LIMIT: Duration = Duration::from_secs(300);

/// Where on the disk each writer's copies are, in MiB, and where the log of rounds starts.
const WRITERS: u64 = 3;
const COPY_MIB: u64 = 2;
const LOG_MIB: u64 = 16;
const DISK_MIB: u64 = 32;

/// A stream of numbers from the guest, which must come one by one, and go on.
struct Stream {
    seen: Arc<AtomicU64>,
    reader: thread::JoinHandle<Result<()>>,
}

impl Stream {
    /// Has the guest connect and count.
    fn start(guest: &mut Linux) -> Result<Self> {
        let listener = TcpListener::bind((bridge::HOST, 0))?;
        let port = listener.local_addr()?.port();
        let count = format!(
            "i=0; while [ ! -e /tmp/stop ]; do echo $i; i=$((i+1)); done | nc {} {port}",
            bridge::HOST
        );
        guest.start(&count)?;
        let (stream, _) = listener.accept()?;
        stream.set_read_timeout(Some(LIMIT))?;
        let seen = Arc::new(AtomicU64::new(0));
        let noted = Arc::clone(&seen);
        let reader = thread::spawn(move || {
            for (expected, line) in BufReader::new(stream).lines().enumerate() {
                let line = line.context("the stream broke")?;
                ensure!(line == expected.to_string(), "{line} came for {expected}");
                noted.store(expected as u64, Ordering::Relaxed);
            }
            Ok(())
        });
        Ok(Stream { seen, reader })
    }

    /// Waits for more numbers.
    fn goes_on(&self) -> Result<()> {
        let before = self.seen.load(Ordering::Relaxed);
        let deadline = Instant::now() + LIMIT;
        while self.seen.load(Ordering::Relaxed) < before + 10 {
            if self.reader.is_finished() || Instant::now() > deadline {
                bail!("the stream ended at {before}");
            }
            thread::sleep(Duration::from_millis(10));
        }
        Ok(())
    }

    fn end(self) -> Result<u64> {
        match self.reader.join() {
            Ok(result) => result?,
            Err(_) => bail!("the reader panicked"),
        }
        Ok(self.seen.load(Ordering::Relaxed))
    }
}

/// How often the guest is pinged, in seconds.
const PING_INTERVAL: &str = "0.1";

/// By how much the guest may seem away longer than it was: its first answers wait for a busy,
/// emulated machine.
const LATE: Duration = Duration::from_secs(5);

/// Pings until killed.
struct Pings {
    ping: Child,
    /// When each answer came.
    answers: Arc<Mutex<Vec<Instant>>>,
    reader: thread::JoinHandle<()>,
}

impl Pings {
    fn start() -> Result<Self> {
        let mut ping = Command::new("ping");
        ping.args(["-i", PING_INTERVAL, &ADDRESS.to_string()]);
        let mut ping = ping.stdout(Stdio::piped()).spawn().context("ping")?;
        let output = BufReader::new(ping.stdout.take().context("ping's output")?);
        let answers = Arc::new(Mutex::new(Vec::new()));
        let noted = Arc::clone(&answers);
        let reader = thread::spawn(move || {
            for line in output.lines().map_while(Result::ok) {
                if line.contains("seq=") {
                    noted.lock().unwrap().push(Instant::now());
                }
            }
        });
        Ok(Pings {
            ping,
            answers,
            reader,
        })
    }

    /// The longest time without an answer since `start`.
    fn longest_gap(&self, start: Instant) -> Duration {
        let answers = self.answers.lock().unwrap();
        let since = answers.iter().filter(|&&answer| answer >= start);
        let mut last = start;
        let gaps = since.map(|&answer| answer - std::mem::replace(&mut last, answer));
        gaps.max().unwrap_or_default()
    }

    /// How many were answered.
    fn end(mut self) -> Result<usize> {
        self.ping.kill()?;
        self.ping.wait()?;
        if self.reader.join().is_err() {
            bail!("the reader panicked");
        }
        Ok(self.answers.lock().unwrap().len())
    }
}

/// Lets the guest write: copies of one file beside each other, and a log of which round it is.
fn start_writers(guest: &mut Linux) -> Result<String> {
    let make = format!("head -c {} /dev/urandom > /tmp/copy", COPY_MIB << 20);
    guest.run(&make)?;
    for writer in 0..WRITERS {
        let seek = writer * COPY_MIB;
        let write = format!(
            "while [ ! -e /tmp/stop ]; do dd if=/tmp/copy of=/dev/vda bs=256k \
             seek={} oflag=direct conv=notrunc 2> /dev/null || touch /tmp/failed; done",
            seek * 4
        );
        guest.start(&write)?;
    }
    let log = format!(
        "i=0; while [ ! -e /tmp/stop ]; do printf '%-511s\\n' round.$i | dd of=/dev/vda bs=512 \
         seek=$(({LOG_MIB} * 2048 + i)) conv=notrunc,fsync 2> /dev/null || touch /tmp/failed; \
         i=$((i+1)); echo $i > /tmp/rounds; done"
    );
    guest.start(&log)?;
    guest.run("sha256sum < /tmp/copy")
}

/// Stops the writers and holds the disk against what they say they wrote.
fn check_disk(guest: &mut Linux, disk: &Path, sum: &str) -> Result<u64> {
    guest.run("touch /tmp/stop; wait; sync")?;
    guest.run("[ ! -e /tmp/failed ]")?;
    let rounds = guest.number("cat /tmp/rounds")?;
    for writer in 0..WRITERS {
        let read = format!(
            "dd if=/dev/vda bs=256k skip={} count={} iflag=direct 2> /dev/null | sha256sum",
            writer * COPY_MIB * 4,
            COPY_MIB * 4
        );
        let found = guest.run(&read)?;
        ensure!(found == sum, "copy {writer} is {found}, not {sum}");
    }
    let contents = fs::read(disk)?;
    let log = &contents[(LOG_MIB << 20) as usize..];
    for (round, sector) in log.chunks(512).take(rounds as usize).enumerate() {
        let line = String::from_utf8_lossy(sector);
        ensure!(
            line.trim() == format!("round.{round}"),
            "round {round}: {line}"
        );
    }
    let rest = &log[rounds as usize * 512..];
    ensure!(
        rest.iter().all(|&byte| byte == 0),
        "more was written than said"
    );
    Ok(rounds)
}

fn moves_under_load(series: &str, cpus: u32, hops: usize) -> Result<()> {
    if programs::linux().is_none() {
        skip!("there are no Linux guests here");
    }
    let folder = tempfile::tempdir()?;
    let disk = folder.path().join("disk");
    File::create(&disk)?.set_len(DISK_MIB << 20)?;
    let bridge = Bridge::new("br-load")?;
    let taps = ["load-a", "load-b"];
    let extra = |hop: usize| {
        let disk = format!("path={}", disk.display());
        let net = format!("tap={},mac={MAC}", taps[hop % 2]);
        ["--disk", &disk, "--net", &net, "--rng"].map(str::to_owned)
    };
    let mut guest = Linux::boot(machine(series, cpus, &extra(0)), Some((&bridge, taps[0])))?;
    let sum = start_writers(&mut guest)?;
    let stream = Stream::start(&mut guest)?;
    let pings = Pings::start()?;
    for hop in 1..=hops {
        let start = Instant::now();
        let moved = guest.migrate(&extra(hop), Some((&bridge, taps[hop % 2])));
        let moved = moved.with_context(|| format!("hop {hop}"))?;
        stream.goes_on().with_context(|| format!("hop {hop}"))?;
        let downtime = moved["blackout"]["downtime-ns"].as_u64();
        let downtime = Duration::from_nanos(downtime.context("no downtime")?);
        let silent = pings.longest_gap(start);
        println!("hop {hop}: {silent:.1?} without an answer to a ping, downtime {downtime:.1?}");
        ensure!(silent < downtime + LATE, "hop {hop}: the network was away");
        ensure!(
            silent > downtime / 2,
            "hop {hop}: a guest that is stopped answers"
        );
        // Every queue that has work still interrupts.
        let queues = [
            "virtio0-req",
            "virtio1-input",
            "virtio1-output",
            "virtio2-input",
        ];
        for queue in queues {
            let before = guest.interrupts(queue)?;
            let deadline = Instant::now() + LIMIT;
            while guest.interrupts(queue)? == before {
                ensure!(Instant::now() < deadline, "hop {hop}: {queue} is silent");
                guest
                    .shell
                    .run("head -c 16 /dev/hwrng > /dev/null", LIMIT)?;
            }
        }
    }
    let rounds = check_disk(&mut guest, &disk, &sum)?;
    let numbers = stream.end()?;
    let answered = pings.end()?;
    ensure!(answered > 0, "no ping was answered");
    println!(
        "Linux {series}, {cpus} vCPUs, {hops} migrations: {rounds} log rounds on disk, \
         {numbers} numbers over TCP, {answered} pings answered"
    );
    Ok(())
}

#[test]
fn linux_at_work_moves_and_nothing_is_lost() -> Result<()> {
    moves_under_load("6.12", 1, 2)
}

#[test]
fn linux_with_two_vcpus_moves_back_and_forth() -> Result<()> {
    if !slow() {
        skip!("slow tier: twenty migrations under emulation");
    }
    moves_under_load("6.12", 2, 20)
}

#[test]
fn linux_with_four_vcpus_moves_back_and_forth() -> Result<()> {
    if !slow() {
        skip!("slow tier: twenty migrations under emulation");
    }
    moves_under_load("6.12", 4, 20)
}

#[test]
fn an_older_linux_moves_back_and_forth() -> Result<()> {
    if !slow() {
        skip!("slow tier: twenty migrations under emulation");
    }
    moves_under_load("6.1", 1, 20)
}
