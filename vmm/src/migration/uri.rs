//! Where a migration goes to or comes from: the URIs of `migrate` and `migrate-incoming`.

use std::fmt;
use std::path::PathBuf;

use crate::probes::Errno;

/// The longest path that a unix socket's address can hold on Linux, without its NUL.
const UNIX_PATH_MAX: usize = 107;

/// Where a guest can go to or come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Uri {
    /// `tcp:HOST:PORT`, an IPv6 address in brackets. With no host it means every local address,
    /// which only a listener can use.
    Tcp {
        /// A name or an address.
        host: String,
        /// The port; a listener on port 0 gets one from the kernel.
        port: u16,
        /// `tls:HOST:PORT`: it is refused unless there are credentials. With them `tcp:` is encrypted
        /// as well, as in QEMU.
        tls: bool,
    },
    /// `unix:PATH`.
    Unix(PathBuf),
    /// `fd:NAME`, a descriptor that a client has passed, or for a destination the number of one that
    /// the process was started with. A socket is a connection; a pipe or a file goes one way.
    Fd(String),
    /// `exec:COMMAND`, run by the shell: the guest goes to its input or comes from its output.
    Exec(String),
    /// `file:PATH[,offset=N]`.
    File {
        /// The file.
        path: PathBuf,
        /// Where the guest starts in it, bytes.
        offset: u64,
    },
}

/// What `migrate-incoming` and `--incoming` take: an address, or the wish to be told later.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Incoming {
    /// `defer`: wait for `migrate-incoming`.
    Defer,
    /// Listen there.
    Listen(Uri),
}

/// A URI that names no transport this monitor has.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "migration URI '{uri}': {problem}; use tcp:HOST:PORT, tls:HOST:PORT, unix:PATH, fd:NAME, \
     exec:COMMAND or file:PATH[,offset=N]{}", if *incoming { ", or defer" } else { "" }
)]
pub struct Error {
    uri: String,
    problem: Problem,
    incoming: bool,
}

impl Errno for Error {
    fn errno(&self) -> i32 {
        libc::EINVAL
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
enum Problem {
    #[error("unknown transport")]
    Transport,
    #[error("there is no host")]
    NoHost,
    #[error("there is no port")]
    NoPort,
    #[error("the port is not a number from 0 to 65535")]
    Port,
    #[error("port 0 can't be connected to")]
    PortZero,
    #[error("the IPv6 address has no closing bracket")]
    Bracket,
    #[error("an IPv6 address must stand in brackets")]
    BareIpv6,
    #[error("there is no path")]
    NoPath,
    #[error("the path is longer than {UNIX_PATH_MAX} bytes")]
    LongPath,
    #[error("there is no name of a descriptor")]
    NoName,
    #[error("there is no command")]
    NoCommand,
    #[error("the offset is not a number of bytes, with or without K, M, G or T")]
    Offset,
    #[error("'defer' is for a destination")]
    Defer,
}

impl Uri {
    /// Parses the URI of an outgoing migration.
    ///
    /// # Errors
    /// Says what is wrong with it and which forms there are.
    pub fn outgoing(text: &str) -> Result<Uri, Error> {
        let uri = match text {
            "defer" => Err(Problem::Defer),
            _ => parse(text),
        };
        let checked = uri.and_then(|uri| match &uri {
            Uri::Tcp { host, .. } if host.is_empty() => Err(Problem::NoHost),
            Uri::Tcp { port: 0, .. } => Err(Problem::PortZero),
            _ => Ok(uri),
        });
        checked.map_err(|problem| Error {
            uri: text.to_owned(),
            problem,
            incoming: false,
        })
    }
}

impl Incoming {
    /// Parses the URI of an incoming migration.
    ///
    /// # Errors
    /// Says what is wrong with it and which forms there are.
    pub fn parse(text: &str) -> Result<Incoming, Error> {
        if text == "defer" {
            return Ok(Incoming::Defer);
        }
        let uri = parse(text).map(Incoming::Listen);
        uri.map_err(|problem| Error {
            uri: text.to_owned(),
            problem,
            incoming: true,
        })
    }
}

impl fmt::Display for Uri {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Uri::Tcp { host, port, tls } => {
                let scheme = if *tls { "tls" } else { "tcp" };
                match host.contains(':') {
                    true => write!(f, "{scheme}:[{host}]:{port}"),
                    false => write!(f, "{scheme}:{host}:{port}"),
                }
            }
            Uri::Unix(path) => write!(f, "unix:{}", path.display()),
            Uri::Fd(name) => write!(f, "fd:{name}"),
            Uri::Exec(command) => write!(f, "exec:{command}"),
            Uri::File { path, offset: 0 } => write!(f, "file:{}", path.display()),
            Uri::File { path, offset } => write!(f, "file:{},offset={offset}", path.display()),
        }
    }
}

fn parse(text: &str) -> Result<Uri, Problem> {
    match text.split_once(':') {
        Some(("tcp", address)) => tcp(address, false),
        Some(("tls", address)) => tcp(address, true),
        Some(("unix", "")) => Err(Problem::NoPath),
        Some(("unix", path)) if path.len() > UNIX_PATH_MAX => Err(Problem::LongPath),
        Some(("unix", path)) => Ok(Uri::Unix(path.into())),
        Some(("fd", "")) => Err(Problem::NoName),
        Some(("fd", name)) => Ok(Uri::Fd(name.to_owned())),
        Some(("exec", command)) if command.trim().is_empty() => Err(Problem::NoCommand),
        Some(("exec", command)) => Ok(Uri::Exec(command.to_owned())),
        Some(("file", file)) => self::file(file),
        _ => Err(Problem::Transport),
    }
}

fn file(text: &str) -> Result<Uri, Problem> {
    let (path, offset) = match text.split_once(",offset=") {
        Some((path, offset)) => (path, bytes(offset).ok_or(Problem::Offset)?),
        None => (text, 0),
    };
    match path {
        "" => Err(Problem::NoPath),
        path => Ok(Uri::File {
            path: path.into(),
            offset,
        }),
    }
}

/// A number of bytes as QEMU writes it.
fn bytes(text: &str) -> Option<u64> {
    let (digits, shift) = match text.split_at_checked(text.len().saturating_sub(1))? {
        (digits, "k" | "K") => (digits, 10),
        (digits, "M") => (digits, 20),
        (digits, "G") => (digits, 30),
        (digits, "T") => (digits, 40),
        _ => (text, 0),
    };
    digits.parse::<u64>().ok()?.checked_mul(1 << shift)
}

fn tcp(address: &str, tls: bool) -> Result<Uri, Problem> {
    let (host, port) = match address.strip_prefix('[') {
        Some(rest) => {
            let (host, rest) = rest.split_once(']').ok_or(Problem::Bracket)?;
            (host, rest.strip_prefix(':').ok_or(Problem::NoPort)?)
        }
        None => {
            let (host, port) = address.rsplit_once(':').ok_or(Problem::NoPort)?;
            if host.contains(':') {
                return Err(Problem::BareIpv6);
            }
            (host, port)
        }
    };
    if port.is_empty() {
        return Err(Problem::NoPort);
    }
    let port = port.parse().map_err(|_| Problem::Port)?;
    Ok(Uri::Tcp {
        host: host.to_owned(),
        port,
        tls,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const FORMS: &str = "tcp:HOST:PORT, tls:HOST:PORT, unix:PATH, fd:NAME, exec:COMMAND or \
                         file:PATH[,offset=N]";

    fn tcp(host: &str, port: u16) -> Uri {
        Uri::Tcp {
            host: host.into(),
            port,
            tls: false,
        }
    }

    #[test]
    fn accepted_forms() {
        assert_eq!(
            Uri::outgoing("tcp:127.0.0.1:4444"),
            Ok(tcp("127.0.0.1", 4444))
        );
        assert_eq!(
            Uri::outgoing("tcp:host.example:1"),
            Ok(tcp("host.example", 1))
        );
        assert_eq!(Uri::outgoing("tcp:[::1]:4444"), Ok(tcp("::1", 4444)));
        assert_eq!(
            Uri::outgoing("unix:/run/a:b"),
            Ok(Uri::Unix("/run/a:b".into()))
        );
        assert_eq!(Uri::outgoing("fd:a"), Ok(Uri::Fd("a".into())));
        let exec = "exec:gzip -c > /a,b:c";
        assert_eq!(Uri::outgoing(exec), Ok(Uri::Exec(exec[5..].into())));
        for (text, offset) in [
            ("", 0),
            (",offset=7", 7),
            (",offset=2k", 2048),
            (",offset=1G", 1 << 30),
        ] {
            let path = "/a,b".into();
            let file = Ok(Uri::File { path, offset });
            assert_eq!(Uri::outgoing(&format!("file:/a,b{text}")), file);
        }
        assert_eq!(Incoming::parse("defer"), Ok(Incoming::Defer));
        assert_eq!(Incoming::parse("tcp::0"), Ok(Incoming::Listen(tcp("", 0))));
    }

    #[test]
    fn what_is_parsed_prints_as_it_was() {
        for text in [
            "tcp:127.0.0.1:4444",
            "tcp:[::1]:4444",
            "tcp:h:1",
            "tls:h:1",
            "tls:[::1]:4444",
            "unix:/run/a",
            "fd:a",
            "exec:cat > a",
            "file:/a",
            "file:/a,offset=512",
        ] {
            assert_eq!(Uri::outgoing(text).unwrap().to_string(), text);
        }
    }

    #[test]
    fn an_error_names_the_uri_the_problem_and_the_forms() {
        let cases = [
            ("", "unknown transport"),
            ("tcp", "unknown transport"),
            ("rdma:host:1", "unknown transport"),
            ("tcp:host", "there is no port"),
            ("tcp:host:", "there is no port"),
            ("tcp:[::1]", "there is no port"),
            ("tcp:[::1:1", "the IPv6 address has no closing bracket"),
            ("tcp:::1:1", "an IPv6 address must stand in brackets"),
            ("tcp:host:65536", "the port is not a number from 0 to 65535"),
            ("tcp:host:http", "the port is not a number from 0 to 65535"),
            ("tcp:host:0", "port 0 can't be connected to"),
            ("tcp::4444", "there is no host"),
            ("tls:host:0", "port 0 can't be connected to"),
            ("unix:", "there is no path"),
            ("fd:", "there is no name of a descriptor"),
            ("exec: ", "there is no command"),
            ("file:", "there is no path"),
            ("file:,offset=1", "there is no path"),
            (
                "file:a,offset=",
                "the offset is not a number of bytes, with or without K, M, G or T",
            ),
            (
                "file:a,offset=1x",
                "the offset is not a number of bytes, with or without K, M, G or T",
            ),
            (
                "file:a,offset=99999999T",
                "the offset is not a number of bytes, with or without K, M, G or T",
            ),
            ("defer", "'defer' is for a destination"),
        ];
        for (uri, problem) in cases {
            assert_eq!(
                Uri::outgoing(uri).unwrap_err().to_string(),
                format!("migration URI '{uri}': {problem}; use {FORMS}")
            );
        }
        let long = format!("unix:{}", "x".repeat(108));
        assert!(Uri::outgoing(&long).is_err());
        let error = Incoming::parse("rdma:host:1").unwrap_err().to_string();
        assert!(error.ends_with("[,offset=N], or defer"), "{error}");
    }
}
