//! The coding there and back, cut files and hostile ones.

use super::*;

fn frames() -> Vec<Frame> {
    let ioctl = Ioctl {
        pid: 10,
        tid: 11,
        enter_ns: 900,
        exit_ns: 1_900,
        fd: 7,
        fd_kind: FdKind::Its,
        cmd: 0x4018_aee1,
        ret: -14,
        attr: Some(DeviceAttr { group: 4, attr: 1 }),
    };
    let function = KernelFn {
        pid: 10,
        tid: 11,
        function: "vgic_its_save_tables_v0".into(),
        enter_ns: 950,
        exit_ns: 1_850,
        ret: 0,
        calls: vec![Calls {
            function: "vgic_its_check_id".into(),
            count: 256,
        }],
    };
    let edges = VcpuEdges {
        pid: 10,
        tid: 12,
        vcpu: Some(0),
        first_enter_ns: 5,
        last_enter_ns: 700,
        last_exit_ns: 650,
        runs: 3,
    };
    let args = vec![
        Value::U64(u64::MAX),
        Value::I64(-5),
        Value::Str("né".into()),
    ];
    vec![
        Frame::Process(Process {
            pid: 10,
            comm: "vmm".into(),
            exe: "/usr/bin/vmm".into(),
        }),
        Frame::Thread(Thread {
            pid: 10,
            tid: 12,
            name: "vcpu0".into(),
        }),
        Frame::Probe(ProbeDef {
            id: 3,
            provider: "vmm".into(),
            name: "vm_stop_begin".into(),
            args: vec![ArgDef {
                name: "state".into(),
                kind: ValueKind::Str,
            }],
        }),
        Frame::Hit(Hit {
            ts_ns: 1_000,
            pid: 10,
            tid: 11,
            probe: 3,
            args,
        }),
        Frame::Ioctl(ioctl),
        Frame::KernelFn(function),
        Frame::VcpuEdges(edges),
        Frame::VcpuGap(VcpuGap {
            pid: 10,
            tid: 12,
            vcpu: None,
            exit_ns: 20,
            enter_ns: 640,
        }),
        Frame::VcpuGuest(VcpuGuest {
            pid: 10,
            tid: 12,
            left_ns: None,
            entered_ns: Some(7),
        }),
        Frame::VcpuGuest(VcpuGuest {
            pid: 10,
            tid: 12,
            left_ns: Some(19),
            entered_ns: Some(642),
        }),
        Frame::Lost {
            since_ns: 1_200,
            at_ns: 2_000,
            count: 9,
        },
        Frame::Clock(ClockAnchor {
            monotonic_ns: 1,
            realtime_ns: 2,
            tai_offset_ns: 37,
        }),
        Frame::Cost(Cost {
            events: 4,
            bpf_runs: Some(4),
            bpf_ns: None,
            cpu_ns: 5,
        }),
    ]
}

fn write(frames: &[Frame]) -> Vec<u8> {
    let mut writer = Writer::new("test".into(), Vec::new(), Header::default()).unwrap();
    for frame in frames {
        writer.write(frame).unwrap();
    }
    writer.finish(3_000).unwrap()
}

fn read(bytes: &[u8]) -> (Vec<Frame>, Option<Error>, Ending) {
    let mut reader = Reader::new("test".into(), bytes).unwrap();
    let (mut frames, mut error) = (Vec::new(), None);
    for frame in &mut reader {
        match frame {
            Ok(frame) => frames.push(frame),
            Err(found) => error = Some(found),
        }
    }
    (frames, error, reader.ending())
}

#[test]
fn frames_come_back_as_they_were() {
    let (read, error, ending) = read(&write(&frames()));
    assert!(error.is_none(), "{error:?}");
    assert_eq!(ending, Ending::Finished);
    let mut expected = frames();
    expected.insert(0, Frame::Header(Header::default()));
    expected.push(Frame::End { at_ns: 3_000 });
    assert_eq!(read, expected);
}

#[test]
fn a_cut_at_any_byte_leaves_the_whole_frames() {
    let bytes = write(&frames());
    let (all, ..) = read(&bytes);
    let mut longest = 0;
    for cut in MAGIC.len() + 2..bytes.len() {
        let (read, error, ending) = read(bytes.get(..cut).unwrap());
        assert!(error.is_none(), "cut at {cut}: {error:?}");
        assert!(matches!(ending, Ending::Cut { offset } if offset <= cut as u64));
        assert_eq!(read, all.get(..read.len()).unwrap());
        assert!(read.len() >= longest && read.len() < all.len());
        longest = read.len();
    }
    assert_eq!(longest, all.len() - 1);
}

#[test]
fn changed_bytes_never_panic_and_errors_name_the_byte() {
    let bytes = write(&frames());
    let mut refused = 0;
    for index in MAGIC.len() + 2..bytes.len() {
        for bit in 0..8 {
            let mut bytes = bytes.clone();
            *bytes.get_mut(index).unwrap() ^= 1 << bit;
            if let (_, Some(error), _) = read(&bytes) {
                assert!(error.to_string().contains("at byte "), "{error}");
                refused += 1;
            }
        }
    }
    assert!(refused > 0);
}

#[test]
fn foreign_files_are_refused_by_name() {
    for bytes in [&b""[..], b"ELF", b"PERFILE2 and more bytes"] {
        let error = Reader::new("x.rec".into(), bytes).unwrap_err();
        assert!(matches!(error, Error::Magic { .. }));
        assert!(error.to_string().contains("x.rec"));
    }
    let error = Reader::new("x.rec".into(), &b"BLACKOUT\x09\x00"[..]).unwrap_err();
    assert!(matches!(error, Error::Version { found: 9, .. }));
}

#[test]
fn lengths_out_of_bounds_are_refused() {
    for length in [
        &[0][..],
        &[0x81, 0x80, 0x04],
        &[0xff, 0xff, 0xff, 0xff, 0x0f],
    ] {
        let mut bytes = write(&[]);
        bytes.truncate(MAGIC.len() + 2);
        bytes.extend_from_slice(length);
        assert!(matches!(
            read(&bytes).1,
            Some(Error::Length { offset: 10, .. })
        ));
    }
}

#[test]
fn frames_out_of_place_are_refused() {
    let whole = write(&[]);
    let (head, frames) = whole.split_at(MAGIC.len() + 2);
    let twice = [head, frames, frames].concat();
    let error = read(&twice).1.unwrap().to_string();
    assert!(error.ends_with("is a second header"), "{error}");

    let header = frames.get(..frames.len() - 4).unwrap();
    let end = frames.get(frames.len() - 4..).unwrap();
    let error = read(&[head, end, header].concat()).1.unwrap().to_string();
    assert!(error.ends_with("comes before the header"), "{error}");
    let error = read(&[head, header, end, end].concat())
        .1
        .unwrap()
        .to_string();
    assert!(error.ends_with("comes after the end"), "{error}");
}

#[test]
fn a_frame_too_large_leaves_the_file_whole() {
    let hit = |ts_ns, text: String| {
        Frame::Hit(Hit {
            ts_ns,
            pid: 1,
            tid: 1,
            probe: 0,
            args: vec![Value::Str(text)],
        })
    };
    let mut writer = Writer::new("test".into(), Vec::new(), Header::default()).unwrap();
    let error = writer.write(&hit(50, "x".repeat(MAX_FRAME))).unwrap_err();
    assert!(matches!(error, Error::TooLarge { .. }));
    writer.write(&hit(60, "y".into())).unwrap();
    let (frames, error, _) = read(&writer.finish(70).unwrap());
    assert!(error.is_none());
    assert_eq!(frames.get(1), Some(&hit(60, "y".into())));
}

#[test]
fn a_hit_is_small() {
    let hit = |index: u64| {
        let args = vec![Value::U64(index), Value::I64(0)];
        Frame::Hit(Hit {
            ts_ns: (1 << 50) + index * 10_000,
            pid: 70_000,
            tid: 70_001,
            probe: 40,
            args,
        })
    };
    let hits = |count| write(&(0..count).map(hit).collect::<Vec<_>>()).len();
    let bytes_each = (hits(1_100) - hits(100)) / 1_000;
    assert!(bytes_each <= 24, "{bytes_each} bytes a hit");
}
