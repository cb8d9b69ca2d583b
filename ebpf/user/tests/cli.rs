//! The program as a shell sees it: what goes where, and the exit codes.

use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use blackout::recording::{Frame, Header, Writer};

fn blackout(arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_blackout"));
    command.args(arguments).output().unwrap()
}

/// A recording of nothing; cut if it is not `finished`.
fn recording(path: &Path, finished: bool) -> String {
    let mut writer: Writer<File> = Writer::create(path, Header::default()).unwrap();
    writer
        .write(&Frame::Lost {
            since_ns: 0,
            at_ns: 1,
            count: 1,
        })
        .unwrap();
    if finished {
        writer.finish(2).unwrap();
    } else {
        writer.flush().unwrap();
    }
    path.display().to_string()
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap()
}

#[test]
fn help_teaches_and_succeeds() {
    for arguments in [
        &["--help"][..],
        &["report", "--help"],
        &["export", "chrome", "--help"],
    ] {
        let output = blackout(arguments);
        assert_eq!(output.status.code(), Some(0));
        assert!(output.stdout.len() > 400, "{}", text(&output.stdout));
        assert!(output.stderr.is_empty());
    }
}

#[test]
fn bad_arguments_are_3() {
    for arguments in [
        &["reprot"][..],
        &[],
        &["export", "vcd"],
        &["report", "--migration", "x"],
    ] {
        let output = blackout(arguments);
        assert_eq!(output.status.code(), Some(3), "{arguments:?}");
        assert!(output.stdout.is_empty());
        assert!(!output.stderr.is_empty());
    }
}

#[test]
fn an_unreadable_recording_is_3_and_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("none.rec");
    let output = blackout(&["report", path.to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(3));
    let said = text(&output.stderr);
    assert!(
        said.contains("none.rec") && said.contains("No such file"),
        "{said}"
    );
    assert_eq!(said.lines().count(), 1, "{said}");

    std::fs::write(&path, "BLACKOUT\u{1}\0\u{7f}").unwrap();
    let output = blackout(&["report", path.to_str().unwrap()]);
    assert_eq!(
        output.status.code(),
        Some(0),
        "a recording cut in its first frame is readable"
    );
    std::fs::write(&path, "no recording at all").unwrap();
    let output = blackout(&["export", "chrome", path.to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(3));
    assert!(
        text(&output.stderr).contains("is not a recording"),
        "{}",
        text(&output.stderr)
    );
}

#[test]
fn json_is_the_schema_and_nothing_else() {
    let folder = tempfile::tempdir().unwrap();
    let path = recording(&folder.path().join("a.rec"), true);
    let output = blackout(&["report", "--json", &path]);
    assert_eq!(output.status.code(), Some(0));
    let report: blackout::report::schema::Report = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report.schema, "blackout.report/1");
    assert!(report.migrations.is_empty());
}

#[test]
fn strict_stops_at_doubt() {
    let folder = tempfile::tempdir().unwrap();
    let path = recording(&folder.path().join("a.rec"), false);
    assert_eq!(blackout(&["report", &path]).status.code(), Some(0));
    assert_eq!(
        blackout(&["report", "--strict", &path]).status.code(),
        Some(1)
    );
}

#[test]
fn export_writes_where_it_is_told() {
    let folder = tempfile::tempdir().unwrap();
    let path = recording(&folder.path().join("a.rec"), true);
    let trace = folder.path().join("trace.json");
    let output = blackout(&["export", "chrome", &path, "-o", trace.to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    assert!(output.stdout.is_empty());
    let piped = blackout(&["export", "chrome", &path]);
    assert_eq!(piped.stdout, std::fs::read(&trace).unwrap());
    assert!(serde_json::from_slice::<serde_json::Value>(&piped.stdout).is_ok());
}

#[test]
fn top_shows_a_recording_without_rights_and_without_a_terminal() {
    let folder = tempfile::tempdir().unwrap();
    let path = recording(&folder.path().join("recording"), true);
    let output = blackout(&["top", "--replay", &path]);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    let screen = text(&output.stdout);
    assert!(
        screen.contains("1 lost") && screen.contains("VMs"),
        "{screen}"
    );
    assert!(!screen.contains('\x1b'), "{screen}");
    let missing = blackout(&["top", "--replay", "/nonexistent"]);
    assert_eq!(missing.status.code(), Some(3));
}

#[test]
fn top_draws_on_a_terminal_until_q() {
    let folder = tempfile::tempdir().unwrap();
    let path = recording(&folder.path().join("recording"), true);
    // A terminal that is no one's has no size, either.
    let program = env!("CARGO_BIN_EXE_blackout");
    let top = format!("stty rows 30 cols 110; exec {program} top --replay {path}");
    let script = Command::new("script")
        .args(["-qec", &top, "/dev/null"])
        .env("TERM", "xterm")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn();
    let Ok(mut script) = script else {
        println!("SKIP: top_draws_on_a_terminal_until_q: util-linux's script is missing");
        return;
    };
    let mut keys = script.stdin.take().unwrap();
    keys.write_all(b"q").unwrap();
    let output = script.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stdout));
    let screen = text(&output.stdout);
    // It takes the terminal over, draws, and gives it back as it was.
    for part in ["\x1b[?1049h", "Migrations", "\x1b[?1049l"] {
        assert!(screen.contains(part), "no {part:?} in {screen:?}");
    }
}
