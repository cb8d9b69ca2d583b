//! One row a span, ioctl, gap and loss of events, for spreadsheets and data frames. Times are ns since the
//! migration's start; `inside_ns` is what of it lies in the downtime.

use std::io::{self, Write};

use serde::Serialize;

use crate::report::schema::{Migration, Report};

#[derive(Serialize)]
struct Row<'a> {
    migration: Option<u64>,
    kind: &'static str,
    side: String,
    name: &'a str,
    label: &'a str,
    detail: String,
    start_ns: i64,
    duration_ns: u64,
    inside_ns: u64,
    depth: Option<u64>,
    rc: Option<i64>,
    lossy: bool,
}

/// Writes all of `report`, with a head that names the columns.
///
/// # Errors
/// What `out` returns.
pub fn write(out: &mut impl Write, report: &Report) -> io::Result<()> {
    let mut rows = csv::Writer::from_writer(out);
    for migration in &report.migrations {
        one(&mut rows, migration).map_err(io::Error::other)?;
    }
    rows.flush()
}

fn one<W: Write>(rows: &mut csv::Writer<W>, migration: &Migration) -> Result<(), csv::Error> {
    let id = migration.id;
    let inside = |start_ns: i64, duration_ns: u64| {
        let (Some(from), Some(length)) = (migration.downtime_start_ns, migration.downtime_ns)
        else {
            return 0;
        };
        let until = start_ns
            .saturating_add_unsigned(duration_ns)
            .min(from.saturating_add_unsigned(length));
        u64::try_from(until.saturating_sub(start_ns.max(from))).unwrap_or(0)
    };
    for span in &migration.spans {
        rows.serialize(Row {
            migration: id,
            kind: "span",
            side: span.side.to_string(),
            name: &span.name,
            label: &span.label,
            detail: text(&span.detail),
            start_ns: span.start_ns,
            duration_ns: span.duration_ns,
            inside_ns: inside(span.start_ns, span.duration_ns),
            depth: Some(span.depth),
            rc: span.rc,
            lossy: span.lossy,
        })?;
    }
    for ioctl in &migration.ioctls {
        let attr = ioctl.group.zip(ioctl.attr);
        rows.serialize(Row {
            migration: id,
            kind: "ioctl",
            side: ioctl.side.to_string(),
            name: &ioctl.name,
            label: "",
            detail: attr.map_or_else(String::new, |(group, attr)| {
                format!("group={group} attr={attr}")
            }),
            start_ns: ioctl.start_ns,
            duration_ns: ioctl.duration_ns,
            inside_ns: inside(ioctl.start_ns, ioctl.duration_ns),
            depth: None,
            rc: Some(ioctl.rc),
            lossy: ioctl.lossy,
        })?;
    }
    for gap in &migration.gaps {
        rows.serialize(Row {
            migration: id,
            kind: "gap",
            side: String::new(),
            name: gap.within.as_deref().unwrap_or_default(),
            label: "",
            detail: format!("after {} before {}", text(&gap.after), text(&gap.before)),
            start_ns: gap.start_ns,
            duration_ns: gap.duration_ns,
            inside_ns: gap.duration_ns,
            depth: None,
            rc: None,
            lossy: false,
        })?;
    }
    for loss in &migration.losses {
        rows.serialize(Row {
            migration: id,
            kind: "loss",
            side: loss.side.to_string(),
            name: "",
            label: "",
            detail: format!("events={}", loss.events),
            start_ns: loss.start_ns,
            duration_ns: loss.duration_ns,
            inside_ns: inside(loss.start_ns, loss.duration_ns),
            depth: None,
            rc: None,
            lossy: true,
        })?;
    }
    Ok(())
}

/// A string of a recording is another's: a spreadsheet must not take it for a formula.
fn text(text: &str) -> String {
    if text.starts_with(['=', '+', '-', '@', '\t', '\r']) {
        return format!("'{text}");
    }
    text.to_owned()
}
