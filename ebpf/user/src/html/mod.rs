//! `blackout report --html`: one file that needs nothing else, for people who were not there.
//!
//! The figures, the breakdown, the distributions and the comparison are plain HTML, so they print and
//! need no script; the timeline is drawn, and zoomed, by the script in the page. Every string of a
//! recording is escaped: it may be another's.

mod data;
mod tables;

use std::io::{self, Write};

use crate::gate::side_by_side::Compared;
use crate::report::schema::Migration;
use crate::report::units::{percent, time};
use crate::sets::Samples;

/// So many migrations get a timeline.
pub const TIMELINES: usize = 12;

const STYLE: &str = include_str!("page.css");
const SCRIPT: &str = include_str!("page.js");

/// What a page shows.
#[derive(Debug)]
pub struct Page<'a> {
    /// The migrations that get a timeline and a breakdown.
    pub migrations: &'a [Migration],
    /// All migrations' samples.
    pub samples: &'a Samples,
    /// Another set beside them, which is B.
    pub compared: Option<&'a Compared>,
}

/// Writes the page.
///
/// # Errors
/// What `out` returns.
pub fn write(out: &mut dyn Write, page: &Page<'_>) -> io::Result<()> {
    let title = title(page);
    write!(
        out,
        "<!DOCTYPE html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <meta name=\"color-scheme\" content=\"light dark\">\n\
         <title>{title}</title>\n<style>\n{STYLE}</style></head>\n<body><header><h1>{title}</h1>\n"
    )?;
    for host in &page.samples.hosts {
        let (name, kernel, arch) = (text(&host.hostname), text(&host.kernel), text(&host.arch));
        writeln!(out, "<p class=\"quiet\">{name} · Linux {kernel} {arch}</p>")?;
    }
    writeln!(out, "</header><main>")?;
    if page.migrations.len() > 1 {
        writeln!(out, "<label class=\"pick\">Migration <select id=\"pick\">")?;
        for (index, migration) in page.migrations.iter().enumerate() {
            let took = migration.downtime_ns.map_or_else(|| "–".to_owned(), time);
            let status = text(&migration.status);
            let number = index + 1;
            writeln!(
                out,
                "<option value=\"{index}\">{number}: {took}, {status}</option>"
            )?;
        }
        writeln!(out, "</select></label>")?;
    }
    for (index, migration) in page.migrations.iter().enumerate() {
        one(out, index, migration)?;
    }
    tables::distribution(out, page.samples)?;
    if let Some(compared) = page.compared {
        tables::comparison(out, compared)?;
    }
    writeln!(
        out,
        "</main><footer class=\"quiet\">Written by blackout {}. Downtime: from the entry of \
         migration_stop_vm on the source to the first KVM_RUN on the destination. Blackout: from the \
         last vCPU's last exit from guest code to the first entry.</footer>",
        env!("CARGO_PKG_VERSION")
    )?;
    let data = data::json(page.migrations)?;
    writeln!(
        out,
        "<script type=\"application/json\" id=\"data\">{data}</script>"
    )?;
    writeln!(out, "<script>\n{SCRIPT}</script>\n</body></html>")
}

fn title(page: &Page<'_>) -> String {
    match page.migrations {
        [one] => format!("Blackout of a migration, {}", text(&one.status)),
        _ => format!("Blackouts of {} migrations", page.samples.seen()),
    }
}

/// One migration: its figures, its timeline, its breakdown.
fn one(out: &mut dyn Write, index: usize, migration: &Migration) -> io::Result<()> {
    writeln!(out, "<section class=\"migration\" data-index=\"{index}\">")?;
    let figure = |ns: Option<u64>| ns.map_or_else(|| "unknown".to_owned(), time);
    let explained = migration.explained.map_or_else(|| "–".to_owned(), percent);
    let figures = [
        ("downtime", figure(migration.downtime_ns)),
        ("blackout", figure(migration.blackout_ns)),
        ("explained", explained),
        ("lost events", migration.lost_events.to_string()),
    ];
    writeln!(out, "<dl class=\"figures\">")?;
    for (name, value) in figures {
        writeln!(out, "<div><dt>{name}</dt><dd>{value}</dd></div>")?;
    }
    writeln!(out, "</dl>")?;
    if !migration.losses.is_empty() {
        writeln!(
            out,
            "<p class=\"quiet\">What ran while events were lost is marked ? and dashed: a part of it \
             may be missing.</p>"
        )?;
    }
    for doubt in migration.error.iter().chain(&migration.doubts) {
        writeln!(out, "<p class=\"bad\">{}</p>", text(doubt))?;
    }
    writeln!(
        out,
        "<h2>Timeline</h2><div class=\"timeline\" data-index=\"{index}\" tabindex=\"0\" \
         role=\"img\" aria-label=\"Timeline of the blackout; the table below has the same spans\">\
         <noscript>The timeline needs JavaScript; the table below does not.</noscript></div>"
    )?;
    tables::breakdown(out, migration)?;
    writeln!(out, "</section>")
}

/// `text` for HTML: nothing in it ends an element or an attribute, or steers a terminal.
fn text(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for char in crate::analysis::describe::printable(text).chars() {
        match char {
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '&' => escaped.push_str("&amp;"),
            '"' => escaped.push_str("&quot;"),
            '\'' => escaped.push_str("&#39;"),
            _ => escaped.push(char),
        }
    }
    escaped
}
