//! A source and a destination of either kind of monitor, for benchmarks that compare them.

use std::net::TcpListener;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::ValueEnum;
use serde::Serialize;
use serde_json::json;

use crate::certificates::{Authority, Purpose, Validity};
use crate::{GuestView, Vmm, VmmOptions};

/// Whose monitor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Monitor {
    /// This project's.
    Blackout,
    /// Debian's QEMU.
    Qemu,
}

/// What a migration goes over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Transport {
    /// TCP on loopback.
    Tcp,
    /// TCP on loopback, with a CA and certificates of its own.
    Tls,
    /// TCP on loopback, with four connections for pages.
    Multifd,
    /// A unix socket.
    Unix,
    /// A unix socket over which guest RAM is passed and not sent: `mode: cpr-transfer`.
    Cpr,
}

/// A guest that runs, and a monitor that waits for it.
#[derive(Debug)]
pub struct Pair {
    /// Where the guest runs.
    pub source: Vmm,
    /// Where it is to go.
    pub destination: Vmm,
    /// The guest.
    pub guest: GuestView,
    /// Where the destination listens.
    pub uri: String,
}

impl Pair {
    /// Starts both and waits until the guest is ready.
    pub fn spawn(
        monitor: Monitor,
        transport: Transport,
        options: &VmmOptions,
        limit: Duration,
    ) -> Result<Self> {
        let spawn = match monitor {
            Monitor::Blackout => Vmm::spawn,
            Monitor::Qemu => Vmm::spawn_qemu,
        };
        let pki = tempfile::tempdir()?;
        let side = |endpoint: &str| {
            let mut options = options.clone();
            if transport == Transport::Tls {
                let dir = pki.path().display();
                let object = format!("tls-creds-x509,id=tls0,dir={dir},endpoint={endpoint}");
                let option = match monitor {
                    Monitor::Blackout => "--object",
                    Monitor::Qemu => "-object",
                };
                options.extra.extend([option.to_owned(), object]);
            }
            options
        };
        if transport == Transport::Tls {
            let ca = Authority::new();
            ca.trust(pki.path());
            ca.issue(pki.path(), Purpose::Client, &[], Validity::Now);
            ca.issue(pki.path(), Purpose::Server, &["127.0.0.1"], Validity::Now);
        }
        let mut source = spawn(&side("client"))?;
        prepare(&mut source, transport)?;
        if transport == Transport::Cpr {
            let mode = json!({ "mode": "cpr-transfer" });
            let set = source.qmp.execute("migrate-set-parameters", mode);
            set.context("this monitor has no such mode")?;
        }
        let guest = GuestView::open(source.pid())?;
        guest
            .wait_ready(limit)
            .with_context(|| format!("the console says: {}", source.console()))?;
        let uri = match transport {
            Transport::Unix | Transport::Cpr => {
                format!("unix:{}", source.dir().join("migration").display())
            }
            Transport::Tcp | Transport::Tls | Transport::Multifd => {
                format!("tcp:127.0.0.1:{}", free_port()?)
            }
        };
        let mut destination = spawn(&side("server").incoming("defer"))?;
        prepare(&mut destination, transport)?;
        destination
            .qmp
            .execute("migrate-incoming", json!({ "uri": uri }))?;
        Ok(Pair {
            source,
            destination,
            guest,
            uri,
        })
    }
}

/// Tells a monitor how it is to migrate.
fn prepare(vmm: &mut Vmm, transport: Transport) -> Result<()> {
    let parameters = match transport {
        Transport::Tls => json!({ "tls-creds": "tls0" }),
        Transport::Multifd => {
            let multifd = json!({ "capabilities": [{ "capability": "multifd", "state": true }] });
            vmm.qmp.execute("migrate-set-capabilities", multifd)?;
            json!({ "multifd-channels": 4 })
        }
        _ => return Ok(()),
    };
    vmm.qmp.execute("migrate-set-parameters", parameters)?;
    Ok(())
}

/// A TCP port on loopback that nobody listens on.
pub fn free_port() -> Result<u16> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?.port())
}
