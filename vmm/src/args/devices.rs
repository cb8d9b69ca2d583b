//! What the options of devices look like.

use std::path::PathBuf;

use super::pairs::Pairs;
use crate::devices::virtio::{blk, console, net, vsock};

/// `path=FILE[,readonly][,id=TEXT]`.
pub(crate) fn disk(text: &str) -> Result<blk::Options, String> {
    const ID_MAX: usize = 20;
    let mut pairs = Pairs::parse(text);
    let path = PathBuf::from(pairs.required("path")?);
    let readonly = pairs.word("readonly")?;
    let id = match pairs.value("id")? {
        Some(id) if id.len() > ID_MAX || !id.is_ascii() => {
            return Err(format!("'id' has at most {ID_MAX} ASCII characters"));
        }
        Some(id) => id.to_owned(),
        None => blk::default_id(&path),
    };
    pairs.end()?;
    Ok(blk::Options { path, readonly, id })
}

/// `tap=NAME[,mac=ADDRESS]`.
pub(crate) fn net(text: &str) -> Result<net::Options, String> {
    let mut pairs = Pairs::parse(text);
    let tap = pairs.required("tap")?.to_owned();
    let mac = match pairs.value("mac")? {
        Some(mac) => mac.parse()?,
        None => net::Mac::of_tap(&tap),
    };
    pairs.end()?;
    Ok(net::Options { tap, mac })
}

/// `null`, `file:PATH` or `unix:PATH`.
pub(crate) fn console(text: &str) -> Result<console::Options, String> {
    match text.split_once(':') {
        Some((_, "")) => Err("there is no path after the colon".to_owned()),
        Some(("file", path)) => Ok(console::Options::File(path.into())),
        Some(("unix", path)) => Ok(console::Options::Unix(path.into())),
        None if text == "null" => Ok(console::Options::Null),
        _ => Err("expected null, file:PATH or unix:PATH".to_owned()),
    }
}

/// `cid=N,path=SOCKET`.
pub(crate) fn vsock(text: &str) -> Result<vsock::Options, String> {
    /// Below it are addresses with a meaning, 2 being the host's; the last one is any.
    const FIRST: u32 = 3;
    let mut pairs = Pairs::parse(text);
    let cid = match pairs.required("cid")?.parse() {
        Ok(cid) if (FIRST..u32::MAX).contains(&cid) => cid,
        _ => {
            return Err(format!(
                "'cid' is a number from {FIRST} to {}",
                u32::MAX - 1
            ));
        }
    };
    let path = PathBuf::from(pairs.required("path")?);
    pairs.end()?;
    Ok(vsock::Options { cid, path })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_is_read() {
        let disk = disk("path=/a/root.img,id=x,readonly").unwrap();
        assert_eq!((disk.path, disk.readonly), ("/a/root.img".into(), true));
        assert_eq!(disk.id, "x");
        assert_eq!(super::disk("path=/a/root.img").unwrap().id, "root.img");
    }

    #[test]
    fn a_network_card_is_read() {
        let card = net("mac=52:54:00:12:34:56,tap=tap0").unwrap();
        assert_eq!(
            (card.tap.as_str(), card.mac.to_string().as_str()),
            ("tap0", "52:54:00:12:34:56")
        );
        assert_eq!(net("tap=a").unwrap(), net("tap=a").unwrap());
        assert_ne!(net("tap=a").unwrap().mac, net("tap=b").unwrap().mac);
        for mac in [
            "",
            "52:54:00:12:34",
            "01:00:00:00:00:00",
            "00:00:00:00:00:00",
            "5:54:00:12:34:567",
        ] {
            assert!(net(&format!("tap=a,mac={mac}")).is_err(), "{mac}");
        }
    }

    #[test]
    fn a_console_is_read() {
        assert_eq!(
            console("unix:/a:b"),
            Ok(console::Options::Unix("/a:b".into()))
        );
        for text in ["", "file:", "tty", "pty:x"] {
            assert!(console(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_vsock_is_read() {
        let sockets = vsock("cid=3,path=/a/v").unwrap();
        assert_eq!((sockets.cid, sockets.path), (3, "/a/v".into()));
        for text in [
            "",
            "cid=3",
            "path=x",
            "cid=2,path=x",
            "cid=4294967295,path=x",
            "cid=x,path=x",
        ] {
            assert!(vsock(text).is_err(), "{text}");
        }
    }

    #[test]
    fn what_is_wrong_with_a_disk_is_said() {
        for (text, expected) in [
            ("", "'path=' is missing"),
            ("/a/root.img", "'path=' is missing"),
            ("path=", "'path' needs a value"),
            ("path=x,readonly=on", "'readonly' takes no value"),
            ("path=x,cache=none", "unknown or repeated: 'cache'"),
            ("path=x,path=y", "unknown or repeated: 'path'"),
            ("path=x,id=123456789012345678901", "at most 20"),
        ] {
            let error = disk(text).unwrap_err();
            assert!(error.contains(expected), "{text}: {error}");
        }
    }
}
