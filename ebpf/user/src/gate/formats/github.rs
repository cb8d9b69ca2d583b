//! GitHub Actions: a step summary in Markdown, and annotations as workflow commands.

use std::io::{self, Write};

use crate::analysis::describe::printable;
use crate::gate::{Check, Row, Verdict, text};
use crate::report::units::{signed, time};

/// Writes the step summary: the verdict, what is not a pass, and all the rest folded away.
///
/// # Errors
/// What `out` returns.
pub fn summary(out: &mut dyn Write, check: &Check) -> io::Result<()> {
    let mark = mark(check.verdict);
    writeln!(
        out,
        "## {mark} Blackout\n\n{}\n",
        cell(&text::headline(check))
    )?;
    for warning in &check.warnings {
        writeln!(out, "> {}\n", cell(warning))?;
    }
    let judged = || check.rows.iter().filter(|row| row.judged);
    let first = |row: &&Row| row.key.side.is_none() || row.verdict != Verdict::Pass;
    table(out, judged().filter(first))?;
    for kept in &check.objectives {
        let value = kept.value_ns.map_or_else(|| "not measured".to_owned(), ns);
        let (name, percent) = (cell(&kept.objective.name), kept.objective.percent);
        let limit = time(kept.objective.limit_ns);
        let mark = self::mark(kept.verdict);
        writeln!(
            out,
            "\n{mark} objective: p{percent} of {name} is {value}, its limit {limit}"
        )?;
    }
    writeln!(out, "\n<details><summary>All spans</summary>\n")?;
    table(out, judged())?;
    let settings = &check.settings;
    writeln!(
        out,
        "\nA regression is a slowdown by more than {} of the span and {} of the downtime or time, \
         with p < {} after correction.\n\n</details>",
        settings.relative, settings.absolute, settings.alpha
    )
}

/// Writes an annotation for each regression and open answer that decides the verdict.
///
/// # Errors
/// What `out` returns.
pub fn annotations(out: &mut dyn Write, check: &Check) -> io::Result<()> {
    let level = match check.verdict {
        Verdict::Pass => "notice",
        Verdict::Inconclusive => "warning",
        Verdict::Regression => "error",
    };
    let headline = data(&text::headline(check));
    writeln!(out, "::{level} title=Blackout::{headline}")?;
    for row in check.culprits() {
        let shift = row.shift_ns.map(signed).unwrap_or_default();
        let (before, now) = (ns(row.baseline.median), ns(row.current.median));
        let text = format!("{} is slower by {shift}: {before} → {now}", row.key);
        writeln!(out, "::error title=Blackout regression::{}", data(&text))?;
    }
    Ok(())
}

fn table<'a>(out: &mut dyn Write, rows: impl Iterator<Item = &'a Row>) -> io::Result<()> {
    writeln!(
        out,
        "| | median of | baseline | current | shift | 95 % interval |"
    )?;
    writeln!(out, "|---|---|--:|--:|--:|--:|")?;
    for row in rows {
        let shift = row.shift_ns.map(signed).unwrap_or_default();
        let interval = row.shift_low_ns.zip(row.shift_high_ns);
        let interval = interval.map_or_else(String::new, |(low, high)| {
            format!("{} to {}", signed(low), signed(high))
        });
        writeln!(
            out,
            "| {} | {} | {} | {} | {shift} | {interval} |",
            mark(row.verdict),
            cell(&row.key.to_string()),
            ns(row.baseline.median),
            ns(row.current.median)
        )?;
    }
    Ok(())
}

fn mark(verdict: Verdict) -> &'static str {
    match verdict {
        Verdict::Pass => "✅",
        Verdict::Inconclusive => "❔",
        Verdict::Regression => "❌",
    }
}

fn ns(ns: i64) -> String {
    time(u64::try_from(ns).unwrap_or(0))
}

/// Text that neither ends a cell nor begins markup: names are another's.
fn cell(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for char in printable(text).chars() {
        match char {
            '<' => escaped.push_str("&lt;"),
            '&' => escaped.push_str("&amp;"),
            '|' | '\\' | '`' | '*' | '_' | '[' | ']' | '!' | '~' | '#' => {
                escaped.push('\\');
                escaped.push(char);
            }
            _ => escaped.push(char),
        }
    }
    escaped
}

/// Text as the value of a workflow command.
fn data(text: &str) -> String {
    printable(text).replace('%', "%25")
}
