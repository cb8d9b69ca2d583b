//! Bencher Metric Format, which bencher.dev keeps a history of: the current set's medians, with the
//! smallest value and the ninetieth percentile as bounds, in ns.

use std::collections::BTreeMap;
use std::io::{self, Write};

use serde::Serialize;

use crate::gate::Check;

#[derive(Serialize)]
struct Metrics {
    latency: Metric,
}

#[derive(Serialize)]
struct Metric {
    value: i64,
    lower_value: i64,
    upper_value: i64,
}

/// Writes the check.
///
/// # Errors
/// What `out` returns.
pub fn write(out: &mut dyn Write, check: &Check) -> io::Result<()> {
    let measured = check.rows.iter().filter(|row| row.current.n > 0);
    let benchmarks: BTreeMap<_, _> = measured
        .map(|row| {
            let latency = Metric {
                value: row.current.median,
                lower_value: row.current.min,
                upper_value: row.current.p90,
            };
            (row.key.to_string(), Metrics { latency })
        })
        .collect();
    serde_json::to_writer_pretty(&mut *out, &benchmarks)?;
    writeln!(out)
}
