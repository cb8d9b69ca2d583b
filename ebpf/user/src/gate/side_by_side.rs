//! `blackout compare`: two sets side by side, without a verdict. Lines are at most 80 columns wide;
//! colours are always written.

use std::io::{self, Write};

use anstyle::{AnsiColor, Style};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::compare::{self, Figures};
use crate::analysis::describe::printable;
use crate::report::text::WIDTH;
use crate::report::units::{cut, time};
use crate::sets::{Key, Nature, Samples};
use crate::stats::family;

/// The name of the schema of `blackout compare --json` and its version.
pub const SCHEMA: &str = "blackout.compare/1";

/// A difference that is chance with less than this probability is shown in colour.
const SIGNIFICANT: f64 = 0.01;

const TITLE: Style = Style::new().bold();
const QUIET: Style = Style::new().dimmed();
const SLOWER: Style = AnsiColor::Red.on_default().bold();
const FASTER: Style = AnsiColor::Green.on_default();

/// Columns of a series' name.
const NAME: usize = 32;

/// Two sets side by side.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Compared {
    /// [`SCHEMA`].
    pub schema: String,
    /// Migrations in the first set.
    pub a_migrations: usize,
    /// Migrations in the second.
    pub b_migrations: usize,
    /// The series, in call order.
    pub rows: Vec<Pair>,
}

/// A series in both sets. Times are ns.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Pair {
    /// Which.
    #[serde(flatten)]
    pub key: Key,
    /// What its time is spent on.
    pub nature: Nature,
    /// How deep it is in its side's tree.
    pub depth: usize,
    /// The first set.
    pub a: Figures,
    /// The second.
    pub b: Figures,
    /// By how much the second is slower: the Hodges–Lehmann estimate.
    pub shift_ns: Option<i64>,
    /// The lower end of its 95 % bootstrap interval.
    pub shift_low_ns: Option<i64>,
    /// The upper end.
    pub shift_high_ns: Option<i64>,
    /// The probability of such ranks, or clearer ones, in any series if none differs: two-sided
    /// Mann–Whitney test, Holm's correction.
    pub p: f64,
}

impl Compared {
    /// Compares `b` with `a`.
    pub fn new(a: &Samples, b: &Samples) -> Self {
        let comparisons = compare::compare(a, b);
        let p: Vec<_> = comparisons
            .iter()
            .map(|c| (2.0 * c.p_slower.min(c.p_faster)).min(1.0))
            .collect();
        let pairs = comparisons.iter().zip(family::holm(&p)).map(|(c, p)| Pair {
            key: c.key.clone(),
            nature: c.nature,
            depth: c.depth,
            a: Figures::of(&c.baseline),
            b: Figures::of(&c.current),
            shift_ns: c.shift.map(|shift| shift.estimate),
            shift_low_ns: c.shift.map(|shift| shift.low),
            shift_high_ns: c.shift.map(|shift| shift.high),
            p,
        });
        Self {
            schema: SCHEMA.to_owned(),
            a_migrations: a.migrations,
            b_migrations: b.migrations,
            rows: pairs.collect(),
        }
    }
}

/// Writes both.
///
/// # Errors
/// What `out` returns.
pub fn write(out: &mut dyn Write, compared: &Compared) -> io::Result<()> {
    let (a, b) = (compared.a_migrations, compared.b_migrations);
    writeln!(out, "{TITLE}A: {a} migrations, B: {b} migrations{TITLE:#}")?;
    let text = "medians; B's shift and its 95 % interval in percent of A; in colour where p < 0.01";
    writeln!(out, "{QUIET}{}{QUIET:#}", cut(text, WIDTH))?;
    let mut side = None;
    head(out, "whole migrations")?;
    for row in &compared.rows {
        if row.key.side != side {
            side = row.key.side;
            head(out, &side.map(|side| side.to_string()).unwrap_or_default())?;
        }
        line(out, row)?;
    }
    Ok(())
}

fn head(out: &mut dyn Write, title: &str) -> io::Result<()> {
    let columns = format!("{:>10} {:>10} {:>8} {:>16}", "A", "B", "shift", "interval");
    writeln!(
        out,
        "\n{TITLE}{title:NAME$}{TITLE:#} {QUIET}{columns}{QUIET:#}"
    )
}

fn line(out: &mut dyn Write, row: &Pair) -> io::Result<()> {
    let style = match row.shift_ns {
        Some(shift) if row.p < SIGNIFICANT && shift > 0 => SLOWER,
        Some(shift) if row.p < SIGNIFICANT && shift < 0 => FASTER,
        _ if row.nature == Nature::Wait => QUIET,
        _ => Style::new(),
    };
    let percent = |ns: Option<i64>| match (ns, row.a.median) {
        (Some(ns), median) if median > 0 => {
            let percent = ns as f64 / median as f64 * 100.0;
            if percent.abs() < 9_999.5 {
                format!("{percent:+.1}")
            } else {
                format!("{percent:+.0e}")
            }
        }
        (Some(ns), _) if ns > 0 => "new".to_owned(),
        _ => "–".to_owned(),
    };
    let figure = |figures: &Figures| match figures.n {
        0 => "–".to_owned(),
        _ => time(u64::try_from(figures.median).unwrap_or(0)),
    };
    let indent = row.depth.min(NAME / 4);
    let (width, name) = (NAME - indent, cut(&printable(&row.key.name), NAME - indent));
    let interval = format!(
        "{} … {}",
        percent(row.shift_low_ns),
        percent(row.shift_high_ns)
    );
    writeln!(
        out,
        "{:indent$}{style}{name:width$} {:>10} {:>10} {:>8} {interval:>16}{style:#}",
        "",
        figure(&row.a),
        figure(&row.b),
        percent(row.shift_ns),
    )
}
