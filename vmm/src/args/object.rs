//! What `--object` takes: as QEMU's `-object`, of which there is one kind here.

use std::path::PathBuf;

use super::pairs::Pairs;
use crate::migration::credentials::{Endpoint, Options};

/// `tls-creds-x509,id=ID,dir=FOLDER[,endpoint=client|server][,verify-peer=on]`.
pub(crate) fn parse(text: &str) -> Result<Options, String> {
    let mut pairs = Pairs::parse(text);
    let kind = pairs.value("qom-type")?;
    if kind != Some("tls-creds-x509") && !(kind.is_none() && pairs.word("tls-creds-x509")?) {
        return Err("the one kind of object is tls-creds-x509".to_owned());
    }
    let id = pairs.required("id")?.to_owned();
    let dir = PathBuf::from(pairs.required("dir")?);
    let endpoint = match pairs.value("endpoint")? {
        None => Endpoint::Client,
        Some(name) => Endpoint::from_name(name)
            .ok_or("'endpoint' is client, for a source, or server, for a destination")?,
    };
    if !matches!(
        pairs.value("verify-peer")?,
        None | Some("on" | "yes" | "true")
    ) {
        return Err("'verify-peer' is on: both sides of a migration prove who they are".to_owned());
    }
    pairs.end()?;
    Ok(Options { id, dir, endpoint })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn credentials_are_read_as_qemu_reads_them() {
        let read = parse("tls-creds-x509,id=t,dir=/a b,endpoint=server,verify-peer=yes").unwrap();
        let expected = Options {
            id: "t".into(),
            dir: "/a b".into(),
            endpoint: Endpoint::Server,
        };
        assert_eq!(read, expected);
        let default = parse("qom-type=tls-creds-x509,id=t,dir=/a").unwrap();
        assert_eq!(default.endpoint, Endpoint::Client);
    }

    #[test]
    fn what_is_wrong_with_an_object_is_said() {
        for (text, expected) in [
            ("", "the one kind of object"),
            ("rng-random,id=a", "the one kind of object"),
            ("tls-creds-x509", "'id=' is missing"),
            ("tls-creds-x509,id=a", "'dir=' is missing"),
            (
                "tls-creds-x509,id=a,dir=b,endpoint=c",
                "'endpoint' is client",
            ),
            (
                "tls-creds-x509,id=a,dir=b,verify-peer=off",
                "'verify-peer' is on",
            ),
            (
                "tls-creds-x509,id=a,dir=b,priority=c",
                "unknown or repeated: 'priority'",
            ),
        ] {
            let error = parse(text).unwrap_err();
            assert!(error.contains(expected), "{text}: {error}");
        }
    }
}
