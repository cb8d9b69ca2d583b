//! JUnit XML: one test a series. A slowdown is a failure; an answer that stays open is an error,
//! since a skipped test would look like a pass.

use std::io::{self, Write};

use quick_junit::{NonSuccessKind, Report, TestCase, TestCaseStatus, TestSuite};

use crate::gate::{Check, Row, Verdict, text};
use crate::report::units::{signed, time};

/// Writes the check.
///
/// # Errors
/// What `out` returns.
pub fn write(out: &mut dyn Write, check: &Check) -> io::Result<()> {
    let mut suite = TestSuite::new("blackout check");
    for row in check.rows.iter().filter(|row| row.judged) {
        let class = row
            .key
            .side
            .map_or_else(|| "blackout".to_owned(), |side| format!("blackout.{side}"));
        suite.add_test_case(case(&row.key.name, &class, row.verdict, || said(row)));
    }
    for kept in &check.objectives {
        let objective = &kept.objective;
        let name = format!("{}:p{}", objective.name, objective.percent);
        let said = || {
            let limit = time(objective.limit_ns);
            format!("{} of {} migrations are above {limit}", kept.above, kept.n)
        };
        suite.add_test_case(case(&name, "blackout.objective", kept.verdict, said));
    }
    let failures = &check.failures;
    let said = || {
        let (before, now) = (failures.baseline, failures.current);
        format!("{now} migrations failed, {before} in the baseline")
    };
    suite.add_test_case(case("migrations", "blackout", failures.verdict, said));
    suite.set_system_out(text::headline(check));
    let mut report = Report::new("blackout");
    report.add_test_suite(suite);
    let xml = report.to_string().map_err(io::Error::other)?;
    // The library counts skipped tests in the outermost element, too, where no schema has them.
    out.write_all(xml.replacen(" skipped=\"0\"", "", 1).as_bytes())
}

fn case(name: &str, class: &str, verdict: Verdict, said: impl FnOnce() -> String) -> TestCase {
    let failed = |kind, what: &str, said: String| {
        let mut status = TestCaseStatus::non_success(kind);
        status.set_type(what).set_message(said);
        status
    };
    let status = match verdict {
        Verdict::Pass => TestCaseStatus::success(),
        Verdict::Regression => failed(NonSuccessKind::Failure, "regression", said()),
        Verdict::Inconclusive => failed(NonSuccessKind::Error, "inconclusive", said()),
    };
    let mut case = TestCase::new(name, status);
    case.set_classname(class);
    case
}

fn said(row: &Row) -> String {
    let ns = |ns: i64| time(u64::try_from(ns).unwrap_or(0));
    let shift = row
        .shift_ns
        .map_or_else(|| "not measured".to_owned(), signed);
    let more = match (row.verdict, row.more_runs) {
        (Verdict::Inconclusive, Some(more)) => format!("; about {more} more runs would tell"),
        _ => String::new(),
    };
    format!(
        "median {} before, {} now: {shift}, threshold {}, p {:.4}{more}",
        ns(row.baseline.median),
        ns(row.current.median),
        ns(row.threshold_ns),
        row.p
    )
}
