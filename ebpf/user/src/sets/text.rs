//! A set of migrations on a terminal: what the blackout's parts took, how widely they vary, and
//! which of them cost most. Lines are at most 80 columns wide; colours are always written.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::io::{self, Write};

use anstyle::{AnsiColor, Style};

use super::{Key, Nature, Samples, Series};
use crate::analysis::Side;
use crate::analysis::describe::printable;
use crate::report::bars;
use crate::report::text::WIDTH;
use crate::report::units::{cut, percent, time};
use crate::stats;

const TITLE: Style = Style::new().bold();
const QUIET: Style = Style::new().dimmed();
const KERNEL: Style = AnsiColor::Cyan.on_default();
const OPEN: Style = AnsiColor::Yellow.on_default();
const BAR: Style = AnsiColor::Blue.on_default();

/// Columns of a name.
const NAME: usize = 34;

/// Columns of a histogram or a bar.
const BARS: usize = 12;

/// Writes the summary of `samples`.
///
/// # Errors
/// What `out` returns.
pub fn write(out: &mut dyn Write, samples: &Samples) -> io::Result<()> {
    let left = &samples.left_out;
    writeln!(out, "{TITLE}{} migrations{TITLE:#}", samples.migrations)?;
    for host in &samples.hosts {
        let text = format!(
            "{} · Linux {} {} · {}",
            host.hostname,
            host.kernel,
            host.arch,
            host.backends.join(", ")
        );
        writeln!(out, "{QUIET}{}{QUIET:#}", cut(&printable(&text), WIDTH))?;
    }
    if !left.is_empty() {
        let text = format!(
            "left out: {} failed, {} did not complete, {} not measured, {} in doubt",
            left.failed, left.unfinished, left.unmeasured, left.doubtful
        );
        writeln!(out, "{OPEN}{text}{OPEN:#}")?;
    }
    for (doubt, count) in &left.doubts {
        let text = format!("{count} × {}", printable(doubt));
        writeln!(out, "{OPEN}{}{OPEN:#}", cut(&text, WIDTH))?;
    }
    if samples.migrations == 0 {
        return writeln!(out, "\nNothing to sum up.");
    }
    let sides = [None, Some(Side::Source), Some(Side::Destination)];
    for side in sides {
        distribution(out, samples, side)?;
    }
    costs(out, samples)?;
    tables(out, samples)
}

/// The series of one side in call order, each with its histogram.
fn distribution(out: &mut dyn Write, samples: &Samples, side: Option<Side>) -> io::Result<()> {
    let series = || {
        samples
            .series
            .iter()
            .filter(|series| series.key.side == side)
    };
    if series().next().is_none() {
        return Ok(());
    }
    let title = match side {
        None => "Whole migrations",
        Some(Side::Source) => "Source",
        Some(_) => "Destination",
    };
    let columns = format!(
        "{:^BARS$} {:>10} {:>10} {:>10}",
        "min … max", "median", "p90", "p99"
    );
    writeln!(
        out,
        "\n{TITLE}{title:NAME$}{TITLE:#} {QUIET}{columns}{QUIET:#}"
    )?;
    for series in series() {
        let values = series.sorted();
        let figure = |q| stats::quantile(&values, q).map_or_else(|| "–".to_owned(), ns);
        let median = stats::median(&values).map_or_else(|| "–".to_owned(), ns);
        let style = match series.nature {
            Nature::Kernel => KERNEL,
            Nature::Wait => QUIET,
            Nature::Whole | Nature::Layer | Nature::Work => Style::new(),
        };
        let indent = series.depth.min(NAME / 4);
        let (width, name) = (
            NAME - indent,
            cut(&printable(&series.key.name), NAME - indent),
        );
        let histogram = bars::histogram(&values, BARS);
        writeln!(
            out,
            "{:indent$}{style}{name:width$}{style:#} {BAR}{histogram}{BAR:#} {median:>10} {:>10} {:>10}",
            "",
            figure(0.9),
            figure(0.99),
        )?;
    }
    Ok(())
}

/// What does work and is inside of nothing that does: the parts that add up, by cost.
fn costs(out: &mut dyn Write, samples: &Samples) -> io::Result<()> {
    let works = |series: &&Series| {
        let parent = series.parent.as_ref().and_then(|parent| {
            samples.series(&Key {
                side: series.key.side,
                name: parent.clone(),
            })
        });
        let outermost = parent.is_none_or(|parent| parent.nature != Nature::Work);
        series.nature == Nature::Work && outermost
    };
    let mut costs: Vec<_> = samples
        .series
        .iter()
        .filter(works)
        .map(|series| (stats::median(&series.sorted()).unwrap_or(0), series))
        .collect();
    costs.sort_by_key(|(median, _)| Reverse(*median));
    let downtime = samples
        .series(&Key::whole("downtime"))
        .and_then(|series| stats::median(&series.sorted()))
        .unwrap_or(0);
    if costs.is_empty() || downtime <= 0 {
        return Ok(());
    }
    let name = WIDTH - BARS - 20;
    let columns = format!("{:BARS$} {:>10} {:>7}", "", "median", "share");
    writeln!(
        out,
        "\n{TITLE}{:name$}{TITLE:#} {QUIET}{columns}{QUIET:#}",
        "By cost"
    )?;
    for (median, series) in costs {
        let share = median as f64 / downtime as f64;
        let text = cut(&printable(&series.key.to_string()), name);
        let bar = bars::share(share, BARS);
        writeln!(
            out,
            "{text:name$} {BAR}{bar}{BAR:#} {:>10} {:>7}",
            ns(median),
            percent(share)
        )?;
    }
    Ok(())
}

/// Saves and restores over what the tables held.
fn tables(out: &mut dyn Write, samples: &Samples) -> io::Result<()> {
    let mut sizes: BTreeMap<_, (Vec<i64>, Vec<i64>)> = BTreeMap::new();
    for table in &samples.tables {
        let key = (&table.op, table.devices, table.events);
        let (vmm, kernel) = sizes.entry(key).or_default();
        vmm.push(stats::value(table.ns));
        kernel.extend(table.kernel_ns.map(stats::value));
    }
    if sizes.is_empty() {
        return Ok(());
    }
    writeln!(
        out,
        "\n{TITLE}{:20}{TITLE:#} {QUIET}{:>8} {:>8} {:>5} {:>10} {:>10} {:>10}{QUIET:#}",
        "Interrupt tables", "devices", "events", "n", "VMM", "kernel", "an event"
    )?;
    for ((op, devices, events), (mut vmm, mut kernel)) in sizes {
        vmm.sort_unstable();
        kernel.sort_unstable();
        let inner = stats::median(&kernel);
        let whole = stats::median(&vmm).unwrap_or(0);
        let each = inner.unwrap_or(whole).checked_div(stats::value(events));
        let text = |value: Option<i64>| value.map_or_else(|| "–".to_owned(), ns);
        writeln!(
            out,
            "{:20} {devices:>8} {events:>8} {:>5} {:>10} {:>10} {:>10}",
            cut(&printable(op), 20),
            vmm.len(),
            ns(whole),
            text(inner),
            text(each)
        )?;
    }
    Ok(())
}

fn ns(ns: i64) -> String {
    time(u64::try_from(ns).unwrap_or(0))
}
