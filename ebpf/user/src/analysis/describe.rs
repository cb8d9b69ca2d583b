//! What reports call things.

use nix::errno::Errno;

use super::kvm;
use super::spans::{Args, Span};
use crate::recording::{Ioctl, Value};

/// Arguments that name or count what a span is about, in the order in which they are shown. The
/// others are in traces, where there is room.
const SHOWN: [&str; 14] = [
    "name", "phase", "state", "uri", "round", "pages", "bytes", "its", "n", "group", "attr",
    "devices", "events", "status",
];

/// A span with what tells it from others of its name: `vm_state_handler gic main`.
pub fn span(span: &Span) -> String {
    format!(
        "{}{}",
        span.name(),
        words(&span.begin, &["name", "phase", "round", "its"])
    )
}

/// What a span is called in every migration: its name with what tells it from others of that name,
/// but nothing that varies from one migration to the next. Empty if the name alone does.
pub fn label(span: &Span) -> String {
    let words = words(&span.begin, &["name", "phase", "its", "group", "attr"]);
    if words.is_empty() {
        return String::new();
    }
    format!("{}{words}", span.name())
}

/// A span's arguments from both ends, without its result.
pub fn detail(span: &Span) -> String {
    let mut text = words(&span.begin, &SHOWN);
    if let Some(end) = &span.end {
        text.push_str(&words(end, &SHOWN));
    }
    text.trim_start().to_owned()
}

/// An ioctl by its device attribute, where it has one that has a name, or by its own.
pub fn ioctl(ioctl: &Ioctl) -> String {
    let attr = ioctl
        .attr
        .and_then(|attr| kvm::attr_name(ioctl.fd_kind, attr));
    attr.map_or_else(|| kvm::ioctl_name(ioctl), str::to_owned)
}

/// The name of a negative errno, or `ok`.
pub fn errno(rc: i64) -> String {
    if rc >= 0 {
        return "ok".to_owned();
    }
    match rc
        .checked_neg()
        .and_then(|rc| i32::try_from(rc).ok())
        .map(Errno::from_raw)
    {
        Some(errno) if errno != Errno::UnknownErrno => format!("{errno:?}"),
        _ => rc.to_string(),
    }
}

fn words(args: &Args, shown: &[&str]) -> String {
    let mut text = String::new();
    for name in shown {
        let Some(value) = args.get(name) else {
            continue;
        };
        text.push(' ');
        match value {
            Value::Str(value) => text.push_str(&printable(value)),
            Value::U64(value) => text.push_str(&format!("{name}={value}")),
            Value::I64(value) => text.push_str(&format!("{name}={value}")),
            Value::Unreadable => text.push('?'),
        }
    }
    text
}

/// A string of a recording is another's: it must not steer the terminal.
pub fn printable(text: &str) -> String {
    text.chars()
        .map(|char| if char.is_control() { '\u{fffd}' } else { char })
        .collect()
}
