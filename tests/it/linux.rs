//! Stock Linux kernels boot, answer, restart, switch off, and move.

use std::env::consts::ARCH;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use harness::skip::slow;
use harness::{Shell, Vmm, VmmOptions, programs, skip};
use serde_json::{Value, json};

/// A boot under nested emulation, on a busy machine.
const BOOT: Duration = Duration::from_secs(240);
/// A boot, a login or a shutdown of a whole Debian there.
const SYSTEMD: Duration = Duration::from_secs(600);
/// An answer of a guest that has booted; there, each character that is typed takes many exits.
const ANSWER: Duration = Duration::from_secs(300);

const NEWEST: &str = "kernel-6.12";
const OLDEST: &str = "kernel-6.1";

macro_rules! need_linux {
    () => {
        if programs::linux().is_none() {
            skip!("this KVM boots no Linux guests, or nobody said where they are");
        }
    };
}

fn machine(kernel: &str, cpus: u32) -> VmmOptions {
    VmmOptions {
        memory: "256M".into(),
        cpus,
        linux: Some(kernel.into()),
        ..VmmOptions::default()
    }
}

/// A guest that has booted.
fn boot(options: &VmmOptions) -> Result<(Vmm, Shell)> {
    let vmm = Vmm::spawn(options)?;
    let mut shell = vmm.shell()?;
    let ready = shell.wait_ready(BOOT);
    ready.with_context(|| format!("the monitor said: {}", vmm.stderr()))?;
    Ok((vmm, shell))
}

fn number(shell: &mut Shell, command: &str) -> Result<u64> {
    let text = shell.run(command, ANSWER)?;
    text.parse().with_context(|| format!("{command}: {text}"))
}

fn boots(kernel: &str, cpus: u32) -> Result<()> {
    let (mut vmm, mut shell) = boot(&machine(kernel, cpus))?;
    let release = shell.run("uname -r", ANSWER)?;
    let series = kernel.rsplit('-').next().unwrap_or_default();
    ensure!(release.starts_with(&format!("{series}.")), "{release}");
    ensure!(number(&mut shell, "nproc")? == u64::from(cpus));
    // The clock of the day, from the PL031 or kvmclock, is this machine's.
    let own = std::time::SystemTime::UNIX_EPOCH.elapsed()?.as_secs();
    let guest = number(&mut shell, "date +%s")?;
    ensure!(own.abs_diff(guest) < 300, "{own} here, {guest} there");
    if ARCH == "x86_64" {
        let source = "cat /sys/devices/system/clocksource/clocksource0/current_clocksource";
        let source = shell.run(source, ANSWER)?;
        ensure!(source == "kvm-clock" || source == "tsc", "{source}");
    }
    let text: String = ('a'..='z').cycle().take(2000).collect();
    let echoed = shell.run(&format!("echo {text}"), ANSWER)?;
    ensure!(echoed == text, "the console lost some of what was typed");
    shell.start("poweroff -f")?;
    ends(&mut vmm, "guest-shutdown")
}

/// The guest ends the monitor.
fn ends(vmm: &mut Vmm, reason: &str) -> Result<()> {
    let event = vmm.qmp.wait_event("SHUTDOWN", ANSWER)?;
    let expected = json!({ "guest": true, "reason": reason });
    ensure!(event["data"] == expected, "{event}");
    let status = vmm.wait_exit(ANSWER)?;
    ensure!(status.success(), "{status}: {}", vmm.stderr());
    Ok(())
}

#[test]
fn linux_6_12_boots_with_two_vcpus() -> Result<()> {
    need_linux!();
    boots(NEWEST, 2)
}

#[test]
fn linux_6_1_boots_with_one_vcpu() -> Result<()> {
    need_linux!();
    boots(OLDEST, 1)
}

#[test]
fn linux_6_12_boots_by_pvh() -> Result<()> {
    need_linux!();
    if ARCH != "x86_64" {
        skip!("only x86-64 kernels have more than one way in");
    }
    boots("vmlinux-6.12", 1)
}

#[test]
fn linux_boots_with_other_numbers_of_vcpus() -> Result<()> {
    need_linux!();
    if !slow() {
        skip!("slow tier: four more boots");
    }
    for (kernel, cpus) in [(NEWEST, 1), (NEWEST, 4), (OLDEST, 2), (OLDEST, 4)] {
        boots(kernel, cpus).with_context(|| format!("{kernel}, {cpus} vCPUs"))?;
    }
    Ok(())
}

#[test]
fn linux_restarts_and_heeds_the_power_button() -> Result<()> {
    need_linux!();
    // arm64 cloud kernels have no driver for the button.
    let kernel = if ARCH == "aarch64" {
        "kernel-6.12-generic"
    } else {
        NEWEST
    };
    let (mut vmm, mut shell) = boot(&machine(kernel, 2))?;
    shell.run("touch /tmp/before", ANSWER)?;
    shell.start("reboot -f")?;
    let event = vmm.qmp.wait_event("RESET", ANSWER)?;
    let expected = json!({ "guest": true, "reason": "guest-reset" });
    ensure!(event["data"] == expected, "{event}");
    shell.wait_ready(BOOT)?;
    ensure!(shell.run("ls /tmp", ANSWER)?.is_empty());
    ensure!(number(&mut shell, "nproc")? == 2);

    vmm.qmp.execute("system_powerdown", Value::Null)?;
    vmm.qmp.wait_event("POWERDOWN", ANSWER)?;
    shell.wait_for("guest: power button", ANSWER)?;
    ends(&mut vmm, "guest-shutdown")
}

#[test]
fn debian_boots_from_its_disk_to_its_login() -> Result<()> {
    need_linux!();
    if !slow() {
        skip!("slow tier: systemd under emulation");
    }
    let disk = programs::linux().map(|folder| folder.join("root"));
    let Some(disk) = disk.filter(|disk| disk.is_file()) else {
        skip!("there is no disk with a Debian of this architecture");
    };
    let mut options = machine(NEWEST, 1);
    options.memory = "512M".into();
    options.cmdline = "root=/dev/vda".into();
    options.extra = vec!["--disk".into(), format!("path={}", disk.display())];
    let mut vmm = Vmm::spawn(&options)?;
    let mut shell = vmm.shell()?;
    let login = shell.wait_for("guest login: ", SYSTEMD);
    login.with_context(|| format!("the monitor said: {}", vmm.stderr()))?;
    shell.type_line("root")?;
    shell.wait_for("root@guest:~# ", SYSTEMD)?;
    let first = shell.run("cat /proc/1/comm; findmnt -no SOURCE /", SYSTEMD)?;
    ensure!(first.lines().eq(["systemd", "/dev/vda"]), "{first}");
    shell.start("systemctl poweroff")?;
    let event = vmm.qmp.wait_event("SHUTDOWN", SYSTEMD)?;
    ensure!(event["data"]["reason"] == "guest-shutdown", "{event}");
    ensure!(vmm.wait_exit(ANSWER)?.success(), "{}", vmm.stderr());
    Ok(())
}

/// A guest that counts on every CPU moves and counts on, and its shell is the same one.
fn moves(kernel: &str, cpus: u32) -> Result<()> {
    let options = machine(kernel, cpus);
    let (mut source, mut shell) = boot(&options)?;
    let count = "count() { while :; do n=$((n+1)); echo $n > /tmp/count.$1; done; }";
    shell.run(count, ANSWER)?;
    for cpu in 0..cpus {
        shell.run(
            &format!("count {cpu} & taskset -p {:x} $!", 1 << cpu),
            ANSWER,
        )?;
    }
    shell.run("mark=$$", ANSWER)?;
    let mut before = uptime(&mut shell)?;

    for hop in 0..2 {
        let mut destination = Vmm::spawn(&options.incoming("defer"))?;
        let uri = format!("unix:{}", destination.dir().join("migration").display());
        let arguments = json!({ "uri": uri });
        destination.qmp.execute("migrate-incoming", arguments)?;
        let mut there = destination.shell()?;
        let answer = source.qmp.migrate(&uri, BOOT)?;
        ensure!(answer["status"] == "completed", "hop {hop}: {answer}");

        let same = there.run("[ $mark = $$ ] && echo same", ANSWER)?;
        ensure!(same == "same", "hop {hop}: the shell is another: {same}");
        for cpu in 0..cpus {
            // For a moment of each turn the file is empty.
            let read = format!("until grep . /tmp/count.{cpu}; do :; done");
            let first = number(&mut there, &read)?;
            let later = format!("sleep 1; {read}");
            let second = number(&mut there, &later)?;
            ensure!(first < second, "hop {hop}: CPU {cpu} does not count");
        }
        let now = uptime(&mut there)?;
        let passed = now.checked_sub(before).context("uptime went back")?;
        ensure!(
            passed < 200,
            "hop {hop}: {passed} s have passed in the guest"
        );
        (source, shell, before) = (destination, there, now);
    }
    shell.start("poweroff -f")?;
    ends(&mut source, "guest-shutdown")
}

/// How long a guest is stopped before it moves: much more than what the rest takes.
const PAUSE: Duration = Duration::from_secs(20);

/// Seconds by which a guest's clock is late when it was stopped for [`PAUSE`] and then moved.
fn late(mode: &str) -> Result<f64> {
    let options = machine(NEWEST, 2);
    let (mut source, mut shell) = boot(&options)?;
    let (then, before) = (Instant::now(), uptime(&mut shell)?);
    source.qmp.execute("stop", Value::Null)?;
    thread::sleep(PAUSE);
    let mut destination = options.incoming("defer");
    destination.extra = vec!["--guest-clock".into(), mode.into()];
    let mut destination = Vmm::spawn(&destination)?;
    let uri = format!("unix:{}", destination.dir().join("migration").display());
    let arguments = json!({ "uri": uri });
    destination.qmp.execute("migrate-incoming", arguments)?;
    let mut there = destination.shell()?;
    let answer = source.qmp.migrate(&uri, BOOT)?;
    ensure!(answer["status"] == "completed", "{answer}");
    destination.qmp.execute("cont", Value::Null)?;
    let passed = (uptime(&mut there)? - before) as f64;
    Ok(then.elapsed().as_secs_f64() - passed)
}

#[test]
fn a_guests_clock_goes_on_or_stands_still_as_it_is_told() -> Result<()> {
    need_linux!();
    if !slow() {
        skip!("slow tier: two more guests");
    }
    let (advanced, frozen) = (late("advance")?, late("freeze")?);
    println!("late by {advanced:.1} s when told to advance, by {frozen:.1} s when to freeze");
    let pause = PAUSE.as_secs_f64();
    ensure!(advanced < pause / 2.0, "the clock did not advance");
    ensure!(frozen > pause * 0.9, "the clock did not stand still");
    Ok(())
}

/// Seconds since the guest has booted.
fn uptime(shell: &mut Shell) -> Result<u64> {
    number(shell, "cut -d . -f 1 /proc/uptime")
}

#[test]
fn linux_6_12_moves_with_two_vcpus() -> Result<()> {
    need_linux!();
    moves(NEWEST, 2)
}

#[test]
fn linux_moves_with_other_numbers_of_vcpus() -> Result<()> {
    need_linux!();
    if !slow() {
        skip!("slow tier: four more guests");
    }
    for (kernel, cpus) in [(NEWEST, 1), (NEWEST, 4), (OLDEST, 1), (OLDEST, 2)] {
        moves(kernel, cpus).with_context(|| format!("{kernel}, {cpus} vCPUs"))?;
    }
    Ok(())
}
