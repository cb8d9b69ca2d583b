//! Where the server listens: `unix:PATH[,server=on][,wait=off]`, as QEMU's `-qmp` takes it.

use std::path::PathBuf;
use std::str::FromStr;

/// The longest path that `sockaddr_un` holds, without its NUL.
const LONGEST_PATH: usize = 107;

/// A parsed `--qmp` argument.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Address {
    /// The socket's path.
    pub path: PathBuf,
}

/// What is wrong with a `--qmp` argument.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum AddressError {
    /// Not a unix socket.
    #[error("expected unix:PATH[,server=on][,wait=off]")]
    NotUnix,
    /// `unix:` and nothing behind it.
    #[error("the path after 'unix:' is empty")]
    NoPath,
    /// The kernel can't take it.
    #[error("the socket's path has {0} bytes, but at most {LONGEST_PATH} fit; use a shorter one")]
    LongPath(usize),
    /// An option that QEMU has, with a value that is not supported here.
    #[error("'{0}' is not supported: the server listens and never waits for a client")]
    Unsupported(String),
    /// No option of QEMU's.
    #[error("unknown option '{0}'; known are server=on and wait=off")]
    Unknown(String),
}

impl FromStr for Address {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        let rest = text.strip_prefix("unix:").ok_or(AddressError::NotUnix)?;
        // A comma in the path is doubled, as everywhere on QEMU's command line.
        let mut parts = rest.replace(",,", "\0");
        let options = match parts.find(',') {
            Some(at) => parts.split_off(at),
            None => String::new(),
        };
        let path = parts.replace('\0', ",");
        for option in options.split(',').skip(1) {
            match option {
                "server" | "server=on" | "wait=off" | "nowait" => {}
                "server=off" | "noserver" | "wait" | "wait=on" => {
                    return Err(AddressError::Unsupported(option.to_owned()));
                }
                _ => return Err(AddressError::Unknown(option.replace('\0', ",,"))),
            }
        }
        match path.len() {
            0 => Err(AddressError::NoPath),
            1..=LONGEST_PATH => Ok(Address { path: path.into() }),
            length => Err(AddressError::LongPath(length)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_as_qemu_reads_them() {
        use AddressError::{LongPath, NoPath, NotUnix, Unknown, Unsupported};
        let long = format!("unix:/{}", "x".repeat(LONGEST_PATH));
        let rows = [
            ("unix:/run/a.sock", Ok("/run/a.sock")),
            ("unix:a.sock,server=on,wait=off", Ok("a.sock")),
            ("unix:a.sock,server,nowait", Ok("a.sock")),
            ("unix:a,,b.sock,server=on", Ok("a,b.sock")),
            ("unix:", Err(NoPath)),
            ("unix:,server=on", Err(NoPath)),
            ("/run/a.sock", Err(NotUnix)),
            ("tcp:localhost:4444", Err(NotUnix)),
            ("unix:a,wait=on", Err(Unsupported("wait=on".to_owned()))),
            (
                "unix:a,server=off",
                Err(Unsupported("server=off".to_owned())),
            ),
            ("unix:a,sever=on", Err(Unknown("sever=on".to_owned()))),
            (&long, Err(LongPath(LONGEST_PATH + 1))),
        ];
        for (text, expected) in rows {
            let expected = expected.map(|path| Address { path: path.into() });
            assert_eq!(text.parse(), expected, "{text}");
        }
    }
}
