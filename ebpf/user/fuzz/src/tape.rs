//! Frames with any numbers in them, as a recorder could write them and none would.

use blackout::foreign;
use blackout::recording::{
    ArgDef, Basis, Calls, ClockAnchor, Cost, DeviceAttr, FdKind, Frame, Header, Hit, Ioctl,
    KernelFn, ProbeDef, Process, Relation, Thread, Value, ValueKind, VcpuEdges, VcpuGap, VcpuGuest,
    Writer,
};
use blackout_abi::ArgKind;
use blackout_abi::probes::{PROBES, PROVIDER};

/// Ioctls that mean something to the analysis, by their number within KVM's type.
const IOCTLS: [u8; 12] = [
    0x41, 0x42, 0x81, 0x82, 0xab, 0xac, 0xc0, 0xc7, 0xe0, 0xe1, 0xe2, 0x03,
];

/// Words that probes carry and the analysis knows.
const WORDS: [&str; 8] = [
    "migrate", "setup", "completed", "failed", "src-downtime-start", "finish-migrate", "its", "main",
];

/// The begin of a recording: a header, two processes and every probe that is understood.
pub(crate) fn begun() -> Vec<u8> {
    let mut writer = writer();
    define(&mut writer);
    // Without its last frame, the end.
    let mut file = writer.finish(0).expect("memory takes everything");
    file.truncate(file.len().saturating_sub(3));
    file
}

/// A recording of what `data` says, frame by frame.
pub(crate) fn of(data: &[u8]) -> Vec<u8> {
    let mut writer = writer();
    define(&mut writer);
    let mut input = Input { data, now: 1 << 40 };
    while !input.data.is_empty() {
        let frame = input.frame();
        let joined = matches!(frame, Frame::Joined(_));
        // A frame that is too large is refused, and the recording goes on.
        let _ = writer.write(&frame);
        if joined {
            let header = Frame::Header(Header {
                boot_id: "another".to_owned(),
                ..Header::default()
            });
            writer.write(&header).expect("memory takes everything");
            define(&mut writer);
        }
    }
    writer.finish(input.now).expect("memory takes everything")
}

fn writer() -> Writer<Vec<u8>> {
    let header = Header {
        boot_id: "one".to_owned(),
        ..Header::default()
    };
    Writer::new("fuzzed.rec".to_owned(), Vec::new(), header).expect("memory takes everything")
}

fn define(writer: &mut Writer<Vec<u8>>) {
    for pid in 0..2 {
        let (comm, exe) = ("monitor".to_owned(), "/usr/bin/monitor".to_owned());
        let process = Frame::Process(Process { pid, comm, exe });
        writer.write(&process).expect("memory takes everything");
    }
    type Named = (&'static str, ArgKind);
    let ours = PROBES.iter().map(|probe| {
        let args = probe.args.iter().map(|arg| (arg.name, arg.kind));
        (PROVIDER, probe.name, args.collect::<Vec<Named>>())
    });
    let theirs = foreign::PROBES
        .iter()
        .map(|probe| (probe.provider, probe.name, probe.args.to_vec()));
    for (id, (provider, name, args)) in (0..).zip(ours.chain(theirs)) {
        let args = args.into_iter().map(|(name, kind)| ArgDef {
            name: name.to_owned(),
            kind: match kind {
                ArgKind::U64 => ValueKind::U64,
                ArgKind::I64 => ValueKind::I64,
                ArgKind::Str => ValueKind::Str,
            },
        });
        let probe = Frame::Probe(ProbeDef {
            id,
            provider: provider.to_owned(),
            name: name.to_owned(),
            args: args.collect(),
        });
        writer.write(&probe).expect("memory takes everything");
    }
}

/// Takes frames off the fuzzer's bytes; zeroes when they are used up.
struct Input<'a> {
    data: &'a [u8],
    now: u64,
}

impl Input<'_> {
    fn bytes<const N: usize>(&mut self) -> [u8; N] {
        let mut bytes = [0; N];
        let (front, rest) = self.data.split_at(self.data.len().min(N));
        for (byte, from) in bytes.iter_mut().zip(front) {
            *byte = *from;
        }
        self.data = rest;
        bytes
    }

    fn byte(&mut self) -> u8 {
        let [byte] = self.bytes();
        byte
    }

    /// A number: mostly a small one, at times any.
    fn number(&mut self) -> u64 {
        match self.byte() {
            0xff => u64::from_le_bytes(self.bytes()),
            0xfe => u64::MAX,
            small => u64::from(small),
        }
    }

    /// The next moment: mostly a little later.
    fn moment(&mut self) -> u64 {
        self.now = match self.byte() {
            0xff => u64::from_le_bytes(self.bytes()),
            0xfe => self.now.wrapping_sub(self.number()),
            later => self.now.saturating_add(u64::from(later) << 8),
        };
        self.now
    }

    fn value(&mut self) -> Value {
        match self.byte() % 4 {
            0 => Value::U64(self.number()),
            1 => Value::I64(self.number().cast_signed()),
            2 => Value::Str(self.word()),
            _ => Value::Unreadable,
        }
    }

    fn word(&mut self) -> String {
        let which = usize::from(self.byte());
        let word = WORDS.get(which % (WORDS.len() + 1)).copied();
        word.map_or_else(
            || String::from_utf8_lossy(&self.bytes::<8>()).into_owned(),
            str::to_owned,
        )
    }

    fn maybe(&mut self, of: impl FnOnce(&mut Self) -> u64) -> Option<u64> {
        (self.byte() % 4 != 0).then(|| of(self))
    }

    fn frame(&mut self) -> Frame {
        let [kind, task] = self.bytes();
        let (pid, tid) = (u32::from(task & 1), u32::from(task >> 4));
        let vcpu = (task & 2 == 0).then_some(u32::from(task >> 4));
        match kind % 16 {
            0..6 => {
                let [probe, args] = self.bytes();
                Frame::Hit(Hit {
                    ts_ns: self.moment(),
                    pid,
                    tid,
                    probe: u32::from(probe),
                    args: (0..args % 8).map(|_| self.value()).collect(),
                })
            }
            6 | 7 => {
                let [which, attr, group] = self.bytes();
                let cmd = IOCTLS[usize::from(which) % IOCTLS.len()];
                let kinds = [FdKind::Vm, FdKind::Vcpu, FdKind::Its, FdKind::Gic, FdKind::Unknown];
                Frame::Ioctl(Ioctl {
                    pid,
                    tid,
                    enter_ns: self.moment(),
                    exit_ns: self.moment(),
                    fd: i32::from(group),
                    fd_kind: kinds[usize::from(group) % kinds.len()],
                    cmd: 0x4018_ae00 | u32::from(cmd),
                    ret: self.number().cast_signed(),
                    attr: (attr != 0).then_some(DeviceAttr {
                        group: u32::from(group >> 4),
                        attr: u64::from(attr),
                    }),
                })
            }
            8 => Frame::KernelFn(KernelFn {
                pid,
                tid,
                function: self.word(),
                enter_ns: self.moment(),
                exit_ns: self.moment(),
                ret: self.number().cast_signed(),
                calls: vec![Calls {
                    function: "vgic_its_check_id".to_owned(),
                    count: self.number(),
                }],
            }),
            9 => Frame::VcpuEdges(VcpuEdges {
                pid,
                tid,
                vcpu,
                first_enter_ns: self.maybe(Self::moment).unwrap_or(0),
                last_enter_ns: self.maybe(Self::moment).unwrap_or(0),
                last_exit_ns: self.maybe(Self::moment).unwrap_or(0),
                runs: self.number(),
            }),
            10 => Frame::VcpuGap(VcpuGap {
                pid,
                tid,
                vcpu,
                exit_ns: self.moment(),
                enter_ns: self.moment(),
            }),
            11 => Frame::VcpuGuest(VcpuGuest {
                pid,
                tid,
                left_ns: self.maybe(Self::moment),
                entered_ns: self.maybe(Self::moment),
            }),
            12 => Frame::Lost {
                since_ns: self.moment(),
                at_ns: self.moment(),
                count: self.number(),
            },
            13 => Frame::Cost(Cost {
                events: self.number(),
                bpf_runs: self.maybe(Self::number),
                bpf_ns: self.maybe(Self::number),
                cpu_ns: self.number(),
            }),
            14 => Frame::Thread(Thread {
                pid,
                tid,
                name: self.word(),
            }),
            _ => match task >> 4 {
                0 => Frame::Joined(Relation {
                    offset_ns: self.number().cast_signed(),
                    error_ns: self.maybe(Self::number),
                    basis: [Basis::Samples, Basis::Tai, Basis::Given][usize::from(task & 3) % 3],
                }),
                _ => Frame::Clock(ClockAnchor {
                    monotonic_ns: self.moment(),
                    realtime_ns: self.number(),
                    tai_offset_ns: self.number().cast_signed(),
                }),
            },
        }
    }
}
