//! The parts of the page that need no script.

use std::io::{self, Write};

use super::text;
use crate::analysis::Side;
use crate::gate::compare::Figures;
use crate::gate::side_by_side::{Compared, Pair};
use crate::report::bars;
use crate::report::schema::Migration;
use crate::report::units::{percent, signed, time};
use crate::sets::{Key, Nature, Samples, Series};

/// Rows of one breakdown; a damaged recording may have any number.
const ROWS: usize = 2_000;

/// Columns of a histogram.
const COLUMNS: usize = 32;

/// A difference that is chance with less than this probability is marked.
const SIGNIFICANT: f64 = 0.01;

/// The spans of one migration in call order, with their part of the downtime.
pub(super) fn breakdown(out: &mut dyn Write, migration: &Migration) -> io::Result<()> {
    let whole = migration.downtime_ns.zip(migration.downtime_start_ns);
    writeln!(
        out,
        "<details open><summary>Breakdown</summary><table class=\"breakdown\"><thead><tr>\
         <th>Span</th><th>took</th><th>share</th><th class=\"wide\">when</th></tr></thead><tbody>"
    )?;
    let mut side = None;
    for span in migration.spans.iter().take(ROWS) {
        let inside = whole.and_then(|whole| place(span.start_ns, span.duration_ns, whole));
        // What was over before the stop is in the timeline.
        let (Some((left, width)), true) = (inside, span.side != Side::Wire) else {
            continue;
        };
        if side != Some(span.side) {
            side = Some(span.side);
            writeln!(
                out,
                "<tr class=\"side\"><th colspan=\"4\">{}</th></tr>",
                span.side
            )?;
        }
        let label = if span.label.is_empty() {
            &span.name
        } else {
            &span.label
        };
        let known: Vec<_> = label.split(' ').collect();
        let rest = span.detail.split(' ').filter(|word| !known.contains(word));
        let rest = rest.collect::<Vec<_>>().join(" ");
        let class = match (span.rc, span.lossy) {
            (Some(..0), _) => "bad",
            (_, true) => "lossy",
            _ => "",
        };
        let mark = if span.lossy {
            " <abbr title=\"events were lost while it ran\">?</abbr>"
        } else {
            ""
        };
        writeln!(
            out,
            "<tr class=\"{class}\"><td style=\"padding-left:{:.1}em\">{} <span class=\"quiet\">{}</span>\
             {mark}</td><td>{}</td><td>{}</td><td class=\"wide\"><div class=\"place\">\
             <i style=\"left:{:.3}%;width:{:.3}%\"></i></div></td></tr>",
            indent(span.depth),
            text(label),
            text(&rest),
            time(span.duration_ns),
            percent(width),
            left * 100.0,
            width * 100.0
        )?;
    }
    writeln!(out, "</tbody></table></details>")?;
    interrupt_tables(out, migration)?;
    gaps(out, migration)
}

/// What the saves and restores of an interrupt controller's tables took, beside what an ITS maps.
fn interrupt_tables(out: &mut dyn Write, migration: &Migration) -> io::Result<()> {
    if migration.its.is_empty() {
        return Ok(());
    }
    writeln!(
        out,
        "<details open><summary>Interrupt tables</summary><table><thead><tr><th></th><th>VMM</th>\
         <th>kernel</th><th>devices</th><th>events</th></tr></thead><tbody>"
    )?;
    let count =
        |count: Option<u64>| count.map_or_else(|| "–".to_owned(), |count| count.to_string());
    for operation in migration.its.iter().take(ROWS) {
        writeln!(
            out,
            "<tr><td>{} {}</td><td>{}</td><td>{}</td><td>{}</td><td>{}</td></tr>",
            operation.side,
            text(&operation.op),
            time(operation.duration_ns),
            operation.kernel_ns.map_or_else(|| "–".to_owned(), time),
            count(operation.devices),
            count(operation.events)
        )?;
    }
    writeln!(out, "</tbody></table></details>")
}

fn gaps(out: &mut dyn Write, migration: &Migration) -> io::Result<()> {
    let mut gaps: Vec<_> = migration.gaps.iter().collect();
    gaps.sort_by_key(|gap| std::cmp::Reverse(gap.duration_ns));
    if gaps.is_empty() {
        return Ok(());
    }
    writeln!(
        out,
        "<details><summary>What no span explains</summary><table><tbody>"
    )?;
    for gap in gaps.into_iter().take(20) {
        let place = match &gap.within {
            Some(within) => format!("in {within}, after {}", gap.after),
            None => format!("after {}, before {}", gap.after, gap.before),
        };
        let (took, place) = (time(gap.duration_ns), text(&place));
        writeln!(
            out,
            "<tr><td>{took}</td><td class=\"left\">{place}</td></tr>"
        )?;
    }
    writeln!(out, "</tbody></table></details>")
}

/// Where in the downtime a span lies, and how much of it it takes; `None` outside.
fn place(at: i64, took: u64, (whole, from): (u64, i64)) -> Option<(f64, f64)> {
    let until = at
        .saturating_add_unsigned(took)
        .min(from.saturating_add_unsigned(whole));
    let start = at.max(from);
    let inside = u64::try_from(until.checked_sub(start)?).ok()?;
    if inside == 0 || whole == 0 {
        return None;
    }
    let offset = u64::try_from(start.saturating_sub(from)).unwrap_or(0);
    Some((offset as f64 / whole as f64, inside as f64 / whole as f64))
}

/// Each series' spread over the migrations.
pub(super) fn distribution(out: &mut dyn Write, samples: &Samples) -> io::Result<()> {
    if samples.migrations < 2 {
        return Ok(());
    }
    writeln!(
        out,
        "<section><h2>Over {} migrations</h2><table><thead><tr><th>Span</th>\
         <th class=\"wide\">min … max, logarithmic</th><th>median</th>\
         <th class=\"more\">p90</th><th>p99</th><th class=\"more\">max</th></tr></thead><tbody>",
        samples.migrations
    )?;
    let mut side = None;
    for series in &samples.series {
        if series.key.side != side {
            side = series.key.side;
            let title = side.map(|side| side.to_string()).unwrap_or_default();
            writeln!(
                out,
                "<tr class=\"side\"><th colspan=\"6\">{title}</th></tr>"
            )?;
        }
        let sorted = series.sorted();
        let figures = Figures::of(&sorted);
        if figures.n == 0 {
            continue;
        }
        name(out, &series.key, series.depth)?;
        write!(out, "<td class=\"wide\">")?;
        histogram(out, series, &sorted)?;
        let [median, p90, p99, max] =
            [figures.median, figures.p90, figures.p99, figures.max].map(ns);
        writeln!(
            out,
            "</td><td>{median}</td><td class=\"more\">{p90}</td><td>{p99}</td>\
             <td class=\"more\">{max}</td></tr>"
        )?;
    }
    writeln!(out, "</tbody></table></section>")
}

fn histogram(out: &mut dyn Write, series: &Series, sorted: &[i64]) -> io::Result<()> {
    let counts = bars::counts(sorted, COLUMNS);
    let most = counts.iter().copied().max().unwrap_or(1).max(1);
    let class = match series.nature {
        Nature::Kernel => "kernel",
        Nature::Wait => "wait",
        Nature::Whole | Nature::Layer | Nature::Work => "work",
    };
    write!(
        out,
        "<svg class=\"histogram {class}\" viewBox=\"0 0 {COLUMNS} 10\" preserveAspectRatio=\"none\">"
    )?;
    for (x, count) in counts.iter().enumerate().filter(|(_, count)| **count > 0) {
        // A column with anything in it is at least a line.
        let height = (*count as f64 / most as f64 * 10.0).max(0.6);
        let y = 10.0 - height;
        write!(
            out,
            "<rect x=\"{x}\" y=\"{y:.2}\" width=\".9\" height=\"{height:.2}\"/>"
        )?;
    }
    write!(out, "</svg>")
}

/// Two sets side by side.
pub(super) fn comparison(out: &mut dyn Write, compared: &Compared) -> io::Result<()> {
    writeln!(
        out,
        "<section><h2>Compared</h2><p class=\"quiet\">A: {} migrations, B: {}. B's shift with its \
         95 % interval; marked where p &lt; {SIGNIFICANT} after correction.</p><table><thead><tr>\
         <th>Span</th><th>A</th><th>B</th><th>shift</th><th class=\"wide\">interval</th></tr></thead>\
         <tbody>",
        compared.a_migrations, compared.b_migrations
    )?;
    let mut side = None;
    for row in &compared.rows {
        if row.key.side != side {
            side = row.key.side;
            let title = side.map(|side| side.to_string()).unwrap_or_default();
            writeln!(
                out,
                "<tr class=\"side\"><th colspan=\"5\">{title}</th></tr>"
            )?;
        }
        let (Some(shift), Some(low), Some(high)) =
            (row.shift_ns, row.shift_low_ns, row.shift_high_ns)
        else {
            continue;
        };
        let class = match () {
            () if row.p >= SIGNIFICANT => "",
            () if shift > 0 => "bad",
            () => "good",
        };
        name(out, &row.key, row.depth)?;
        writeln!(
            out,
            "<td>{}</td><td>{}</td><td class=\"{class}\">{}</td><td class=\"wide\">{}</td></tr>",
            ns(row.a.median),
            ns(row.b.median),
            signed(shift),
            interval(row, low, high)
        )?;
    }
    writeln!(out, "</tbody></table></section>")
}

/// The interval as a bar around the middle, which is no shift; half the width is A's median.
fn interval(row: &Pair, low: i64, high: i64) -> String {
    let scale = row.a.median.max(1) as f64;
    let at = |ns: i64| ((ns as f64 / scale).clamp(-1.0, 1.0) + 1.0) * 50.0;
    let (left, right) = (at(low), at(high));
    format!(
        "<div class=\"place middle\" title=\"{} to {}\"><i style=\"left:{left:.2}%;width:{:.2}%\"></i>\
         </div>",
        signed(low),
        signed(high),
        (right - left).max(0.5)
    )
}

fn name(out: &mut dyn Write, key: &Key, depth: usize) -> io::Result<()> {
    let (indent, name) = (indent(depth as u64), text(&key.name));
    write!(
        out,
        "<tr><td style=\"padding-left:{indent:.1}em\">{name}</td>"
    )
}

/// Where a span's name begins, em: those of depth 0 below their column's title.
fn indent(depth: u64) -> f64 {
    0.4 + depth.min(12) as f64 * 0.7
}

fn ns(ns: i64) -> String {
    time(u64::try_from(ns).unwrap_or(0))
}
