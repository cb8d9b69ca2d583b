//! Streams that nobody answers: what is saved can be taken in, and what is not whole never is.

use std::fs;
use std::os::fd::OwnedFd;
use std::path::Path;

use super::super::settings::Capability;
use super::*;

const LIMIT: Duration = Duration::from_secs(20);

fn run_source(bench: &Bench, source: &Fake, uri: Uri, descriptors: &mut Descriptors) {
    let total = source.ram.size();
    assert!(
        bench
            .source
            .begin(Side::Source, uri.to_string(), Some(total))
    );
    let target = Target::new(uri, descriptors).unwrap();
    outgoing::run(source, target, &Parameters::default(), &bench.source);
}

fn run_target(bench: &Bench, target: &Fake, uri: &Uri, descriptors: &mut Descriptors) {
    assert!(bench.target.begin(Side::Destination, uri.to_string(), None));
    let listener = Listener::bind(uri, descriptors, Plaintext::Refused).unwrap();
    let patience = Patience::default();
    incoming::run(target, listener, &uri.to_string(), patience, &bench.target);
}

fn outcome(bench: &Bench) -> Outcome {
    Outcome {
        source: bench.source.query(),
        target: bench.target.query(),
    }
}

fn completed(bench: &Bench, source: &Fake, target: &Fake) {
    let outcome = outcome(bench);
    check(source, target, &outcome);
    assert_eq!(outcome.source.status, Some(MigrationStatus::Completed));
    assert_eq!(outcome.target.status, Some(MigrationStatus::Completed));
    assert_eq!(outcome.source.downtime, None, "nobody says when it ended");
}

fn file(path: &Path, offset: u64) -> Uri {
    let path = path.to_owned();
    Uri::File { path, offset }
}

#[test]
fn a_guest_is_saved_and_restored_by_files_and_commands() {
    let bench = Bench::new();
    let path = bench.folder.path().join("guest");
    let exec = |command: String| Uri::Exec(command);
    let ways = [
        (file(&path, 0), file(&path, 0)),
        (file(&path, 5), file(&path, 5)),
        (
            exec(format!("gzip -c > {}", path.display())),
            exec(format!("gzip -dc {}", path.display())),
        ),
    ];
    for (to, from) in ways {
        let (source, target) = (Fake::source(), Fake::target());
        run_source(&bench, &source, to, &mut Descriptors::default());
        run_target(&bench, &target, &from, &mut Descriptors::default());
        completed(&bench, &source, &target);
    }
}

/// Whoever saves there gives pages places of their own.
fn mapped() -> Bench {
    let bench = Bench::new();
    let settings = bench.source.settings();
    settings.set_capabilities(&[(Capability::MappedRam, true)]);
    bench
}

#[test]
fn pages_with_places_of_their_own_are_saved_once_each() {
    let bench = mapped();
    let path = bench.folder.path().join("guest");
    for offset in [0, 5, 3 << 20] {
        let (source, target) = (Fake::source(), Fake::target());
        let uri = file(&path, offset);
        run_source(&bench, &source, uri.clone(), &mut Descriptors::default());
        run_target(&bench, &target, &uri, &mut Descriptors::default());
        completed(&bench, &source, &target);
        let most = offset + (3 << 20) + source.ram.size();
        assert!(fs::metadata(&path).unwrap().len() < most);
    }

    // Of a file that is damaged, nothing else comes than the guest or nothing.
    let path = bench.folder.path().join("damaged");
    let source = Fake::source();
    run_source(&bench, &source, file(&path, 0), &mut Descriptors::default());
    let whole = fs::read(&path).unwrap();
    let (mut refused, step) = (0, whole.len() / 60);
    for at in (0..whole.len()).step_by(step).chain([whole.len() - 1]) {
        for cut in [false, true] {
            let mut bytes = whole.clone();
            bytes[at] ^= 4;
            bytes.truncate(if cut { at } else { whole.len() });
            fs::write(&path, bytes).unwrap();
            let target = Fake::target();
            run_target(
                &bench,
                &target,
                &file(&path, 0),
                &mut Descriptors::default(),
            );
            match bench.target.query().status {
                Some(MigrationStatus::Completed) => {
                    assert!(!cut, "byte {at}");
                    let sums = [&target, &source].map(|vm| vm.ram.checksum().unwrap());
                    assert_eq!(sums[0], sums[1], "byte {at}");
                }
                _ => refused += 1,
            }
        }
    }
    assert!(refused > 60, "{refused}");
}

#[test]
fn half_a_guest_is_not_followed_by_the_end_of_another() {
    let bench = mapped();
    let path = bench.folder.path().join("guest");
    let uri = file(&path, 0);
    run_source(
        &bench,
        &Fake::source(),
        uri.clone(),
        &mut Descriptors::default(),
    );
    let whole = fs::metadata(&path).unwrap().len();
    // The same file again, which is not cut when it is opened by somebody else.
    let again = fs::OpenOptions::new().read(true).write(true).open(&path);
    let mut descriptors = Descriptors::default();
    descriptors.pass(again.unwrap().into());
    descriptors.name("way".into()).unwrap();
    let source = Fake::source().with(|f| f.slow = Duration::from_secs(1));
    thread::scope(|scope| {
        let way = Uri::Fd("way".into());
        let saving = scope.spawn(|| run_source(&bench, &source, way, &mut descriptors));
        let began = std::time::Instant::now();
        while fs::metadata(&path).unwrap().len() >= whole {
            assert!(began.elapsed() < LIMIT && !saving.is_finished());
        }
    });
}

#[test]
fn pages_have_places_in_files_only() {
    let bench = mapped();
    let path = bench.folder.path().join("guest");
    let source = Fake::source();
    let (_reader, writer) = io::pipe().unwrap();
    let appended = fs::OpenOptions::new().append(true).create(true).open(&path);
    for fd in [OwnedFd::from(writer), appended.unwrap().into()] {
        let mut descriptors = Descriptors::default();
        descriptors.pass(fd);
        descriptors.name("way".into()).unwrap();
        run_source(&bench, &source, Uri::Fd("way".into()), &mut descriptors);
        let error = bench.source.query().error_desc.unwrap();
        assert!(error.starts_with("mapped-ram needs a file"), "{error}");
        assert_eq!(source.run_state(), RunState::Running);
    }

    run_source(&bench, &source, file(&path, 0), &mut Descriptors::default());
    let cat = Uri::Exec(format!("cat {}", path.display()));
    run_target(&bench, &Fake::target(), &cat, &mut Descriptors::default());
    let error = bench.target.query().error_desc.unwrap();
    assert!(error.contains("saved with mapped-ram"), "{error}");
}

#[test]
fn a_guest_goes_through_a_pipe_that_both_were_given() {
    let bench = Bench::new();
    let (reader, writer) = io::pipe().unwrap();
    let (source, target) = (Fake::source(), Fake::target());
    let named = |fd: OwnedFd| {
        let mut descriptors = Descriptors::default();
        descriptors.pass(fd);
        descriptors.name("way".into()).unwrap();
        descriptors
    };
    let uri = Uri::Fd("way".into());
    thread::scope(|scope| {
        scope.spawn(|| run_target(&bench, &target, &uri, &mut named(reader.into())));
        run_source(&bench, &source, uri.clone(), &mut named(writer.into()));
    });
    completed(&bench, &source, &target);
}

#[test]
fn a_connected_socket_that_was_given_is_answered() {
    let bench = Bench::new();
    let (here, there) = std::os::unix::net::UnixStream::pair().unwrap();
    here.set_nonblocking(true).unwrap();
    let (source, target) = (Fake::source(), Fake::target());
    let named = |fd: OwnedFd| {
        let mut descriptors = Descriptors::default();
        descriptors.pass(fd);
        descriptors.name("way".into()).unwrap();
        descriptors
    };
    let uri = Uri::Fd("way".into());
    thread::scope(|scope| {
        scope.spawn(|| run_target(&bench, &target, &uri, &mut named(there.into())));
        run_source(&bench, &source, uri.clone(), &mut named(here.into()));
    });
    let outcome = outcome(&bench);
    check(&source, &target, &outcome);
    assert!(outcome.source.downtime.is_some(), "{:?}", outcome.source);
}

#[test]
fn a_file_that_is_cut_or_damaged_anywhere_is_no_guest() {
    let bench = Bench::new();
    let path = bench.folder.path().join("guest");
    run_source(
        &bench,
        &Fake::source(),
        file(&path, 0),
        &mut Descriptors::default(),
    );
    let whole = fs::read(&path).unwrap();
    for at in (0..whole.len())
        .step_by(whole.len() / 40)
        .chain([whole.len() - 1])
    {
        for damaged in [whole[..at].to_vec(), {
            let mut bytes = whole.clone();
            bytes[at] ^= 4;
            bytes
        }] {
            fs::write(&path, damaged).unwrap();
            let target = Fake::target();
            run_target(
                &bench,
                &target,
                &file(&path, 0),
                &mut Descriptors::default(),
            );
            let answer = bench.target.query();
            assert_eq!(answer.status, Some(MigrationStatus::Failed), "byte {at}");
            assert!(!target.run_state().is_running());
        }
    }
}

#[test]
fn a_stream_that_waits_for_answers_is_refused_from_a_file() {
    let bench = Bench::new();
    let path = bench.folder.path().join("recording");
    let terms = super::super::stream::message::Terms {
        answered: true,
        shared: false,
        lanes: 0,
        mapped: None,
    };
    let mut writer = super::super::stream::writer::FrameWriter::new(Vec::new());
    writer.preface().unwrap();
    writer
        .send(&Fake::source().shape.hello(1, [0; 16], terms))
        .unwrap();
    fs::write(&path, writer.into_inner()).unwrap();
    let target = Fake::target();
    run_target(
        &bench,
        &target,
        &file(&path, 0),
        &mut Descriptors::default(),
    );
    let error = bench.target.query().error_desc.unwrap();
    assert!(error.contains("can't come from a file"), "{error}");
}

#[test]
fn a_save_that_fails_leaves_the_guest_running_and_no_file() {
    let bench = Bench::new();
    let path = bench.folder.path().join("guest");
    let faults: [fn(&mut Faults); 2] = [|f| f.save = true, |f| f.stop = true];
    for fault in faults {
        let source = Fake::source().with(fault);
        run_source(&bench, &source, file(&path, 0), &mut Descriptors::default());
        assert_eq!(bench.source.query().status, Some(MigrationStatus::Failed));
        assert_eq!(source.run_state(), RunState::Running);
        assert_eq!(fs::metadata(&path).unwrap().len(), 0);
    }
}

#[test]
fn a_command_that_fails_before_the_end_returns_the_guest_and_after_it_nobody_knows() {
    let bench = Bench::new();
    let source = Fake::source();
    let early = Uri::Exec("head -c 10 >/dev/null".into());
    let slow = source.clone().with(|f| f.slow = Duration::from_millis(300));
    run_source(&bench, &slow, early, &mut Descriptors::default());
    assert_eq!(bench.source.query().status, Some(MigrationStatus::Failed));
    assert_eq!(source.run_state(), RunState::Running);

    let late = Uri::Exec("cat >/dev/null; exit 1".into());
    run_source(&bench, &source, late, &mut Descriptors::default());
    let answer = bench.source.query();
    assert_eq!(answer.status, Some(MigrationStatus::Unknown));
    let error = answer.error_desc.unwrap();
    assert!(error.contains("ended with exit status: 1"), "{error}");
    assert_eq!(source.run_state(), RunState::Postmigrate);
}

#[test]
fn a_save_that_is_stuck_can_be_cancelled() {
    let bench = Bench::new();
    let source = Fake::source();
    // More than a pipe holds.
    source.lock().devices[1] = vec![4; 1 << 20];
    let stuck = Uri::Exec("sleep 1000".into());
    thread::scope(|scope| {
        scope.spawn(|| run_source(&bench, &source, stuck, &mut Descriptors::default()));
        thread::sleep(Duration::from_millis(300));
        bench.source.cancel();
    });
    let answer = bench.source.query();
    assert_eq!(
        answer.status,
        Some(MigrationStatus::Cancelled),
        "{answer:?}"
    );
    assert!(answer.total_time.unwrap() < LIMIT.as_millis() as u64);
    assert_eq!(source.run_state(), RunState::Running);
}
