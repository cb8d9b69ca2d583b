//! Recordings of two hosts, joined by `blackout merge`.

use std::fs;
use std::process::{Command, Output};

use blackout::analysis::{self, Loaded, View};
use blackout::recording::{Basis, Ending, Reader};
use blackout::report::schema::{Migration, Report};
use tempfile::TempDir;

use crate::tape::Tape;
use crate::{scenarios, silent};

/// What the destination's clock shows more, ns.
const OFFSET: u64 = 5_000_000_000;

/// Two recordings and their joint one.
struct Merged {
    folder: TempDir,
    output: Output,
}

impl Merged {
    fn of([source, destination]: [Vec<u8>; 2], options: &[&str]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = |name| folder.path().join(name);
        fs::write(path("source"), source).unwrap();
        fs::write(path("destination"), destination).unwrap();
        let mut merge = Command::new(env!("CARGO_BIN_EXE_blackout"));
        merge.arg("merge").args(options).arg("--output");
        merge.args(["joined", "source", "destination"].map(path));
        let output = merge.output().unwrap();
        Self { folder, output }
    }

    fn said(&self) -> &str {
        std::str::from_utf8(&self.output.stderr).unwrap()
    }

    fn recordings(&self) -> Vec<Loaded> {
        assert_eq!(self.output.status.code(), Some(0), "{}", self.said());
        let reader = Reader::open(&self.folder.path().join("joined")).unwrap();
        Loaded::read("joined".into(), reader).unwrap()
    }

    /// The only migration.
    fn migration(&self) -> Migration {
        let recordings = self.recordings();
        let mut report = Report::new(&analysis::find(&recordings));
        assert_eq!(report.migrations.len(), 1);
        report.migrations.remove(0)
    }
}

fn bytes(tapes: &[Tape; 2]) -> [Vec<u8>; 2] {
    [tapes[0].bytes(), tapes[1].bytes()]
}

#[test]
fn one_file_says_what_two_said() {
    let tapes = scenarios::two_hosts();
    let merged = Merged::of(bytes(&tapes), &["--strict"]);
    let apart: Vec<_> = tapes
        .iter()
        .map(|tape| crate::report::load("joined", &tape.bytes()))
        .collect();
    let expected = Report::new(&analysis::find(&apart)).migrations.remove(0);
    let migration = merged.migration();
    assert_eq!(migration, expected);
    let clock = migration.clock.unwrap();
    assert_eq!(clock.basis, Basis::Samples);
    assert!(clock.offset_ns.abs_diff(OFFSET as i64) <= migration.clock_error_ns.unwrap());
    assert!(
        merged.said().contains("1 of them from both sides"),
        "{}",
        merged.said()
    );
}

#[test]
fn a_given_offset_outranks_the_samples_and_is_shown_with_its_error() {
    let options = ["--offset", "5000001000", "--error", "2000"];
    let merged = Merged::of(bytes(&scenarios::two_hosts()), &options);
    let migration = merged.migration();
    let clock = migration.clock.unwrap();
    assert_eq!(
        (clock.offset_ns, clock.basis),
        (5_000_001_000, Basis::Given)
    );
    assert_eq!(migration.clock_error_ns, Some(2_000));
    let recordings = merged.recordings();
    let mut text = anstream::StripStream::new(Vec::new());
    blackout::report::text::write(&mut text, &recordings, &analysis::find(&recordings)).unwrap();
    let text = String::from_utf8(text.into_inner()).unwrap();
    assert!(text.contains("± 2.0 µs"), "{text}");
    let mut trace = Vec::new();
    blackout::export::chrome::write(&mut trace, &recordings, &analysis::find(&recordings)).unwrap();
    let trace: serde_json::Value = serde_json::from_slice(&trace).unwrap();
    let second = &trace["otherData"]["recordings"][1];
    assert_eq!(
        (&second["basis"], &second["error_ns"]),
        (&"given".into(), &2000.into())
    );
}

#[test]
fn effects_before_their_causes_are_told() {
    // The destination is said to be 3 ms further ahead than it is: all that it did moves back.
    let options = ["--offset", "5003000000", "--error", "1000", "--strict"];
    let merged = Merged::of(bytes(&scenarios::two_hosts()), &options);
    assert_eq!(merged.output.status.code(), Some(1), "{}", merged.said());
    let said = merged.said();
    assert!(said.contains("impossible order: "), "{said}");
    assert!(
        said.contains("of the source's messages arrived before they were sent"),
        "{said}"
    );
    // Within the error that was given nothing is impossible.
    let options = ["--offset", "5003000000", "--error", "3100000", "--strict"];
    let merged = Merged::of(bytes(&scenarios::two_hosts()), &options);
    assert_eq!(merged.output.status.code(), Some(0), "{}", merged.said());
}

#[test]
fn a_migration_between_hosts_of_which_no_monitor_told() {
    let tape = silent::migration(600);
    let one = Report::new(&analysis::find(&[crate::report::load(
        "one",
        &tape.bytes(),
    )]));
    let source = tape.only(silent::SOURCE).bytes();
    let destination = tape.on_host("other", silent::DESTINATION, OFFSET).bytes();
    let merged = Merged::of(
        [source, destination],
        &["--offset", "5000000000", "--error", "9"],
    );
    let migration = merged.migration();
    assert_eq!(migration.view, View::Kernel);
    assert_eq!(migration.downtime_ns, one.migrations[0].downtime_ns);
    assert_eq!(migration.blackout_ns, one.migrations[0].blackout_ns);
    assert_eq!(migration.clock_error_ns, Some(9));
}

#[test]
fn a_cut_recording_is_joined_as_it_is() {
    let [source, destination] = bytes(&scenarios::two_hosts());
    let cut = source[..source.len() * 3 / 4].to_vec();
    let merged = Merged::of([cut, destination], &["--offset", "5000000000"]);
    let [source, destination] = &merged.recordings()[..] else {
        panic!("not two");
    };
    assert!(matches!(source.ending, Ending::Cut { offset } if offset > 0));
    assert_eq!(destination.ending, Ending::Finished);
}

#[test]
fn what_is_joined_already_is_refused() {
    let [source, destination] = bytes(&scenarios::two_hosts());
    let merged = Merged::of([source, destination.clone()], &[]);
    let joined = fs::read(merged.folder.path().join("joined")).unwrap();
    let again = Merged::of([joined, destination], &["--offset", "1"]);
    assert_eq!(again.output.status.code(), Some(3));
    assert!(
        again.said().contains("is of two hosts already"),
        "{}",
        again.said()
    );
}
