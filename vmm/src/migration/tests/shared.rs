//! RAM that is handed over and not copied: it is whoever's the guest is.

use super::super::settings::Mode;
use super::*;

fn byte(fake: &Fake, gpa: u64) -> u8 {
    let mut byte = [0];
    fake.ram.read(gpa, &mut byte).unwrap();
    byte[0]
}

fn hand_over(bench: &Bench, source: &Fake, target: &Fake) -> Outcome {
    bench.source.settings().set_mode(Mode::CprTransfer);
    let parameters = Parameters {
        verify_ram: true,
        ..Parameters::default()
    };
    bench.migrate(source, target, parameters, |uri| uri)
}

#[test]
fn ram_moves_without_a_page_being_sent() {
    let (source, target) = (Fake::source(), Fake::target());
    let outcome = hand_over(&Bench::new(), &source, &target);
    check(&source, &target, &outcome);
    assert_eq!(outcome.source.status, Some(MigrationStatus::Completed));
    for answer in [&outcome.source, &outcome.target] {
        assert_eq!(answer.blackout.as_ref().unwrap().mode, "cpr-transfer");
    }
    let ram = outcome.source.ram.unwrap();
    assert_eq!((ram.transferred, ram.normal, ram.duplicate), (0, 0, 0));
    target.ram.write(8, &[42]).unwrap();
    assert_eq!(byte(&source, 8), 42, "it is one memory");
}

#[test]
fn a_hand_over_that_fails_leaves_each_its_own_ram() {
    let faults: [fn(&mut Faults); 2] = [|f| f.load = true, |f| f.start = true];
    for fault in faults {
        let (source, target) = (Fake::source(), Fake::target().with(fault));
        let outcome = hand_over(&Bench::new(), &source, &target);
        check(&source, &target, &outcome);
        assert_eq!(outcome.source.status, Some(MigrationStatus::Failed));
        target.ram.write(8, &[42]).unwrap();
        assert_eq!(byte(&source, 8), 1, "the target can reach the guest's RAM");
    }
}

#[test]
fn ram_is_only_passed_where_it_can_be() {
    let bench = Bench::new();
    bench.source.settings().set_mode(Mode::CprTransfer);
    let path = bench.folder.path().join("file");
    let uri = Uri::File { path, offset: 0 };
    let source = Fake::source();
    assert!(bench.source.begin(Side::Source, uri.to_string(), None));
    let target = Target::new(uri, &mut Descriptors::default()).unwrap();
    outgoing::run(&source, target, &Parameters::default(), &bench.source);
    let error = bench.source.query().error_desc.unwrap();
    assert!(error.contains("it needs a unix socket"), "{error}");
    assert_eq!(source.run_state(), RunState::Running);
}
