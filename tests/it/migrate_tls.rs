//! Guests that move where nobody can read them, to whom they are meant for and to nobody else.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use harness::certificates::{Authority, Purpose, Validity};
use harness::{GuestView, Vmm, VmmOptions};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::migrate::{LIMIT, Running};

pub(crate) const HOST: &str = "127.0.0.1";

/// Credentials of one CA for a source and a destination, in one folder.
pub(crate) fn credentials() -> Result<TempDir> {
    let folder = tempfile::tempdir()?;
    let ca = Authority::new();
    ca.trust(folder.path());
    ca.issue(folder.path(), Purpose::Client, &[], Validity::Now);
    ca.issue(folder.path(), Purpose::Server, &[HOST], Validity::Now);
    Ok(folder)
}

/// A monitor that has those in `folder` as the object `tls0`.
pub(crate) fn options(folder: &Path, endpoint: &str) -> VmmOptions {
    let object = format!(
        "tls-creds-x509,id=tls0,dir={},endpoint={endpoint}",
        folder.display()
    );
    VmmOptions {
        memory: "64M".into(),
        cmdline: "dirty=1M".into(),
        extra: ["--verify-ram", "--object", &object].map(Into::into).into(),
        ..VmmOptions::default()
    }
}

/// A destination on loopback, and its port.
pub(crate) fn wait_for(options: &VmmOptions, transport: &str) -> Result<(Running, String)> {
    let mut vmm = Vmm::spawn(&options.incoming("defer"))?;
    let here = json!({ "uri": format!("{transport}:{HOST}:0") });
    vmm.qmp.execute("migrate-incoming", here)?;
    let answer = vmm.qmp.execute("query-migrate", Value::Null)?;
    let port = answer["socket-address"][0]["port"].as_str();
    let port = port
        .with_context(|| format!("no port: {answer}"))?
        .to_owned();
    let guest = GuestView::open(vmm.pid())?;
    Ok((Running { vmm, guest }, port))
}

#[test]
fn a_guest_moves_by_tls() -> Result<()> {
    let folder = credentials()?;
    let mut source = Running::boot(&options(folder.path(), "client"))?;
    let (mut there, port) = wait_for(&options(folder.path(), "server"), "tls")?;
    let answer = source
        .vmm
        .qmp
        .migrate(&format!("tls:{HOST}:{port}"), LIMIT)?;
    ensure!(answer["status"] == "completed", "{answer}");
    ensure!(source.vmm.qmp.status()? == "postmigrate");
    there.runs()
}

/// Lets the guest go over four connections for pages.
pub(crate) fn use_lanes(source: &mut Running) -> Result<()> {
    let qmp = &mut source.vmm.qmp;
    let multifd = json!({ "capabilities": [{ "capability": "multifd", "state": true }] });
    qmp.execute("migrate-set-capabilities", multifd)?;
    qmp.execute("migrate-set-parameters", json!({ "multifd-channels": 4 }))?;
    Ok(())
}

/// Each of the connections proves who it is.
#[test]
fn a_guest_moves_by_tls_over_several_connections() -> Result<()> {
    let folder = credentials()?;
    let mut source = Running::boot(&options(folder.path(), "client"))?;
    let (mut there, port) = wait_for(&options(folder.path(), "server"), "tls")?;
    use_lanes(&mut source)?;
    let qmp = &mut source.vmm.qmp;
    let answer = qmp.migrate(&format!("tls:{HOST}:{port}"), LIMIT)?;
    ensure!(answer["status"] == "completed", "{answer}");
    there.runs()
}

/// Objects and parameters by QMP, as libvirt does it, and a name that is not the URI's.
#[test]
fn a_guest_moves_by_tls_as_qemu_names_it() -> Result<()> {
    let folder = credentials()?;
    let plain = VmmOptions {
        extra: vec!["--verify-ram".into()],
        ..options(folder.path(), "client")
    };
    let mut source = Running::boot(&plain)?;
    let mut vmm = Vmm::spawn(&plain.incoming("defer"))?;
    for (qmp, endpoint) in [(&mut source.vmm.qmp, "client"), (&mut vmm.qmp, "server")] {
        let object = json!({
            "qom-type": "tls-creds-x509", "id": "objlibvirt_migrate_tls0",
            "dir": folder.path(), "endpoint": endpoint, "verify-peer": true,
        });
        qmp.execute("object-add", object)?;
        let named = json!({ "tls-creds": "objlibvirt_migrate_tls0", "tls-hostname": HOST });
        qmp.execute("migrate-set-parameters", named)?;
    }
    let uri = format!("unix:{}", vmm.dir().join("migration").display());
    vmm.qmp.execute("migrate-incoming", json!({ "uri": uri }))?;
    let answer = source.vmm.qmp.migrate(&uri, LIMIT)?;
    ensure!(answer["status"] == "completed", "{answer}");
    let guest = GuestView::open(vmm.pid())?;
    Running { vmm, guest }.runs()
}

#[test]
fn a_guest_stays_where_it_is_when_the_sides_do_not_trust_each_other() -> Result<()> {
    let (here, there) = (credentials()?, credentials()?);
    let mut source = Running::boot(&options(here.path(), "client"))?;
    let (mut destination, port) = wait_for(&options(there.path(), "server"), "tls")?;
    let uri = format!("tls:{HOST}:{port}");
    let answer = source.vmm.qmp.migrate(&uri, LIMIT)?;
    ensure!(answer["status"] == "failed", "{answer}");
    let error = answer["error-desc"].as_str().context("no error-desc")?;
    ensure!(error.starts_with(&format!("encrypting {uri}: ")), "{error}");
    ensure!(
        error.ends_with("is not of this side's CA (ca-cert.pem)"),
        "{error}"
    );
    let answer = destination.vmm.qmp.wait_migrated(LIMIT)?;
    let error = answer["error-desc"].as_str().context("no error-desc")?;
    ensure!(error.ends_with("it is not of its CA"), "{error}");
    ensure!(destination.vmm.qmp.status()? == "inmigrate");
    source.runs()
}

#[test]
fn tls_without_credentials() -> Result<()> {
    let folder = credentials()?;
    let mut source = Running::boot(&options(folder.path(), "client"))?;
    let qmp = &mut source.vmm.qmp;
    let to = json!({ "uri": format!("tcp:{HOST}:1") });
    for (id, expected) in [("tls1", "No TLS credentials with id 'tls1'"), ("tls0", "")] {
        qmp.execute("migrate-set-parameters", json!({ "tls-creds": id }))?;
        match expected {
            "" => drop(qmp.execute("migrate", to.clone())?),
            _ => ensure!(qmp.expect_error("migrate", to.clone())?.desc == expected),
        }
    }
    let answer = qmp.wait_migrated(LIMIT)?;
    let error = answer["error-desc"].as_str().context("no error-desc")?;
    ensure!(error.contains("Connection refused"), "{error}");
    qmp.execute("object-del", json!({ "id": "tls0" }))?;
    qmp.execute("migrate-set-parameters", json!({ "tls-creds": null }))?;
    let error = qmp.expect_error("migrate", json!({ "uri": format!("tls:{HOST}:1") }))?;
    ensure!(error.desc.starts_with("tls: needs credentials"), "{error}");
    source.runs()
}
