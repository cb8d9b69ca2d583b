//! `blackout check` and `blackout report --summary` as a shell sees them.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use blackout::gate::{Check, Verdict};
use blackout::report::schema::{Migration, Report, SCHEMA};

use crate::migrations;

pub(crate) fn blackout(arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_blackout"));
    command.args(arguments).output().unwrap()
}

pub(crate) fn report(folder: &Path, name: &str, migrations: Vec<Migration>) -> String {
    let path = folder.join(name);
    let report = Report {
        schema: SCHEMA.to_owned(),
        migrations,
    };
    fs::write(&path, serde_json::to_vec(&report).unwrap()).unwrap();
    path.display().to_string()
}

fn code(output: &Output) -> Option<i32> {
    output.status.code()
}

#[test]
fn each_verdict_has_its_exit_code() {
    let folder = tempfile::tempdir().unwrap();
    let base = report(folder.path(), "base.json", migrations(20, 50_000, 1));
    let same = report(folder.path(), "same.json", migrations(20, 50_000, 2));
    let slow = report(folder.path(), "slow.json", migrations(20, 60_000, 2));
    let few = report(folder.path(), "few.json", migrations(3, 50_000, 2));
    let check = |current: &str| blackout(&["check", "--baseline", &base, "--current", current]);
    assert_eq!(code(&check(&same)), Some(0));
    assert_eq!(code(&check(&slow)), Some(1));
    assert_eq!(code(&check(&few)), Some(2));
    assert_eq!(code(&check("none.json")), Some(3));
    // A pipe gets no colours.
    assert!(!check(&slow).stdout.contains(&0x1b));
}

#[test]
fn json_has_the_verdicts_and_the_samples() {
    let folder = tempfile::tempdir().unwrap();
    let base = report(folder.path(), "base.json", migrations(20, 50_000, 1));
    let slow = report(folder.path(), "slow.json", migrations(20, 60_000, 2));
    let output = blackout(&["check", "--json", "--baseline", &base, "--current", &slow]);
    let check: Check = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(
        (check.schema.as_str(), check.verdict),
        ("blackout.check/1", Verdict::Regression)
    );
    assert_eq!(
        (check.baseline.migrations, check.current.migrations),
        (20, 20)
    );
}

#[test]
fn flags_go_over_the_file() {
    let folder = tempfile::tempdir().unwrap();
    let base = report(folder.path(), "base.json", migrations(20, 50_000, 1));
    let slow = report(folder.path(), "slow.json", migrations(20, 60_000, 2));
    let config = folder.path().join("gate.toml");
    fs::write(&config, "absolute = '50us'\nslo = ['downtime=1s']\n").unwrap();
    let config = config.to_str().unwrap();
    let sets = [
        "check",
        "--baseline",
        &base,
        "--current",
        &slow,
        "--config",
        config,
    ];
    assert_eq!(code(&blackout(&sets)), Some(0));
    assert_eq!(
        code(&blackout(&[&sets[..], &["--absolute", "1us"]].concat())),
        Some(1)
    );
    fs::write(folder.path().join("gate.toml"), "absolut = '50us'\n").unwrap();
    let output = blackout(&sets);
    assert_eq!(code(&output), Some(3));
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(
        said.contains("gate.toml") && said.contains("absolut"),
        "{said}"
    );
}

#[test]
fn a_summary_is_a_baseline() {
    let folder = tempfile::tempdir().unwrap();
    let base = report(folder.path(), "base.json", migrations(20, 50_000, 1));
    let slow = report(folder.path(), "slow.json", migrations(20, 60_000, 2));
    let output = blackout(&["report", "--summary", "--json", "--commit", "abc", &base]);
    assert_eq!(code(&output), Some(0));
    let samples = folder.path().join("samples.json");
    fs::write(&samples, output.stdout).unwrap();
    let samples = samples.to_str().unwrap();
    let output = blackout(&["check", "--baseline", samples, "--current", &slow]);
    assert_eq!(code(&output), Some(1));

    let output = blackout(&["report", "--summary", &base]);
    let text = String::from_utf8(output.stdout).unwrap();
    for line in text.lines() {
        assert!(line.chars().count() <= 80, "{line}");
    }
    assert!(text.contains("vm_state_handler its main"), "{text}");
}

#[test]
fn damaged_sets_are_3_and_named() {
    let folder = tempfile::tempdir().unwrap();
    let base = report(folder.path(), "base.json", migrations(4, 50_000, 1));
    let path = folder.path().join("damaged.json");
    let damaged = path.to_str().unwrap();
    for text in [
        "",
        "{",
        "{}",
        "[]",
        "{\"schema\": \"blackout.samples/1\"}",
        "{\"schema\": 7}",
    ] {
        fs::write(&path, text).unwrap();
        let output = blackout(&["check", "--baseline", &base, "--current", damaged]);
        assert_eq!(code(&output), Some(3), "{text}");
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(said.contains("damaged.json"), "{text}: {said}");
        assert_eq!(said.lines().count(), 1, "{said}");
    }
}

#[test]
fn files_for_ci_are_written_beside_the_answer() {
    let folder = tempfile::tempdir().unwrap();
    let base = report(folder.path(), "base.json", migrations(20, 50_000, 1));
    let slow = report(folder.path(), "slow.json", migrations(20, 60_000, 2));
    let formats = ["json", "junit", "openmetrics", "bencher", "markdown"];
    let file = |format: &str| folder.path().join(format!("out.{format}"));
    let outs = formats.map(|format| format!("--out={format}={}", file(format).display()));
    let mut arguments = vec!["check", "--baseline", &base, "--current", &slow];
    arguments.extend(outs.iter().map(String::as_str));
    assert_eq!(code(&blackout(&arguments)), Some(1));
    for format in formats {
        assert!(fs::metadata(file(format)).unwrap().len() > 100, "{format}");
    }
    // An older summary stays where it is.
    let summary = folder.path().join("summary.md");
    fs::write(&summary, "before\n").unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_blackout"))
        .args(["check", "--github", "--baseline", &base, "--current", &slow])
        .env("GITHUB_STEP_SUMMARY", &summary)
        .output()
        .unwrap();
    assert_eq!(code(&output), Some(1));
    assert!(
        fs::read_to_string(&summary)
            .unwrap()
            .starts_with("before\n## ❌")
    );
    assert!(
        String::from_utf8(output.stdout)
            .unwrap()
            .contains("\n::error title=Blackout::")
    );
    let output = blackout(&[
        "check",
        "--baseline",
        &base,
        "--current",
        &slow,
        "--out",
        "vcd=x",
    ]);
    assert_eq!(code(&output), Some(3));
}

#[test]
fn two_sets_are_shown_side_by_side() {
    let folder = tempfile::tempdir().unwrap();
    let base = report(folder.path(), "base.json", migrations(20, 50_000, 1));
    let slow = report(folder.path(), "slow.json", migrations(20, 60_000, 2));
    let output = blackout(&["compare", &base, &slow]);
    assert_eq!(code(&output), Some(0));
    let text = String::from_utf8(output.stdout).unwrap();
    for line in text.lines() {
        assert!(line.chars().count() <= 80, "{line}");
    }
    let handler = text
        .lines()
        .find(|line| line.contains("vm_state_handler its main"));
    assert!(handler.unwrap().contains("+1"), "{text}");
    let output = blackout(&["compare", "--json", &base, &slow]);
    let json: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(json["schema"], "blackout.compare/1");
}
