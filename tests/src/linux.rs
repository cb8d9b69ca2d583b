//! A Linux guest with devices, from its boot through its moves.

use std::net::Ipv4Addr;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::{Bridge, Shell, Vmm, VmmOptions};

/// Under emulation, and with others on the same machine, a boot takes minutes.
const LIMIT: Duration = Duration::from_secs(300);

/// The guest's address on the [`Bridge`].
pub const ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 2);

/// The address of its network card.
pub const MAC: &str = "52:54:00:77:00:02";

/// A Linux guest in a monitor, and its shell.
#[derive(Debug)]
pub struct Linux {
    /// The monitor.
    pub vmm: Vmm,
    /// Its shell.
    pub shell: Shell,
    /// What the monitor was started with.
    pub options: VmmOptions,
}

/// A machine for a kernel's series, as `6.12`, with these further arguments.
pub fn machine(series: &str, cpus: u32, extra: &[String]) -> VmmOptions {
    VmmOptions {
        memory: "192M".into(),
        cpus,
        linux: Some(format!("kernel-{series}")),
        extra: extra.to_vec(),
        ..VmmOptions::default()
    }
}

impl Linux {
    /// Starts a guest; its tap interface, if it has one, is plugged in, and its address given.
    pub fn boot(options: VmmOptions, net: Option<(&Bridge, &str)>) -> Result<Self> {
        let vmm = Vmm::spawn(&options)?;
        let shell = vmm.shell()?;
        let mut this = Linux {
            vmm,
            shell,
            options,
        };
        let booted = this.shell.wait_ready(LIMIT);
        booted.with_context(|| format!("the monitor said: {}", this.vmm.stderr()))?;
        if let Some((bridge, tap)) = net {
            bridge.plug(tap)?;
            let up = format!("ip addr add {ADDRESS}/24 dev eth0 && ip link set eth0 up");
            this.run(&up)?;
        }
        Ok(this)
    }

    /// Moves the guest to a new monitor with these further arguments; returns what `query-migrate`
    /// says of it.
    pub fn migrate(&mut self, extra: &[String], net: Option<(&Bridge, &str)>) -> Result<Value> {
        let there = self.destination(extra, net)?;
        self.migrate_to(there)
    }

    /// Starts the monitor that the guest is to move to.
    pub fn destination(&self, extra: &[String], net: Option<(&Bridge, &str)>) -> Result<Linux> {
        let options = VmmOptions {
            extra: extra.to_vec(),
            ..self.options.clone()
        };
        let mut there = Vmm::spawn(&options.incoming("defer"))?;
        if let Some((bridge, tap)) = net {
            bridge.plug(tap)?;
        }
        let shell = there.shell()?;
        let uri = migration_uri(&there);
        there
            .qmp
            .execute("migrate-incoming", json!({ "uri": uri }))?;
        Ok(Linux {
            vmm: there,
            shell,
            options,
        })
    }

    /// Moves the guest there.
    pub fn migrate_to(&mut self, mut there: Linux) -> Result<Value> {
        let uri = migration_uri(&there.vmm);
        let answer = self.vmm.qmp.migrate(&uri, LIMIT)?;
        ensure!(
            answer["status"] == "completed",
            "{answer}; the source said: {}; the destination: {}",
            self.vmm.stderr(),
            there.vmm.stderr()
        );
        there.vmm.qmp.wait_migrated(LIMIT)?;
        let status = there.vmm.qmp.status()?;
        ensure!(status == "running", "{status}: {}", there.vmm.stderr());
        *self = there;
        Ok(answer)
    }

    /// Runs a command; returns what it wrote.
    ///
    /// # Errors
    /// When its status is not 0, or it takes too long.
    pub fn run(&mut self, command: &str) -> Result<String> {
        let output = self
            .shell
            .run(&format!("{command}; echo status $?"), LIMIT)?;
        let (output, status) = output.rsplit_once("status ").unwrap_or((&output, ""));
        ensure!(
            status == "0",
            "'{command}' ended with status {status}: {output}"
        );
        Ok(output.trim().to_owned())
    }

    /// Runs a command that writes a number first, such as `wc -l`.
    pub fn number(&mut self, command: &str) -> Result<u64> {
        let output = self.run(command)?;
        let number = output.split_whitespace().next().unwrap_or_default();
        number
            .parse()
            .with_context(|| format!("'{command}' said: {output}"))
    }

    /// Runs a command in the background; nobody hears what it writes.
    ///
    /// When it ends it interrupts the shell, which busybox's reads its input by `fgets`: programs of
    /// busybox that the shell runs without an `execve`, such as `head`, then find the error on the
    /// standard input that they inherit, and should not be given a pipe.
    pub fn start(&mut self, command: &str) -> Result<()> {
        self.run(&format!("({command}) > /dev/null 2>&1 & true"))
            .map(drop)
    }

    /// Interrupts that the guest has counted on lines of `/proc/interrupts` that have `name`.
    pub fn interrupts(&mut self, name: &str) -> Result<u64> {
        let cpus = self.options.cpus;
        let columns: Vec<_> = (2..2 + cpus).map(|column| format!("${column}")).collect();
        let sum = columns.join("+");
        let count = format!("awk '/{name}/ {{ n += {sum} }} END {{ print n+0 }}' /proc/interrupts");
        self.number(&count)
    }
}

fn migration_uri(vmm: &Vmm) -> String {
    format!("unix:{}", vmm.dir().join("migration").display())
}
