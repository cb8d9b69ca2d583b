//! `blackout report` on a terminal: a tree in call order for each side, then the figures.
//!
//! Lines are at most [`WIDTH`] columns wide. Colours are always written; the caller's stream drops
//! them where they do not belong.

use std::cmp::Reverse;
use std::io::{self, Write};

use anstyle::{AnsiColor, Style};

use super::bars;
use super::tree::{self, Row, Tone};
use super::units::{cut, percent, time};
use crate::analysis::clock::Basis;
use crate::analysis::describe::{self, printable};
use crate::analysis::{Loaded, Migration, Party, Side, View};
use crate::foreign;
use crate::recording::Ending;

/// The widest line.
pub const WIDTH: usize = 80;

/// Columns of what a line of the tree is about; time, share and its place in the downtime follow.
const NAME: usize = 48;

/// Columns in which a span's place in the downtime is drawn, or its failure is named.
const PLACE: usize = WIDTH - NAME - 20;

/// Marks what ran while events were lost: a part of it may be missing.
const LOSSY: char = '?';

/// So many gaps are listed one by one.
const GAPS: usize = 5;

const TITLE: Style = Style::new().bold();
const QUIET: Style = Style::new().dimmed();
const KERNEL: Style = AnsiColor::Cyan.on_default();
const BAD: Style = AnsiColor::Red.on_default().bold();
const FIGURE: Style = AnsiColor::Green.on_default().bold();

/// Writes the report on `migrations`, which were found in `recordings`.
///
/// # Errors
/// What `out` returns.
pub fn write(
    out: &mut dyn Write,
    recordings: &[Loaded],
    migrations: &[Migration<'_>],
) -> io::Result<()> {
    for recording in recordings {
        head(out, recording)?;
    }
    if migrations.is_empty() {
        writeln!(out, "\nNo migration was recorded.")?;
    }
    for migration in migrations {
        writeln!(out)?;
        one(out, migration)?;
    }
    Ok(())
}

fn head(out: &mut dyn Write, recording: &Loaded) -> io::Result<()> {
    let header = &recording.header;
    let host = format!(
        "{} · Linux {} {} · {}",
        header.hostname,
        header.kernel,
        header.arch,
        header.backends.join(", ")
    );
    writeln!(
        out,
        "{QUIET}{}{QUIET:#}",
        cut(&printable(&recording.name), WIDTH)
    )?;
    writeln!(out, "{QUIET}{}{QUIET:#}", cut(&printable(&host), WIDTH))?;
    if let Ending::Cut { offset } = recording.ending {
        writeln!(
            out,
            "{BAD}cut at byte {offset}: the recorder did not finish it{BAD:#}"
        )?;
    }
    if let Some(cost) = recording.cost {
        let bpf = cost
            .bpf_ns
            .map(|ns| format!(", {} in eBPF", time(ns)))
            .unwrap_or_default();
        let (events, cpu) = (cost.events, time(cost.cpu_ns));
        writeln!(
            out,
            "{QUIET}{events} events, {cpu} of the recorder's CPU{bpf}{QUIET:#}"
        )?;
    }
    Ok(())
}

fn one(out: &mut dyn Write, migration: &Migration<'_>) -> io::Result<()> {
    let id = migration
        .id
        .map_or_else(|| "of unknown id".to_owned(), |id| id.to_string());
    let mode = printable(&migration.mode);
    let title = match migration.view {
        View::Probes => format!("Migration {id}, {}", printable(&migration.status)),
        View::Kernel if has_probes(migration) => {
            "Migration, seen by KVM's ioctls and by probes of the monitor's own".to_owned()
        }
        View::Kernel => "Migration, seen by KVM's ioctls: the monitor has no probes".to_owned(),
    };
    let title = if mode.is_empty() {
        title
    } else {
        format!("{title}, mode {mode}")
    };
    writeln!(out, "{TITLE}{}{TITLE:#}", cut(&title, WIDTH))?;
    if let Some(error) = &migration.error {
        writeln!(out, "{BAD}{}{BAD:#}", cut(error, WIDTH))?;
    }
    for party in migration.parties() {
        side(out, migration, party)?;
    }
    tables(out, migration)?;
    figures(out, migration)
}

fn has_probes(migration: &Migration<'_>) -> bool {
    migration
        .parties()
        .any(|party| !party.points.is_empty() || !party.spans.is_empty())
}

/// Whether a probe of another monitor says where its downtime begins.
fn is_told(migration: &Migration<'_>) -> bool {
    let points = migration
        .source
        .iter()
        .flat_map(|party| party.points_of(foreign::STOP.0));
    let mut starts = points.map(|point| Some(point.start_ns));
    starts.any(|start_ns| start_ns == migration.downtime.stop_ns)
}

fn side(out: &mut dyn Write, migration: &Migration<'_>, party: &Party<'_>) -> io::Result<()> {
    let name = match party.side {
        Side::Source => "Source",
        _ => "Destination",
    };
    let comm = printable(&party.process.comm);
    let title = cut(
        format!("{name}: {comm} (pid {})", party.pid).trim_end(),
        NAME,
    );
    writeln!(
        out,
        "\n{TITLE}{title:NAME$}{TITLE:#}{QUIET} {:>10} {:>7} when{QUIET:#}",
        "took", "share"
    )?;
    let rows = match migration.view {
        View::Probes => tree::rows(party, migration.downtime.bounds),
        View::Kernel if party.spans.is_empty() => {
            tree::ioctl_rows(party, migration.downtime.bounds)
        }
        View::Kernel => tree::foreign_rows(party, migration.downtime.bounds),
    };
    for row in rows {
        line(out, &row)?;
    }
    Ok(())
}

fn line(out: &mut dyn Write, row: &Row) -> io::Result<()> {
    // Deeper trees than this are damaged recordings; a line keeps room for a name.
    let indent = (2 * row.depth).min(NAME / 2);
    let style = match row.tone {
        Tone::Work => Style::new(),
        Tone::Wait => QUIET,
        Tone::Kernel => KERNEL,
        Tone::Bad => BAD,
    };
    let text = cut(&row.text, NAME - indent);
    let (width, took) = (NAME - indent, time(row.took_ns));
    let share = row.share.map(percent).unwrap_or_default();
    let line = format!("{text:width$} {took:>10} {share:>7}");
    let place = match &row.failure {
        Some(failure) => cut(failure, PLACE),
        None => row
            .place
            .map(|(start, end)| bars::place(start, end, PLACE))
            .unwrap_or_default(),
    };
    let mark = if row.lossy { LOSSY } else { ' ' };
    let line = format!("{line}{mark}{place}");
    writeln!(out, "{:indent$}{style}{}{style:#}", "", line.trim_end())
}

/// The interrupt controller's tables: what the monitor saw beside what the kernel did.
fn tables(out: &mut dyn Write, migration: &Migration<'_>) -> io::Result<()> {
    if migration.its.is_empty() {
        return Ok(());
    }
    writeln!(
        out,
        "\n{TITLE}{:38}{TITLE:#}{QUIET} {:>10} {:>10} {:>8} {:>10}{QUIET:#}",
        "Interrupt tables", "VMM", "kernel", "devices", "events"
    )?;
    let count =
        |count: Option<u64>| count.map_or_else(|| "–".to_owned(), |count| count.to_string());
    for operation in &migration.its {
        let name = format!("{} {}", operation.side, operation.op);
        let kernel = operation
            .kernel_ns()
            .map_or_else(|| "not seen".to_owned(), time);
        writeln!(
            out,
            "{:38} {:>10} {kernel:>10} {:>8} {:>10}",
            cut(&name, 38),
            operation
                .rc
                .map_or_else(|| "unfinished".to_owned(), |_| time(operation.duration_ns)),
            count(operation.devices),
            count(operation.events),
        )?;
        if let (Some(_), Some(inner)) = (operation.ioctl_ns, operation.function_ns) {
            writeln!(
                out,
                "{QUIET}  inside the ioctl {:>41}{QUIET:#}",
                time(inner)
            )?;
        }
        if let Some(rc) = operation.rc.filter(|rc| *rc < 0) {
            writeln!(out, "{BAD}  failed: {}{BAD:#}", describe::errno(rc))?;
        }
    }
    Ok(())
}

fn figures(out: &mut dyn Write, migration: &Migration<'_>) -> io::Result<()> {
    let downtime = &migration.downtime;
    writeln!(out)?;
    match (downtime.bounds, downtime.stop_ns) {
        (Some(bounds), _) => {
            let what = match bounds.resumed {
                _ if migration.view == View::Kernel && is_told(migration) => {
                    "src-downtime-start → KVM_RUN at the destination"
                }
                _ if migration.view == View::Kernel => {
                    "first vCPU out of KVM_RUN → KVM_RUN at the destination"
                }
                Side::Source => "migration_stop_vm entered → KVM_RUN again at the source",
                _ => "migration_stop_vm entered → KVM_RUN at the destination",
            };
            figure(out, "downtime", &time(bounds.duration_ns()), what)?;
        }
        (None, Some(_)) => {
            let saw = downtime.source_saw_ns.map(time);
            let saw = saw.map_or_else(String::new, |saw| format!("; the source saw {saw}"));
            figure(
                out,
                "downtime",
                "unknown",
                &format!("no KVM_RUN was seen to end it{saw}"),
            )?;
        }
        (None, None) if migration.source.is_none() => {
            figure(out, "downtime", "unknown", "the source was not recorded")?;
        }
        (None, None) => figure(out, "downtime", "none", "the guest was not stopped")?,
    }
    if let Some((start, end)) = downtime.blackout {
        let dark = u64::try_from(end.saturating_sub(start)).unwrap_or(0);
        figure(
            out,
            "blackout",
            &time(dark),
            "last vCPU out of guest code → first one in again",
        )?;
        for vcpu in downtime.vcpus.iter().filter(|_| downtime.vcpus.len() > 1) {
            let dark = u64::try_from(vcpu.end_ns.saturating_sub(vcpu.start_ns)).unwrap_or(0);
            figure(out, &format!("  vCPU {}", vcpu.index), &time(dark), "")?;
        }
    }
    if let Some(explained) = downtime.explained {
        figure(
            out,
            "explained",
            &percent(explained),
            match migration.view {
                View::Probes => "of the downtime is in named spans",
                View::Kernel if has_probes(migration) => {
                    "of the downtime is in KVM's ioctls and named spans"
                }
                View::Kernel => "of the downtime is in KVM's ioctls",
            },
        )?;
    }
    gaps(out, migration)?;
    clock(out, migration)?;
    let lost = migration.lost_events();
    let what = match lost {
        0 => "events".to_owned(),
        1 => format!("event; what ran meanwhile is marked {LOSSY}"),
        _ => format!("events; what ran meanwhile is marked {LOSSY}"),
    };
    figure(out, "lost", &lost.to_string(), &what)?;
    for doubt in migration.doubts() {
        writeln!(
            out,
            "{BAD}doubtful: {}{BAD:#}",
            cut(&printable(&doubt), WIDTH - 10)
        )?;
    }
    Ok(())
}

fn figure(out: &mut dyn Write, name: &str, value: &str, what: &str) -> io::Result<()> {
    let what = cut(what, WIDTH - 25);
    let end = if what.is_empty() { "" } else { "  " };
    writeln!(out, "{name:10} {FIGURE}{value:>12}{FIGURE:#}{end}{what}")
}

/// The gaps, the largest first, each with its place. Those that fit no more are counted.
fn gaps(out: &mut dyn Write, migration: &Migration<'_>) -> io::Result<()> {
    let Some(bounds) = migration.downtime.bounds else {
        return Ok(());
    };
    let mut gaps: Vec<_> = migration.downtime.gaps.iter().collect();
    gaps.sort_by_key(|gap| Reverse(gap.duration_ns()));
    let (shown, rest) = gaps.split_at(gaps.len().min(GAPS));
    for (index, gap) in shown.iter().enumerate() {
        let (name, took) = (
            if index == 0 { "gaps" } else { "" },
            time(gap.duration_ns()),
        );
        let share = percent(bounds.share(gap.start_ns, gap.end_ns));
        let after = format!("after {}", gap.after);
        let within = gap.within.as_ref().map(|within| format!("in {within}"));
        let place = within.clone().unwrap_or_else(|| after.clone());
        writeln!(
            out,
            "{name:10} {FIGURE}{took:>12}{FIGURE:#}  {share:>6} {}",
            cut(&place, 48)
        )?;
        // The largest one's place is told in full.
        let more = within
            .map(|_| after)
            .into_iter()
            .chain([format!("before {}", gap.before)]);
        for line in more.filter(|_| index == 0) {
            writeln!(out, "{:32}{}", "", cut(&line, 48))?;
        }
    }
    if !rest.is_empty() {
        let sum = rest
            .iter()
            .fold(0u64, |sum, gap| sum.saturating_add(gap.duration_ns()));
        let what = format!("in {} smaller gaps; --json lists them", rest.len());
        figure(out, "", &time(sum), &what)?;
    }
    Ok(())
}

fn clock(out: &mut dyn Write, migration: &Migration<'_>) -> io::Result<()> {
    if migration.source.is_none() || migration.destination.is_none() {
        return Ok(());
    }
    match (migration.clock.basis, migration.clock.error_ns) {
        (Basis::OneHost, _) => Ok(()),
        (basis, error) => {
            let error = error.map_or_else(|| "unknown".to_owned(), time);
            let what = match basis {
                Basis::Samples => "between the two hosts, measured",
                Basis::Given => "between the two hosts, as given to `blackout merge`",
                Basis::Tai => "two hosts, laid over each other by atomic time (TAI)",
                _ => "two hosts, laid over each other by wall clock",
            };
            figure(out, "clock", &format!("± {error}"), what)
        }
    }
}
