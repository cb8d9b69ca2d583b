//! A textfile for Prometheus' node exporter, also valid OpenMetrics: figures that stay after the
//! migration's processes are gone. Times are seconds.

use std::io::{self, Write};

use crate::gate::compare::Figures;
use crate::gate::{Check, Verdict};
use crate::sets::{Key, Samples};

/// The families, each with its type and its help: the order in which they are written.
const FAMILIES: [(&str, &str, &str); 5] = [
    ("blackout_migrations", "gauge", "Migrations measured."),
    (
        "blackout_migrations_failed",
        "gauge",
        "Migrations that failed.",
    ),
    (
        "blackout_span_seconds",
        "summary",
        "Part of a span in the downtime, over the migrations of a set.",
    ),
    (
        "blackout_shift_seconds",
        "gauge",
        "By how much the current set is slower than the baseline.",
    ),
    (
        "blackout_verdict",
        "gauge",
        "0 pass, 1 regression, 2 inconclusive.",
    ),
];

/// Writes a check: both sets, the shifts and the verdicts.
///
/// # Errors
/// What `out` returns.
pub fn check(out: &mut dyn Write, check: &Check) -> io::Result<()> {
    let sets = [("baseline", &check.baseline), ("current", &check.current)];
    for (family, kind, help) in FAMILIES {
        head(out, family, kind, help)?;
        sets.iter()
            .try_for_each(|(name, set)| values(out, family, name, set))?;
        let judged = check.rows.iter().filter(|row| row.judged);
        match family {
            "blackout_shift_seconds" => {
                for row in judged {
                    if let Some(shift_ns) = row.shift_ns {
                        writeln!(
                            out,
                            "{family}{{{}}} {}",
                            labels(&row.key),
                            seconds(shift_ns)
                        )?;
                    }
                }
            }
            "blackout_verdict" => {
                for row in judged {
                    writeln!(
                        out,
                        "{family}{{{}}} {}",
                        labels(&row.key),
                        code(row.verdict)
                    )?;
                }
                // The whole check is no series.
                let all = labels(&Key::whole("check"));
                writeln!(out, "{family}{{{all}}} {}", code(check.verdict))?;
            }
            _ => {}
        }
    }
    writeln!(out, "# EOF")
}

/// Writes one set.
///
/// # Errors
/// What `out` returns.
pub fn samples(out: &mut dyn Write, samples: &Samples) -> io::Result<()> {
    for (family, kind, help) in FAMILIES.into_iter().take(3) {
        head(out, family, kind, help)?;
        values(out, family, "current", samples)?;
    }
    writeln!(out, "# EOF")
}

fn head(out: &mut dyn Write, family: &str, kind: &str, help: &str) -> io::Result<()> {
    writeln!(out, "# HELP {family} {help}\n# TYPE {family} {kind}")
}

/// A set's values of a family.
fn values(out: &mut dyn Write, family: &str, name: &str, set: &Samples) -> io::Result<()> {
    match family {
        "blackout_migrations" => writeln!(out, "{family}{{set=\"{name}\"}} {}", set.migrations),
        "blackout_migrations_failed" => {
            writeln!(out, "{family}{{set=\"{name}\"}} {}", set.left_out.failed)
        }
        "blackout_span_seconds" => {
            for series in &set.series {
                let sorted = series.sorted();
                let figures = Figures::of(&sorted);
                if figures.n == 0 {
                    continue;
                }
                let labels = labels(&series.key);
                let quantiles = [
                    ("0.5", figures.median),
                    ("0.9", figures.p90),
                    ("0.99", figures.p99),
                    ("1", figures.max),
                ];
                for (quantile, ns) in quantiles {
                    let value = seconds(ns);
                    let set = format!("set=\"{name}\",quantile=\"{quantile}\"");
                    writeln!(out, "{family}{{{labels},{set}}} {value}")?;
                }
                let sum: f64 = sorted.iter().map(|ns| seconds(*ns)).sum();
                let set = format!("set=\"{name}\"");
                writeln!(out, "{family}_sum{{{labels},{set}}} {sum}")?;
                writeln!(out, "{family}_count{{{labels},{set}}} {}", figures.n)?;
            }
            Ok(())
        }
        _ => Ok(()),
    }
}

fn labels(key: &Key) -> String {
    let side = key
        .side
        .map_or_else(|| "both".to_owned(), |side| side.to_string());
    let name = key
        .name
        .replace('\\', "\\\\")
        .replace('"', "\\\"")
        .replace('\n', "\\n");
    format!("side=\"{side}\",span=\"{name}\"")
}

fn seconds(ns: i64) -> f64 {
    ns as f64 / 1e9
}

fn code(verdict: Verdict) -> u8 {
    match verdict {
        Verdict::Pass => 0,
        Verdict::Regression => 1,
        Verdict::Inconclusive => 2,
    }
}
