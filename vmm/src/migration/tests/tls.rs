//! Encrypted migrations: who may, and what everybody else is told.

#[path = "../../../../tests/src/certificates.rs"]
#[allow(unreachable_pub, reason = "it is a module of the harness as well")]
mod certificates;

use std::path::{Path, PathBuf};

use super::super::credentials::{Endpoint, Keyring, Options};
use super::super::settings::Mode;
use super::*;
use certificates::{Authority, Purpose, Validity};

const HOST: &str = "there.example";

/// The folders of a source and a destination, filled by `fill`, and a bench that uses them.
fn bench(name: &str, fill: impl FnOnce(&Path, &Path)) -> Bench {
    let mut bench = Bench::new();
    let [here, there] = ["here", "there"].map(|side| {
        let dir = bench.folder.path().join(format!("{side}-pki"));
        std::fs::create_dir(&dir).unwrap();
        dir
    });
    fill(&here, &there);
    let ring = Keyring::default();
    let security = |id: &str, dir: PathBuf, endpoint, name| {
        let id = id.to_owned();
        ring.add(Options { id, dir, endpoint }).unwrap();
        let found = ring.find("", endpoint).unwrap();
        Some(Security::new(found, name).unwrap())
    };
    bench.source_security = security("a", here, Endpoint::Client, Some(name));
    bench.target_security = security("b", there, Endpoint::Server, None);
    bench
}

/// Both sides are of one CA.
fn good(here: &Path, there: &Path) {
    let ca = Authority::new();
    for dir in [here, there] {
        ca.trust(dir);
    }
    ca.issue(here, Purpose::Client, &[], Validity::Now);
    ca.issue(there, Purpose::Server, &[HOST], Validity::Now);
}

fn refused(bench: &Bench, here: &str, there: &str) {
    let (source, target) = (Fake::source(), Fake::target());
    let outcome = bench.migrate(&source, &target, Parameters::default(), |uri| uri);
    check(&source, &target, &outcome);
    assert_eq!(outcome.source.status, Some(MigrationStatus::Failed));
    assert_eq!(target.run_state(), RunState::Inmigrate);
    for (answer, expected) in [(outcome.source, here), (outcome.target, there)] {
        let error = answer.error_desc.unwrap();
        assert!(error.ends_with(expected), "'{error}' is not '{expected}'");
    }
}

#[test]
fn a_guest_moves_between_sides_that_trust_each_other() {
    let bench = bench(HOST, good);
    let (source, target) = (Fake::source(), Fake::target());
    let parameters = Parameters {
        verify_ram: true,
        ..Parameters::default()
    };
    let outcome = bench.migrate(&source, &target, parameters, |uri| uri);
    check(&source, &target, &outcome);
    assert_eq!(outcome.source.status, Some(MigrationStatus::Completed));
}

#[test]
fn a_certificate_of_another_ca() {
    let strange_server = bench(HOST, |here, there| {
        good(here, there);
        Authority::new().issue(there, Purpose::Server, &[HOST], Validity::Now);
    });
    refused(
        &strange_server,
        "the other side's certificate is not of this side's CA (ca-cert.pem)",
        "the other side refuses this side's certificate: it is not of its CA",
    );
    let strange_client = bench(HOST, |here, there| {
        good(here, there);
        Authority::new().issue(here, Purpose::Client, &[], Validity::Now);
    });
    refused(
        &strange_client,
        "the other side refuses this side's certificate: it is not of its CA",
        "the other side's certificate is not of this side's CA (ca-cert.pem)",
    );
}

#[test]
fn a_source_without_a_certificate() {
    let bench = bench(HOST, |here, there| {
        good(here, there);
        for file in ["client-cert.pem", "client-key.pem"] {
            std::fs::remove_file(here.join(file)).unwrap();
        }
    });
    refused(
        &bench,
        "the other side asks for a certificate, and this side has none: it needs client-cert.pem \
         and client-key.pem",
        "the other side shows no certificate: it needs client-cert.pem",
    );
}

#[test]
fn a_certificate_that_has_expired() {
    let server = bench(HOST, |here, there| {
        let ca = Authority::new();
        ca.trust(here);
        ca.trust(there);
        ca.issue(here, Purpose::Client, &[], Validity::Now);
        ca.issue(there, Purpose::Server, &[HOST], Validity::Over);
    });
    refused(
        &server,
        "the other side's certificate has expired",
        "the other side refuses this side's certificate: it has expired, or is not valid yet",
    );
}

#[test]
fn a_certificate_for_another_name_or_use() {
    refused(
        &bench("elsewhere.example", good),
        "the other side's certificate is not for 'elsewhere.example': set the parameter \
         tls-hostname if it is right under another name",
        "the other side refuses this side's certificate: it is for another name or use",
    );
    let wrong_use = bench(HOST, |here, there| {
        good(here, there);
        for (from, to) in [("server", "client")] {
            for what in ["cert", "key"] {
                let from = there.join(format!("{from}-{what}.pem"));
                std::fs::copy(from, here.join(format!("{to}-{what}.pem"))).unwrap();
            }
        }
    });
    refused(
        &wrong_use,
        "the other side refuses this side's certificate: it is for another name or use",
        "the other side's certificate is not for this use: a source needs one for clients, a \
         destination one for servers",
    );
}

#[test]
fn one_side_encrypts_and_the_other_does_not() {
    let mut plain_source = bench(HOST, good);
    plain_source.source_security = None;
    let there = "the other side does not speak TLS";
    let (source, target) = (Fake::source(), Fake::target());
    let outcome = plain_source.migrate(&source, &target, Parameters::default(), |uri| uri);
    check(&source, &target, &outcome);
    let error = outcome.source.error_desc.unwrap();
    assert!(
        error.ends_with("the peer speaks TLS: both sides need tls-creds"),
        "{error}"
    );
    assert!(outcome.target.error_desc.unwrap().ends_with(there));

    let mut plain_target = bench(HOST, good);
    plain_target.target_security = None;
    refused(
        &plain_target,
        "the other side does not speak TLS",
        "the peer speaks TLS: both sides need tls-creds",
    );
}

#[test]
fn what_can_not_be_encrypted_is_refused() {
    let bench = bench(HOST, good);
    let (source, target) = (Fake::source(), Fake::target());
    bench.source.settings().set_mode(Mode::CprTransfer);
    let outcome = bench.migrate(&source, &target, Parameters::default(), |uri| uri);
    check(&source, &target, &outcome);
    let error = outcome.source.error_desc.unwrap();
    assert!(error.contains("and no tls-creds"), "{error}");
}

#[test]
fn credentials_that_are_none() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path();
    let ring = Keyring::default();
    let add = |endpoint| {
        let (id, dir) = ("a".to_owned(), dir.to_owned());
        ring.add(Options { id, dir, endpoint })
    };
    let error = |endpoint| {
        let error = add(endpoint).unwrap_err();
        super::super::status::describe(&error).replace(dir.to_str().unwrap(), "DIR")
    };
    let absent = "Unable to access credentials DIR/ca-cert.pem: No such file or directory";
    assert!(error(Endpoint::Client).starts_with(absent));
    std::fs::write(dir.join("ca-cert.pem"), "nothing").unwrap();
    assert_eq!(
        error(Endpoint::Client),
        "DIR/ca-cert.pem has no certificate"
    );
    let ca = Authority::new();
    ca.trust(dir);
    let absent = "Unable to access credentials DIR/server-cert.pem: No such file or directory";
    assert!(error(Endpoint::Server).starts_with(absent));
    ca.issue(dir, Purpose::Server, &[HOST], Validity::Now);
    std::fs::write(dir.join("server-key.pem"), "nothing").unwrap();
    assert_eq!(
        error(Endpoint::Server),
        "DIR/server-key.pem has no private key"
    );

    add(Endpoint::Client).unwrap();
    assert!(error(Endpoint::Client).contains("duplicate property 'a'"));
    for (id, endpoint, expected) in [
        ("b", Endpoint::Client, "No TLS credentials with id 'b'"),
        (
            "a",
            Endpoint::Server,
            "Expected TLS credentials for a server endpoint",
        ),
        ("", Endpoint::Server, "there is no one object"),
    ] {
        let error = ring.find(id, endpoint).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
    ring.remove("a").unwrap();
    assert_eq!(
        ring.remove("a").unwrap_err().to_string(),
        "object 'a' not found"
    );
}
