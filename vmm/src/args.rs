//! The command line: for `main.rs`, and for its manual page.

mod devices;
mod object;
mod pairs;

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use blackout_abi::guest::{CMDLINE_MAX, MAX_VCPUS};
use clap::Parser;
use clap::error::ErrorKind;

use crate::arch::{self, GuestClock};
use crate::devices::virtio::{blk, console, net, vsock};
use crate::migration::{credentials, uri};
use crate::payload::{Linux, Program};
use crate::qmp::Address;

/// A KVM virtual machine monitor whose live migration can be seen through
#[derive(Debug, Parser)]
#[command(name = "blackout-vmm", version, after_help = EXIT_STATUS)]
pub struct Args {
    /// Bare-metal program to boot: ELF or flat binary
    #[arg(
        long,
        value_name = "FILE",
        required_unless_present_any = ["kernel", "incoming", "check"],
        help_heading = "Guest"
    )]
    pub payload: Option<PathBuf>,

    /// Linux kernel to boot: arm64 Image, also in gzip or EFI zboot; x86-64 bzImage or vmlinux
    #[arg(
        long,
        value_name = "FILE",
        conflicts_with = "payload",
        help_heading = "Guest"
    )]
    pub kernel: Option<PathBuf>,

    /// Linux's initial RAM disk
    #[arg(long, value_name = "FILE", requires = "kernel", help_heading = "Guest")]
    pub initrd: Option<PathBuf>,

    /// Command line for the guest
    #[arg(long, value_name = "TEXT", default_value = "", value_parser = cmdline, help_heading = "Guest")]
    pub cmdline: String,

    /// End when the guest resets instead of booting it again
    #[arg(long, help_heading = "Guest")]
    pub no_reboot: bool,

    /// Guest RAM, as 128M or 4G
    #[arg(
        long,
        value_name = "SIZE",
        default_value = "128M",
        help_heading = "Machine"
    )]
    pub memory: Size,

    /// vCPUs
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=MAX_VCPUS as i64), help_heading = "Machine")]
    pub cpus: u32,

    /// Entries of each vCPU's dirty ring, 1024 to 65536 and a power of 2: a large guest's last look at what
    /// it wrote then takes as long as it writes, and not as long as it is large [default: no rings]
    #[arg(long, value_name = "N", value_parser = ring_size, help_heading = "Machine")]
    pub dirty_ring_size: Option<u32>,

    /// Name of the VM, for query-name
    #[arg(long, value_name = "NAME", help_heading = "Machine")]
    pub name: Option<String>,

    /// Serial console: stdio, null, file:PATH, or unix:PATH to listen for one client at a time
    #[arg(
        long,
        value_name = "WHERE",
        default_value = "stdio",
        help_heading = "Machine"
    )]
    pub serial: Console,

    /// A disk, a raw image or block device: `path=FILE[,readonly][,id=TEXT]`; once for each
    #[arg(long = "disk", value_name = "OPTIONS", value_parser = devices::disk, help_heading = "Devices")]
    pub disks: Vec<blk::Options>,

    /// A network card on a tap interface: `tap=NAME[,mac=ADDRESS]`; once for each
    #[arg(long = "net", value_name = "OPTIONS", value_parser = devices::net, help_heading = "Devices")]
    pub nets: Vec<net::Options>,

    /// A console that is faster than the serial one: null, file:PATH, or unix:PATH to listen for one
    /// client at a time; once for each
    #[arg(long = "console", value_name = "WHERE", value_parser = devices::console, help_heading = "Devices")]
    pub consoles: Vec<console::Options>,

    /// Sockets between guest and host: `cid=N,path=SOCKET`; a program of the host connects to SOCKET
    /// and writes `CONNECT PORT`, one of the guest reaches SOCKET_PORT
    #[arg(long, value_name = "OPTIONS", value_parser = devices::vsock, help_heading = "Devices")]
    pub vsock: Option<vsock::Options>,

    /// A source of randomness for the guest: the host's
    #[arg(long, help_heading = "Devices")]
    pub rng: bool,

    /// Control socket: `unix:PATH[,server=on][,wait=off]`
    #[arg(long, value_name = "ADDRESS", help_heading = "Control")]
    pub qmp: Option<Address>,

    /// Wait for QMP's `cont` before the guest runs
    #[arg(short = 'S', long, help_heading = "Control")]
    pub paused: bool,

    /// Keys and certificates to encrypt migrations with:
    /// `tls-creds-x509,id=ID,dir=FOLDER,endpoint=client|server`. FOLDER has ca-cert.pem, and for a
    /// server, which is a destination, server-cert.pem and server-key.pem, for a client client-cert.pem
    /// and client-key.pem; once for each
    #[arg(long = "object", value_name = "OPTIONS", value_parser = object::parse, help_heading = "Migration")]
    pub objects: Vec<credentials::Options>,

    /// Be a migration's destination: tcp:HOST:PORT, tls:HOST:PORT, unix:PATH, fd:N, exec:COMMAND,
    /// file:PATH[,offset=N], or defer until `migrate-incoming`
    #[arg(long, value_name = "URI", value_parser = incoming, help_heading = "Migration")]
    pub incoming: Option<String>,

    /// Let guests go over tcp: to and from other hosts, where everybody on the way can read and change
    /// them
    #[arg(long, help_heading = "Migration")]
    pub allow_plaintext: bool,

    /// What the clock of a guest that comes from another host has done on its way: advance or freeze.
    /// By default x86-64 guests, which can be told that they were stopped, find that time has
    /// passed, and arm64 guests do not
    #[arg(long, value_name = "WHAT", default_value_t, help_heading = "Migration")]
    pub guest_clock: Clock,

    /// Test mode: at the switchover, compare a checksum of all RAM on both sides
    #[arg(long, help_heading = "Migration")]
    pub verify_ram: bool,

    /// Say what this host's KVM can and cannot do, and end: 0 when guests run here, 1 when not
    #[arg(long, help_heading = "Diagnostics")]
    pub check: bool,

    /// Write a Chrome trace of the monitor's own spans, for Perfetto
    #[arg(long, value_name = "FILE", help_heading = "Diagnostics")]
    pub trace_chrome: Option<PathBuf>,

    /// What to log to stderr, as debug or vmm=trace [default: RUST_LOG, or warn]
    #[arg(long, value_name = "FILTER", help_heading = "Diagnostics")]
    pub log: Option<String>,
}

impl Args {
    /// What to boot, if anything.
    pub fn program(&self) -> Option<Program> {
        let payload = self.payload.clone().map(Program::Payload);
        let linux = |kernel| {
            let initrd = self.initrd.clone();
            Program::Linux(Linux { kernel, initrd })
        };
        payload.or_else(|| self.kernel.clone().map(linux))
    }
}

const EXIT_STATUS: &str = "A migration's destination needs neither --payload nor --kernel; given \
one, it boots it when the guest resets, and ends then otherwise.

Exit status: 0 when the guest shut down, reset and was not to boot again, or the monitor was told to \
quit by QMP or a signal; 1 when something failed; 2 when the command line is wrong. QMP's SHUTDOWN \
event says which it was.";

/// Parses the command line, or ends the process: with help on stdout, or with one line that says
/// what is wrong and status 2.
pub fn parse() -> Args {
    Args::try_parse().unwrap_or_else(|error| {
        if matches!(
            error.kind(),
            ErrorKind::DisplayHelp | ErrorKind::DisplayVersion
        ) {
            error.exit();
        }
        eprintln!("{}; see --help", one_line(&error));
        std::process::exit(2);
    })
}

/// clap's first paragraph, which has the message; usage and hints follow it.
fn one_line(error: &clap::Error) -> String {
    let text = error.to_string();
    let paragraph = text.split("\n\n").next().unwrap_or_default();
    let words: Vec<_> = paragraph.split_whitespace().collect();
    words.join(" ")
}

fn incoming(text: &str) -> Result<String, uri::Error> {
    uri::Incoming::parse(text).map(|_| text.to_owned())
}

fn ring_size(text: &str) -> Result<u32, String> {
    let size = text
        .parse()
        .ok()
        .filter(|size: &u32| size.is_power_of_two());
    size.filter(|size| (1 << 10..=1 << 16).contains(size))
        .ok_or_else(|| {
            format!("a dirty ring can't have {text} entries, but 1024, 2048, and so on to 65536")
        })
}

fn cmdline(text: &str) -> Result<String, String> {
    if text.len() > CMDLINE_MAX {
        let length = text.len();
        return Err(format!(
            "{length} bytes, but the guest has room for {CMDLINE_MAX}"
        ));
    }
    Ok(text.to_owned())
}

/// A number of bytes, written with its unit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size(
    /// Bytes.
    pub u64,
);

impl FromStr for Size {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let digits = text.trim_end_matches(|c: char| !c.is_ascii_digit());
        let unit = text.get(digits.len()..).unwrap_or_default();
        let shift = match unit {
            "K" => 10,
            "M" => 20,
            "G" => 30,
            "T" => 40,
            "" => return Err("it has no unit; write K, M, G or T after the number".to_owned()),
            _ => return Err(format!("unknown unit '{unit}'; known are K, M, G and T")),
        };
        let number: u64 = digits
            .parse()
            .map_err(|_| "expected a number and a unit, as 128M".to_owned())?;
        match number.checked_mul(1 << shift) {
            Some(0) => Err("a guest needs some memory".to_owned()),
            Some(bytes) => Ok(Size(bytes)),
            None => Err("more than 64 bits can count".to_owned()),
        }
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}K", self.0 >> 10)
    }
}

/// What a guest's clock does during a migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Clock(
    /// The same, as the machine takes it.
    pub GuestClock,
);

impl Default for Clock {
    fn default() -> Self {
        Clock(arch::GUEST_CLOCK)
    }
}

impl FromStr for Clock {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "advance" => Ok(Clock(GuestClock::Advance)),
            "freeze" => Ok(Clock(GuestClock::Freeze)),
            _ => Err("expected advance or freeze".to_owned()),
        }
    }
}

impl fmt::Display for Clock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.0 {
            GuestClock::Advance => "advance",
            GuestClock::Freeze => "freeze",
        })
    }
}

/// Where the serial console goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Console {
    /// stdin and stdout.
    Stdio,
    /// Nowhere.
    Null,
    /// Output to a file, which is created or emptied.
    File(PathBuf),
    /// A unix socket that listens.
    Unix(PathBuf),
}

impl FromStr for Console {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (kind, path) = match text.split_once(':') {
            Some((_, "")) => return Err("there is no path after the colon".to_owned()),
            Some((kind, path)) => (kind, Some(PathBuf::from(path))),
            None => (text, None),
        };
        match (kind, path) {
            ("stdio", None) => Ok(Console::Stdio),
            ("null", None) => Ok(Console::Null),
            ("file", Some(path)) => Ok(Console::File(path)),
            ("unix", Some(path)) => Ok(Console::Unix(path)),
            _ => Err("expected stdio, null, file:PATH or unix:PATH".to_owned()),
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_definition_is_sound() {
        Args::command().debug_assert();
    }

    #[test]
    fn what_is_wrong_is_said_in_one_line() {
        let rows = [
            ("", "required arguments were not provided: --payload <FILE>"),
            (
                "--initrd x",
                "required arguments were not provided: --kernel <FILE>",
            ),
            (
                "--payload x --kernel y",
                "cannot be used with '--kernel <FILE>'",
            ),
            (
                "--payload x --memory 128",
                "'128' for '--memory <SIZE>': it has no unit",
            ),
            ("--payload x --memory 128Q", "unknown unit 'Q'"),
            ("--payload x --memory M", "expected a number and a unit"),
            ("--payload x --memory -1M", "unexpected argument"),
            ("--payload x --memory 0G", "a guest needs some memory"),
            (
                "--payload x --memory 99999999T",
                "more than 64 bits can count",
            ),
            ("--payload x --cpus 0", "0 is not in 1..=32"),
            ("--payload x --cpus 33", "33 is not in 1..=32"),
            (
                "--payload x --serial file:",
                "there is no path after the colon",
            ),
            (
                "--payload x --serial tty",
                "expected stdio, null, file:PATH or unix:PATH",
            ),
            ("--payload x --qmp tcp:1", "expected unix:PATH"),
            ("--incoming nowhere", "unknown transport"),
            ("--payload x --guest-clock on", "expected advance or freeze"),
            ("--payload x --nope", "unexpected argument '--nope' found"),
        ];
        for (arguments, expected) in rows {
            let arguments = arguments.split_whitespace();
            let error = Args::try_parse_from(["vmm"].into_iter().chain(arguments)).unwrap_err();
            let line = one_line(&error);
            assert!(line.contains(expected), "{line}");
            assert!(
                line.starts_with("error: ") && !line.contains('\n'),
                "{line}"
            );
        }
    }

    #[test]
    fn sizes_and_consoles_are_read() {
        for (text, bytes) in [("4K", 4 << 10), ("128M", 128 << 20), ("3T", 3 << 40)] {
            assert_eq!(text.parse(), Ok(Size(bytes)));
        }
        assert_eq!("unix:/a:b".parse(), Ok(Console::Unix("/a:b".into())));
        assert_eq!("null".parse(), Ok(Console::Null));
    }
}
