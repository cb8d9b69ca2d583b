//! What CI systems and monitoring read, as their own readers have it.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

use blackout::gate::formats::{bencher, github, junit, openmetrics};
use blackout::gate::side_by_side::Compared;
use blackout::gate::{Check, Settings};
use blackout::report::schema::{Migration, Report, SCHEMA};
use blackout::sets::Samples;
use blackout::sets::collect::Collector;
use schemars::Schema;
use serde_json::Value;

use crate::migrations;

fn set(migrations: &[Migration]) -> Samples {
    let mut set = Collector::new(false);
    for migration in migrations {
        set.add(migration).unwrap();
    }
    set.finish(Some("abc".to_owned()))
}

/// A regression, with a handler whose name is hostile to every format.
fn check() -> Check {
    let hostile = |mut migrations: Vec<Migration>| {
        for migration in &mut migrations {
            migration.spans[4].label = "drain \"<b>|&\\]]>\u{1}\u{1b}[31m\n%0A::error".to_owned();
        }
        migrations[0].status = "failed".to_owned();
        set(&migrations)
    };
    let settings = Settings {
        slo: vec!["downtime:p90=1ms".parse().unwrap()],
        ..Settings::default()
    };
    Check::new(
        hostile(migrations(20, 50_000, 1)),
        hostile(migrations(20, 60_000, 2)),
        settings,
    )
}

fn written(write: impl FnOnce(&mut Vec<u8>) -> std::io::Result<()>) -> String {
    let mut out = Vec::new();
    write(&mut out).unwrap();
    String::from_utf8(out).unwrap()
}

/// Runs a Python program on `input`; `None`, with a line that `cargo xtask test` counts, where
/// there is no such interpreter.
fn python(program: &str, input: &str) -> Option<String> {
    let Some(python) = std::env::var_os("BLACKOUT_PYTHON") else {
        let test = std::thread::current().name().unwrap_or("?").to_owned();
        println!("SKIP: {test}: BLACKOUT_PYTHON is not set");
        return None;
    };
    let mut child = Command::new(python)
        .args(["-c", program])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    child
        .stdin
        .take()
        .unwrap()
        .write_all(input.as_bytes())
        .unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success());
    Some(String::from_utf8(output.stdout).unwrap())
}

/// Holds the file `schemas/NAME` against the types, and `document` against the file.
fn holds(name: &str, schema: &Schema, document: &Value) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("schemas")
        .join(name);
    let generated = serde_json::to_string_pretty(schema).unwrap() + "\n";
    if std::env::var_os("BLESS").is_some() {
        fs::write(&path, &generated).unwrap();
    }
    let published = fs::read_to_string(&path).unwrap();
    assert_eq!(
        published, generated,
        "{name} is not what the types say; BLESS=1 rewrites it"
    );
    let schema: Value = serde_json::from_str(&published).unwrap();
    let validator = jsonschema::validator_for(&schema).unwrap();
    let errors: Vec<_> = validator
        .iter_errors(document)
        .map(|error| error.to_string())
        .collect();
    assert!(errors.is_empty(), "{name}: {errors:?}");
    assert!(!validator.is_valid(&Value::from(1)));
}

#[test]
fn json_is_as_the_published_schemas_say() {
    let report = Report {
        schema: SCHEMA.to_owned(),
        migrations: migrations(2, 50_000, 1),
    };
    let check = check();
    let compared = Compared::new(&check.baseline, &check.current);
    let value = |json: Result<Value, _>| json.unwrap();
    let documents = [
        (
            "report.json",
            schemars::schema_for!(Report),
            value(serde_json::to_value(&report)),
        ),
        (
            "samples.json",
            schemars::schema_for!(Samples),
            value(serde_json::to_value(&check.current)),
        ),
        (
            "check.json",
            schemars::schema_for!(Check),
            value(serde_json::to_value(&check)),
        ),
        (
            "compare.json",
            schemars::schema_for!(Compared),
            value(serde_json::to_value(&compared)),
        ),
    ];
    for (name, schema, document) in documents {
        holds(name, &schema, &document);
    }
    let again: Check = serde_json::from_str(&serde_json::to_string(&check).unwrap()).unwrap();
    assert_eq!(again.verdict, check.verdict);
}

#[test]
fn junit_is_read_with_every_verdict() {
    let check = check();
    let xml = written(|out| junit::write(out, &check));
    let report = quick_junit::Report::deserialize_from_str(&xml).unwrap();
    let judged = check.rows.iter().filter(|row| row.judged).count();
    assert_eq!(report.tests, judged + 2);
    assert!(report.failures >= 3, "{xml}");
    let program = "import sys, junitparser as j\n\
                   x = j.JUnitXml.fromstring(sys.stdin.buffer.read())\n\
                   cases = [c for s in x for c in s]\n\
                   print(len(cases), sum(isinstance(r, j.Failure) for c in cases for r in c.result))";
    let Some(said) = python(program, &xml) else {
        return;
    };
    assert_eq!(said.trim(), format!("{} {}", judged + 2, report.failures));
}

#[test]
fn junit_is_as_its_schema_says() {
    let valid = |xml: &str| {
        let mut command = Command::new("xmllint");
        command.args(["--noout", "--schema", "tests/gate/junit.xsd", "-"]);
        command.current_dir(env!("CARGO_MANIFEST_DIR"));
        let command = command.stdin(Stdio::piped()).stderr(Stdio::piped());
        let mut child = match command.spawn() {
            Ok(child) => child,
            Err(error) => {
                println!("SKIP: junit_is_as_its_schema_says: xmllint: {error}");
                return None;
            }
        };
        let mut stdin = child.stdin.take().unwrap();
        stdin.write_all(xml.as_bytes()).unwrap();
        drop(stdin);
        let output = child.wait_with_output().unwrap();
        Some((output.status.success(), output))
    };
    let xml = written(|out| junit::write(out, &check()));
    let Some((is_valid, said)) = valid(&xml) else {
        return;
    };
    assert!(is_valid, "{said:?}");
    let foreign = xml.replacen("<testsuites ", "<testsuites skipped=\"0\" ", 1);
    assert!(
        !valid(&foreign).unwrap().0,
        "the schema refuses what it does not have"
    );
}

#[test]
fn prometheus_reads_the_textfile() {
    let check = check();
    let program = "import sys\n\
                   from prometheus_client.parser import text_string_to_metric_families as text\n\
                   from prometheus_client.openmetrics.parser import text_string_to_metric_families as om\n\
                   t = sys.stdin.read()\n\
                   a, b = [[(s.name, s.labels, s.value) for f in p(t) for s in f.samples] for p in (text, om)]\n\
                   assert a == b\n\
                   print(len(a), [float(v) for n, l, v in a if n == 'blackout_verdict' and l['span'] == 'check'][:1])";
    let text = written(|out| openmetrics::check(out, &check));
    let lines = text.lines().filter(|line| !line.starts_with('#')).count();
    let Some(said) = python(program, &text) else {
        return;
    };
    assert_eq!(said.trim(), format!("{lines} [1.0]"));
    let text = written(|out| openmetrics::samples(out, &check.current));
    assert!(python(program, &text).unwrap().ends_with("[]\n"));
}

#[test]
fn bencher_gets_the_medians() {
    let check = check();
    let text = written(|out| bencher::write(out, &check));
    type Metric = BTreeMap<String, BTreeMap<String, f64>>;
    let benchmarks: BTreeMap<String, Metric> = serde_json::from_str(&text).unwrap();
    let downtime = &benchmarks["downtime"]["latency"];
    let row = &check.rows[0];
    assert!((downtime["value"] - row.current.median as f64).abs() < 1e-9);
    assert!(downtime["lower_value"] <= downtime["value"]);
    assert!(downtime["value"] <= downtime["upper_value"]);
}

#[test]
fn github_gets_a_summary_and_annotations() {
    let check = check();
    let summary = written(|out| github::summary(out, &check));
    assert!(
        summary.starts_with("## ❌ Blackout\n\nregression: "),
        "{summary}"
    );
    assert!(
        !summary.contains("<b>") && !summary.contains('\u{1b}'),
        "{summary}"
    );
    // Each table's rows have as many cells as its head.
    for line in summary.lines().filter(|line| line.starts_with('|')) {
        assert_eq!(line.replace("\\|", "").matches('|').count(), 7, "{line}");
    }
    let annotations = written(|out| github::annotations(out, &check));
    for line in annotations.lines() {
        assert!(line.starts_with("::error title=Blackout"), "{annotations}");
    }
    assert!(
        annotations.contains("vm_state_handler its main is slower by +"),
        "{annotations}"
    );
}
