//! Which edge of KVM_RUN counts. The rest is in the golden recordings.

use super::*;

const STOP: i64 = 1_000;

#[test]
fn the_first_run_is_the_ioctls_edge_behind_the_probe() {
    let first = Vcpu {
        first_runs: vec![1_500],
        first_enter: Some(1_503),
        ..Vcpu::default()
    };
    assert_eq!(entry(&first, STOP), Some(1_503));
}

#[test]
fn a_call_of_kvm_run_before_the_probe_ran_no_guest() {
    // As a monitor does to complete an exit: in and out again, before it lets the guest run.
    let early = Vcpu {
        first_runs: vec![1_500],
        first_enter: Some(1_200),
        ..Vcpu::default()
    };
    assert_eq!(entry(&early, STOP), Some(1_500));
    let gap = Vcpu {
        gaps: vec![(1_210, 1_502), (1_700, 1_900)],
        ..early
    };
    assert_eq!(entry(&gap, STOP), Some(1_502));
}

#[test]
fn the_kernel_alone_can_tell_the_first_run() {
    let started = Vcpu {
        first_enter: Some(1_600),
        ..Vcpu::default()
    };
    assert_eq!(entry(&started, STOP), Some(1_600));
    let resumed = Vcpu {
        first_enter: Some(5),
        gaps: vec![(10, 900), (1_001, 1_700)],
        ..Vcpu::default()
    };
    assert_eq!(entry(&resumed, STOP), Some(1_700));
    let never = Vcpu {
        first_enter: Some(5),
        first_runs: vec![4],
        ..Vcpu::default()
    };
    assert_eq!(entry(&never, STOP), None);
}

#[test]
fn the_last_exit_is_the_one_before_the_pause() {
    let stopped = Vcpu {
        paused: vec![1_100],
        last_exit: Some(1_090),
        ..Vcpu::default()
    };
    assert_eq!(exit(&stopped, STOP, 2_000), Some(1_090));
    // KVM_RUN was called once more after the pause, without running the guest.
    let later = Vcpu {
        last_exit: Some(1_300),
        ..stopped.clone()
    };
    assert_eq!(exit(&later, STOP, 2_000), Some(1_100));
    let seen = Vcpu {
        gaps: vec![(400, 500), (1_080, 1_290)],
        ..later
    };
    assert_eq!(exit(&seen, STOP, 2_000), Some(1_080));
}

#[test]
fn the_kernel_alone_can_tell_the_last_exit() {
    let gone = Vcpu {
        last_exit: Some(1_090),
        ..Vcpu::default()
    };
    assert_eq!(exit(&gone, STOP, 2_000), Some(1_090));
    let back = Vcpu {
        gaps: vec![(1_080, 2_000)],
        ..Vcpu::default()
    };
    assert_eq!(exit(&back, STOP, 2_000), Some(1_080));
    let unseen = Vcpu {
        first_enter: Some(3),
        ..Vcpu::default()
    };
    assert_eq!(exit(&unseen, STOP, 2_000), None);
}

#[test]
fn the_blackout_is_bounded_by_guest_code_where_the_kernel_tells_it() {
    let vcpu = Vcpu {
        gaps: vec![(1_080, 1_290), (2_000, 2_500)],
        left: vec![300, 1_070, 1_990],
        entered: vec![310, 1_320, 2_550],
        ..Vcpu::default()
    };
    assert_eq!(left(&vcpu, 1_080), 1_070);
    assert_eq!(entered(&vcpu, 1_290), 1_320);
    assert_eq!(left(&vcpu, 2_000), 1_990);
    assert_eq!(entered(&vcpu, 2_500), 2_550);
}

#[test]
fn an_edge_of_guest_code_that_was_lost_is_the_ioctls() {
    let vcpu = Vcpu {
        gaps: vec![(1_080, 1_290), (2_000, 2_500)],
        left: vec![300, 1_070],
        entered: vec![310, 2_550],
        ..Vcpu::default()
    };
    assert_eq!(entered(&vcpu, 1_290), 1_290);
    assert_eq!(left(&vcpu, 2_000), 2_000);
    assert_eq!(left(&Vcpu::default(), 5), 5);
    assert_eq!(entered(&Vcpu::default(), 5), 5);
}

#[test]
fn shares_and_overlaps_stay_inside_the_downtime() {
    let bounds = Bounds {
        start_ns: 100,
        end_ns: 300,
        resumed: Side::Destination,
    };
    assert_eq!(bounds.duration_ns(), 200);
    assert_eq!(bounds.overlap_ns(0, 150), 50);
    assert_eq!(bounds.overlap_ns(300, 400), 0);
    assert!((bounds.share(0, 1_000) - 1.0).abs() < f64::EPSILON);
    let empty = Bounds {
        end_ns: 100,
        ..bounds
    };
    assert!(empty.share(0, 1_000).abs() < f64::EPSILON);
    let hostile = Bounds {
        start_ns: i64::MIN,
        end_ns: i64::MAX,
        ..bounds
    };
    assert_eq!(hostile.duration_ns(), i64::MAX.cast_unsigned());
}
