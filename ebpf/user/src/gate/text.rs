//! A check on a terminal. Lines are at most [`WIDTH`] columns wide; colours are always written, the
//! caller's stream drops them where they do not belong.

use std::io::{self, Write};

use anstyle::{AnsiColor, Style};

use super::check::{Check, Row, Verdict};
use super::objective::Kept;
use crate::analysis::describe::printable;
use crate::report::text::WIDTH;
use crate::report::units::{cut, signed, time};
use crate::sets::Samples;

const TITLE: Style = Style::new().bold();
const QUIET: Style = Style::new().dimmed();
const GOOD: Style = AnsiColor::Green.on_default();
const OPEN: Style = AnsiColor::Yellow.on_default();
const BAD: Style = AnsiColor::Red.on_default().bold();

/// Columns of a series' name; then baseline, current, shift and verdict follow.
const NAME: usize = 34;

/// Writes the check. `all` also lists the spans that passed.
///
/// # Errors
/// What `out` returns.
pub fn write(out: &mut dyn Write, check: &Check, all: bool) -> io::Result<()> {
    set(out, "baseline", &check.baseline)?;
    set(out, "current", &check.current)?;
    for warning in &check.warnings {
        writeln!(out, "{OPEN}{}{OPEN:#}", cut(&printable(warning), WIDTH))?;
    }
    let columns = format!(
        "{:>10} {:>10} {:>11}  verdict",
        "baseline", "current", "shift"
    );
    writeln!(
        out,
        "\n{TITLE}{:NAME$}{TITLE:#} {QUIET}{columns}{QUIET:#}",
        "median of"
    )?;
    let mut quiet = 0;
    let mut side = None;
    for row in check.rows.iter().filter(|row| row.judged) {
        let whole = row.key.side.is_none();
        if all || whole || row.faster || row.verdict != Verdict::Pass {
            if side != row.key.side {
                side = row.key.side;
                let title = side.map(|side| side.to_string()).unwrap_or_default();
                writeln!(out, "{QUIET}on the {title}{QUIET:#}")?;
            }
            line(out, row)?;
        } else {
            quiet += 1;
        }
    }
    if quiet > 0 {
        let text = format!("{quiet} spans that passed; --all lists them");
        writeln!(out, "{QUIET}{text}{QUIET:#}")?;
    }
    objectives(out, &check.objectives)?;
    let failures = &check.failures;
    if failures.current > 0 || failures.baseline > 0 {
        let text = format!(
            "failed migrations: {} in the baseline, {} now, p = {:.2}",
            failures.baseline, failures.current, failures.p
        );
        writeln!(
            out,
            "\n{}{text}{:#}",
            style(failures.verdict),
            style(failures.verdict)
        )?;
    }
    conclusion(out, check)
}

/// The verdict as one line, for whoever reads no more.
pub fn headline(check: &Check) -> String {
    let sizes = format!(
        "{} against {} migrations",
        check.current.migrations, check.baseline.migrations
    );
    match check.verdict {
        Verdict::Pass => format!("pass: {sizes}"),
        Verdict::Inconclusive => {
            let more = check.more_runs.map_or_else(
                || "the slowdown is too near to the threshold".to_owned(),
                |more| format!("about {more} more migrations of each would tell"),
            );
            format!("inconclusive: {sizes}; {more}")
        }
        Verdict::Regression => {
            let culprits = check.culprits();
            let named = culprits.first().map(|row| {
                let shift = row.shift_ns.map(signed).unwrap_or_default();
                format!("{} {shift}", printable(&row.key.to_string()))
            });
            let limits = check.objectives.iter();
            let broken = limits
                .filter(|kept| kept.verdict == Verdict::Regression)
                .map(|kept| format!("{} above its limit", kept.objective.name));
            let why: Vec<_> = named.into_iter().chain(broken).collect();
            match why.as_slice() {
                [] => "regression: more migrations fail".to_owned(),
                why => format!("regression: {}", why.join(", ")),
            }
        }
    }
}

fn set(out: &mut dyn Write, name: &str, samples: &Samples) -> io::Result<()> {
    let host = samples.hosts.first();
    let host =
        host.map(|host| format!(" · {} · Linux {} {}", host.hostname, host.kernel, host.arch));
    let commit = samples
        .commit
        .as_deref()
        .map(|commit| format!(" · {commit}"));
    let text = format!(
        "{name:8} {} migrations{}{}",
        samples.migrations,
        host.unwrap_or_default(),
        commit.unwrap_or_default()
    );
    writeln!(out, "{QUIET}{}{QUIET:#}", cut(&printable(&text), WIDTH))
}

fn line(out: &mut dyn Write, row: &Row) -> io::Result<()> {
    let shift = row.shift_ns.map(signed).unwrap_or_default();
    let style = style(row.verdict);
    let name = cut(&printable(&row.key.name), NAME);
    let verdict = match row.verdict {
        Verdict::Pass if row.faster => "faster",
        Verdict::Pass => "pass",
        Verdict::Inconclusive => "open",
        Verdict::Regression => "SLOWER",
    };
    let (before, now) = (ns(row.baseline.median), ns(row.current.median));
    writeln!(
        out,
        "{style}{name:NAME$} {before:>10} {now:>10} {shift:>11}  {verdict}{style:#}"
    )?;
    if row.verdict == Verdict::Pass {
        return Ok(());
    }
    let interval = match (row.shift_low_ns, row.shift_high_ns) {
        (Some(low), Some(high)) => format!("{} to {}", signed(low), signed(high)),
        _ => "not measured in both sets".to_owned(),
    };
    let more = match (row.verdict, row.more_runs, &row.through) {
        (Verdict::Inconclusive, Some(more), _) => format!(", {more} more runs"),
        (Verdict::Inconclusive, None, _) => ", at the threshold".to_owned(),
        (_, _, Some(through)) => format!(", in {}", printable(through)),
        _ => String::new(),
    };
    let text = format!("  {interval}, p {}{more}", p(row.p));
    writeln!(out, "{QUIET}{}{QUIET:#}", cut(&text, WIDTH))
}

fn objectives(out: &mut dyn Write, objectives: &[Kept]) -> io::Result<()> {
    if !objectives.is_empty() {
        writeln!(out)?;
    }
    for kept in objectives {
        let objective = &kept.objective;
        let quantile = match objective.percent {
            50 => "median".to_owned(),
            percent => format!("p{percent}"),
        };
        let value = kept.value_ns.map_or_else(|| "not measured".to_owned(), ns);
        let text = format!(
            "objective {} {quantile} {value}, limit {}: {} of {} above it, {}",
            printable(&objective.name),
            time(objective.limit_ns),
            kept.above,
            kept.n,
            match kept.verdict {
                Verdict::Pass => "kept",
                Verdict::Inconclusive => "open",
                Verdict::Regression => "BROKEN",
            }
        );
        let style = style(kept.verdict);
        writeln!(out, "{style}{}{style:#}", cut(&text, WIDTH))?;
    }
    Ok(())
}

fn conclusion(out: &mut dyn Write, check: &Check) -> io::Result<()> {
    let style = style(check.verdict);
    writeln!(out, "\n{style}{}{style:#}", cut(&headline(check), WIDTH))?;
    let downtime = check
        .rows
        .iter()
        .find(|row| row.key == crate::sets::Key::whole("downtime"));
    if let Some((row, detectable)) = downtime.and_then(|row| Some((row, row.detectable_ns?))) {
        let share = match row.baseline.median {
            0 => String::new(),
            median => format!(" ({:.1} %)", detectable as f64 / median as f64 * 100.0),
        };
        let found = ns(detectable);
        let text = format!("9 of 10 such checks find a downtime that is longer by {found}{share};");
        writeln!(out, "{QUIET}{}", cut(&text, WIDTH))?;
        let settings = &check.settings;
        writeln!(
            out,
            "of equal sets, at most {:.1} % are called slower. The threshold is {}.{QUIET:#}",
            settings.alpha * 100.0,
            ns(row.threshold_ns)
        )?;
    }
    Ok(())
}

fn ns(ns: i64) -> String {
    time(u64::try_from(ns).unwrap_or(0))
}

fn p(p: f64) -> String {
    if p < 1e-4 {
        "< 0.0001".to_owned()
    } else {
        format!("{p:.4}")
    }
}

fn style(verdict: Verdict) -> Style {
    match verdict {
        Verdict::Pass => GOOD,
        Verdict::Inconclusive => OPEN,
        Verdict::Regression => BAD,
    }
}
