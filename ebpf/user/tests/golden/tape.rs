//! Builds recordings as the recorder would have written them, from the probe table.

use blackout::foreign;
use blackout::recording::{
    ArgDef, Calls, ClockAnchor, Cost, DeviceAttr, FdKind, Frame, Header, Hit, Ioctl, KernelFn,
    ProbeDef, Process, Thread, Value, ValueKind, VcpuEdges, VcpuGap, Writer,
};
use blackout_abi::probes::{self, ArgKind, PROBES};

/// A process and a thread of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Task {
    pub(crate) pid: u32,
    pub(crate) tid: u32,
}

/// One argument of a probe.
pub(crate) enum Arg {
    U(u64),
    I(i64),
    S(&'static str),
}

/// Frames, and the clock that the next one is stamped with.
#[derive(Clone, Debug)]
pub(crate) struct Tape {
    header: Header,
    frames: Vec<Frame>,
    now_ns: u64,
}

/// A boot of a made-up machine is this old when its tape begins, ns.
pub(crate) const START_NS: u64 = 5_000_000_000;

impl Tape {
    /// An empty tape of a host called `hostname`.
    pub(crate) fn new(hostname: &str) -> Self {
        let header = Header {
            tool: "0.1.0".into(),
            kernel: "6.12.0".into(),
            arch: "aarch64".into(),
            hostname: hostname.into(),
            boot_id: format!("boot of {hostname}"),
            backends: vec!["uprobe".into(), "tracepoint".into(), "fentry".into()],
            clock: ClockAnchor {
                monotonic_ns: START_NS,
                realtime_ns: 1_700_000_000_000_000_000,
                tai_offset_ns: 37_000_000_000,
            },
        };
        Self {
            header,
            frames: Vec::new(),
            now_ns: START_NS,
        }
    }

    /// Names a process and its threads; the first is the main thread.
    pub(crate) fn process(&mut self, pid: u32, threads: &[&str]) -> Vec<Task> {
        let exe = "/usr/bin/blackout-vmm".into();
        self.frames.push(Frame::Process(Process {
            pid,
            comm: "blackout-vmm".into(),
            exe,
        }));
        let tasks: Vec<_> = (0..)
            .zip(threads)
            .map(|(index, _)| Task {
                pid,
                tid: pid + index,
            })
            .collect();
        for (task, name) in tasks.iter().zip(threads) {
            self.frames.push(Frame::Thread(Thread {
                pid,
                tid: task.tid,
                name: (*name).into(),
            }));
        }
        tasks
    }

    pub(crate) fn now_ns(&self) -> u64 {
        self.now_ns
    }

    /// What `other` has, whose times come after this one's by now.
    pub(crate) fn append(&mut self, other: &Self) {
        self.frames.extend(other.frames.iter().cloned());
        self.now_ns += other.now_ns;
    }

    /// Lets time go by.
    pub(crate) fn pass_us(&mut self, us: u64) -> &mut Self {
        self.now_ns += us * 1_000;
        self
    }

    /// Lets time go by that is no whole number of microseconds.
    pub(crate) fn pass_ns(&mut self, ns: u64) -> &mut Self {
        self.now_ns += ns;
        self
    }

    /// Fires the probe called `name`, whose arguments must be what the table says.
    pub(crate) fn fire(&mut self, task: Task, name: &str, args: &[Arg]) -> &mut Self {
        let id = probes::probe_id(name).unwrap_or_else(|| panic!("no probe {name}"));
        let probe = &PROBES[usize::from(id)];
        self.define(id.into(), probe);
        assert_eq!(args.len(), probe.args.len(), "arguments of {name}");
        let values = args
            .iter()
            .zip(probe.args)
            .map(|(value, arg)| match (value, arg.kind) {
                (Arg::U(value), ArgKind::U64) => Value::U64(*value),
                (Arg::I(value), ArgKind::I64) => Value::I64(*value),
                (Arg::S(value), ArgKind::Str) => Value::Str((*value).into()),
                _ => panic!("{name}: {} is of another kind", arg.name),
            });
        let (ts_ns, Task { pid, tid }) = (self.now_ns, task);
        let args = values.collect();
        self.frames.push(Frame::Hit(Hit {
            ts_ns,
            pid,
            tid,
            probe: id.into(),
            args,
        }));
        self
    }

    /// Fires another monitor's probe, as the tool knows it.
    pub(crate) fn foreign(&mut self, task: Task, name: &str, args: &[Arg]) -> &mut Self {
        let known = foreign::PROBES.iter().position(|probe| probe.name == name);
        let index = known.unwrap_or_else(|| panic!("no probe {name}"));
        let (id, probe) = (1000 + index as u32, &foreign::PROBES[index]);
        let defines = |frame: &Frame| matches!(frame, Frame::Probe(def) if def.id == id);
        if !self.frames.iter().any(defines) {
            let arg = |(name, of): &(&str, ArgKind)| ArgDef {
                name: (*name).into(),
                kind: kind(*of),
            };
            self.frames.push(Frame::Probe(ProbeDef {
                id,
                provider: probe.provider.into(),
                name: name.into(),
                args: probe.args.iter().map(arg).collect(),
            }));
        }
        let value = |arg: &Arg| match arg {
            Arg::U(value) => Value::U64(*value),
            Arg::I(value) => Value::I64(*value),
            Arg::S(value) => Value::Str((*value).into()),
        };
        let args: Vec<_> = args.iter().map(value).collect();
        assert_eq!(args.len(), probe.args.len(), "arguments of {name}");
        let (ts_ns, Task { pid, tid }) = (self.now_ns, task);
        self.frames.push(Frame::Hit(Hit {
            ts_ns,
            pid,
            tid,
            probe: id,
            args,
        }));
        self
    }

    /// Defines the probes called `names` here, where each hit finds them soon.
    pub(crate) fn knows(&mut self, names: &[&str]) -> &mut Self {
        for name in names {
            let id = probes::probe_id(name).unwrap_or_else(|| panic!("no probe {name}"));
            self.define(id.into(), &PROBES[usize::from(id)]);
        }
        self
    }

    /// Defines a probe before its first hit. Only those that fire are defined, so that a tape stays
    /// what it is when the table grows.
    fn define(&mut self, id: u32, probe: &probes::Probe) {
        let defines = |frame: &Frame| matches!(frame, Frame::Probe(def) if def.id == id);
        if self.frames.iter().any(defines) {
            return;
        }
        let arg = |arg: &probes::Arg| ArgDef {
            name: arg.name.into(),
            kind: kind(arg.kind),
        };
        self.frames.push(Frame::Probe(ProbeDef {
            id,
            provider: probes::PROVIDER.into(),
            name: probe.name.into(),
            args: probe.args.iter().map(arg).collect(),
        }));
    }

    /// A span with `body` inside.
    pub(crate) fn span(
        &mut self,
        task: Task,
        row: &str,
        begin: &[Arg],
        end: &[Arg],
        body: impl FnOnce(&mut Self),
    ) -> &mut Self {
        self.fire(task, &format!("{row}_begin"), begin);
        body(self);
        self.fire(task, &format!("{row}_end"), end)
    }

    /// A `KVM_SET_DEVICE_ATTR` with `inside` the kernel.
    pub(crate) fn set_attr(
        &mut self,
        task: Task,
        (fd, fd_kind): (i32, FdKind),
        (group, attr): (u32, u64),
        ret: i64,
        inside: impl FnOnce(&mut Self),
    ) -> &mut Self {
        let enter_ns = self.now_ns;
        inside(self);
        let (Task { pid, tid }, exit_ns) = (task, self.now_ns);
        let attr = Some(DeviceAttr { group, attr });
        let cmd = 0x4018_aee1;
        self.frames.push(Frame::Ioctl(Ioctl {
            pid,
            tid,
            enter_ns,
            exit_ns,
            fd,
            fd_kind,
            cmd,
            ret,
            attr,
        }));
        self
    }

    /// An ioctl of a VM that takes `us`.
    pub(crate) fn vm_ioctl(&mut self, task: Task, cmd: u32, us: u64) -> &mut Self {
        let enter_ns = self.now_ns;
        self.pass_us(us);
        let (Task { pid, tid }, exit_ns) = (task, self.now_ns);
        let (fd, fd_kind) = (5, FdKind::Vm);
        self.frames.push(Frame::Ioctl(Ioctl {
            pid,
            tid,
            enter_ns,
            exit_ns,
            fd,
            fd_kind,
            cmd,
            ret: 0,
            attr: None,
        }));
        self
    }

    /// A kernel function that takes `us`.
    pub(crate) fn function(
        &mut self,
        task: Task,
        function: &str,
        us: u64,
        calls: &[(&str, u64)],
    ) -> &mut Self {
        let enter_ns = self.now_ns;
        self.pass_us(us);
        self.frames.push(Frame::KernelFn(KernelFn {
            pid: task.pid,
            tid: task.tid,
            function: function.into(),
            enter_ns,
            exit_ns: self.now_ns,
            ret: 0,
            calls: calls
                .iter()
                .map(|(function, count)| Calls {
                    function: (*function).into(),
                    count: *count,
                })
                .collect(),
        }));
        self
    }

    /// What the kernel knows of a vCPU's runs; see [`VcpuEdges`].
    pub(crate) fn edges(
        &mut self,
        task: Task,
        vcpu: u32,
        first_enter_ns: u64,
        last_enter_ns: u64,
        last_exit_ns: u64,
    ) {
        let Task { pid, tid } = task;
        let vcpu = Some(vcpu);
        self.frames.push(Frame::VcpuEdges(VcpuEdges {
            pid,
            tid,
            vcpu,
            first_enter_ns,
            last_enter_ns,
            last_exit_ns,
            runs: 9,
        }));
    }

    /// A stay outside of KVM_RUN.
    pub(crate) fn gap(&mut self, task: Task, vcpu: u32, exit_ns: u64, enter_ns: u64) {
        let Task { pid, tid } = task;
        self.frames.push(Frame::VcpuGap(VcpuGap {
            pid,
            tid,
            vcpu: Some(vcpu),
            exit_ns,
            enter_ns,
        }));
    }

    /// Events were lost since `since_ns`.
    pub(crate) fn lose(&mut self, since_ns: u64, count: u64) {
        self.frames.push(Frame::Lost {
            since_ns,
            at_ns: self.now_ns,
            count,
        });
    }

    /// When the probe called `name` first fired on `pid`.
    pub(crate) fn time_of(&self, pid: u32, name: &str) -> u64 {
        let id = probes::probe_id(name).map(u32::from);
        let at = self.frames.iter().find_map(|frame| match frame {
            Frame::Hit(hit) if hit.pid == pid && Some(hit.probe) == id => Some(hit.ts_ns),
            _ => None,
        });
        at.unwrap_or_else(|| panic!("{name} did not fire"))
    }

    /// What recording cost.
    pub(crate) fn cost(&mut self) {
        let events = self
            .frames
            .iter()
            .filter(|frame| matches!(frame, Frame::Hit(_)))
            .count() as u64;
        self.frames.push(Frame::Cost(Cost {
            events,
            bpf_runs: Some(events),
            bpf_ns: Some(events * 700),
            cpu_ns: events * 2_000,
        }));
    }

    /// Lets the last kernel function begin `us` earlier.
    pub(crate) fn overlap_us(&mut self, us: u64) {
        match self.frames.last_mut() {
            Some(Frame::KernelFn(function)) => function.enter_ns -= us * 1_000,
            other => panic!("{other:?} is no kernel function"),
        }
    }

    /// Keeps the frames that `keep` approves of.
    pub(crate) fn retain(mut self, keep: impl FnMut(&Frame) -> bool) -> Self {
        self.frames.retain(keep);
        self
    }

    /// Drops the hits of the probe called `name` on `pid`.
    pub(crate) fn without(self, pid: u32, name: &str) -> Self {
        let id = probes::probe_id(name).map(u32::from);
        self.retain(
            |frame| !matches!(frame, Frame::Hit(hit) if hit.pid == pid && Some(hit.probe) == id),
        )
    }

    /// What a recorder of another host, that watched `pid` only, would have written: its clock
    /// shows `offset_ns` more.
    pub(crate) fn on_host(&self, hostname: &str, pid: u32, offset_ns: u64) -> Self {
        let mut tape = self.only(pid);
        tape.header = Self::new(hostname).header;
        tape.header.clock.monotonic_ns += offset_ns;
        tape.warp(|ns| ns + offset_ns)
    }

    /// The same at other times.
    pub(crate) fn warp(mut self, to: impl Fn(u64) -> u64) -> Self {
        for frame in &mut self.frames {
            let times = match frame {
                Frame::Hit(hit) => vec![&mut hit.ts_ns],
                Frame::Ioctl(ioctl) => vec![&mut ioctl.enter_ns, &mut ioctl.exit_ns],
                Frame::KernelFn(function) => vec![&mut function.enter_ns, &mut function.exit_ns],
                Frame::VcpuGap(gap) => vec![&mut gap.exit_ns, &mut gap.enter_ns],
                Frame::VcpuEdges(edges) => vec![
                    &mut edges.first_enter_ns,
                    &mut edges.last_enter_ns,
                    &mut edges.last_exit_ns,
                ],
                Frame::Lost {
                    since_ns, at_ns, ..
                } => vec![since_ns, at_ns],
                _ => Vec::new(),
            };
            for time in times {
                *time = to(*time);
            }
        }
        self
    }

    /// What a recorder that watched `pid` only would have written.
    pub(crate) fn only(&self, pid: u32) -> Self {
        self.clone().retain(|frame| match frame {
            Frame::Process(process) => process.pid == pid,
            Frame::Thread(thread) => thread.pid == pid,
            Frame::Hit(hit) => hit.pid == pid,
            Frame::Ioctl(ioctl) => ioctl.pid == pid,
            Frame::KernelFn(function) => function.pid == pid,
            Frame::VcpuEdges(edges) => edges.pid == pid,
            Frame::VcpuGap(gap) => gap.pid == pid,
            _ => true,
        })
    }

    /// The recording's bytes.
    pub(crate) fn bytes(&self) -> Vec<u8> {
        let mut writer = Writer::new("tape".into(), Vec::new(), self.header.clone()).unwrap();
        for frame in &self.frames {
            writer.write(frame).unwrap();
        }
        writer.finish(self.now_ns).unwrap()
    }
}

fn kind(kind: ArgKind) -> ValueKind {
    match kind {
        ArgKind::U64 => ValueKind::U64,
        ArgKind::I64 => ValueKind::I64,
        ArgKind::Str => ValueKind::Str,
    }
}
