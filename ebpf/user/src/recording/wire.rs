//! [`Frame`]s as they stand in the file, and the coding between the two: see "What keeps it small"
//! in the format's description.

use std::borrow::Cow;
use std::collections::HashMap;

use serde::{Deserialize, Serialize};

use super::frame::{
    Calls, ClockAnchor, Cost, DeviceAttr, FdKind, Frame, Header, Hit, Ioctl, KernelFn, ProbeDef,
    Process, Relation, Thread, Value, VcpuEdges, VcpuGap, VcpuGuest,
};

/// What postcard encodes. The order of the variants and fields is the format.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Wire<'a> {
    Header(Cow<'a, Header>),
    Process(Cow<'a, Process>),
    Thread(Cow<'a, Thread>),
    Probe(Cow<'a, ProbeDef>),
    Task {
        pid: u32,
        tid: u32,
    },
    Hit {
        task: u32,
        delta: i64,
        probe: u32,
        args: Cow<'a, [Value]>,
    },
    Ioctl {
        task: u32,
        delta: i64,
        duration: u64,
        fd: i32,
        fd_kind: FdKind,
        cmd: u32,
        ret: i64,
        attr: Option<DeviceAttr>,
    },
    KernelFn {
        task: u32,
        delta: i64,
        duration: u64,
        function: Cow<'a, str>,
        ret: i64,
        calls: Cow<'a, [Calls]>,
    },
    VcpuEdges {
        task: u32,
        vcpu: Option<u32>,
        delta: i64,
        last_enter: i64,
        last_exit: i64,
        runs: u64,
    },
    VcpuGap {
        task: u32,
        vcpu: Option<u32>,
        delta: i64,
        duration: u64,
    },
    /// As recordings of old have it; [`Wire::LostSince`] is what is written.
    Lost {
        delta: i64,
        count: u64,
    },
    Clock(ClockAnchor),
    Cost(Cost),
    End {
        delta: i64,
    },
    VcpuGuest {
        task: u32,
        left: Option<i64>,
        entered: Option<i64>,
    },
    Joined(Relation),
    LostSince {
        delta: i64,
        duration: u64,
        count: u64,
    },
}

/// The writer's half of the coding.
#[derive(Debug, Default)]
pub(super) struct Encoder {
    last_ns: u64,
    tasks: HashMap<(u32, u32), u32>,
}

impl Encoder {
    /// The time that the next frame's is told against.
    pub(super) fn last_ns(&self) -> u64 {
        self.last_ns
    }

    /// Undoes what [`Encoder::encode`] did to the clock, for a frame that is not written after all.
    pub(super) fn rewind(&mut self, last_ns: u64) {
        self.last_ns = last_ns;
    }

    /// The task that `frame` refers to and the file does not know yet: it must be written first.
    pub(super) fn new_task(&mut self, frame: &Frame) -> Option<Wire<'static>> {
        let (pid, tid) = match frame {
            Frame::Hit(hit) => (hit.pid, hit.tid),
            Frame::Ioctl(ioctl) => (ioctl.pid, ioctl.tid),
            Frame::KernelFn(function) => (function.pid, function.tid),
            Frame::VcpuEdges(edges) => (edges.pid, edges.tid),
            Frame::VcpuGap(gap) => (gap.pid, gap.tid),
            Frame::VcpuGuest(guest) => (guest.pid, guest.tid),
            _ => return None,
        };
        let next = u32::try_from(self.tasks.len()).unwrap_or(u32::MAX);
        let mut new = None;
        self.tasks.entry((pid, tid)).or_insert_with(|| {
            new = Some(Wire::Task { pid, tid });
            next
        });
        new
    }

    /// Codes `frame`; [`Encoder::new_task`] has been asked about it.
    pub(super) fn encode<'a>(&mut self, frame: &'a Frame) -> Wire<'a> {
        match frame {
            Frame::Header(header) => Wire::Header(Cow::Borrowed(header)),
            Frame::Process(process) => Wire::Process(Cow::Borrowed(process)),
            Frame::Thread(thread) => Wire::Thread(Cow::Borrowed(thread)),
            Frame::Probe(probe) => Wire::Probe(Cow::Borrowed(probe)),
            Frame::Hit(hit) => Wire::Hit {
                task: self.task(hit.pid, hit.tid),
                delta: self.delta(hit.ts_ns),
                probe: hit.probe,
                args: Cow::Borrowed(&hit.args),
            },
            Frame::Ioctl(ioctl) => Wire::Ioctl {
                task: self.task(ioctl.pid, ioctl.tid),
                delta: self.delta(ioctl.exit_ns),
                duration: ioctl.exit_ns.wrapping_sub(ioctl.enter_ns),
                fd: ioctl.fd,
                fd_kind: ioctl.fd_kind,
                cmd: ioctl.cmd,
                ret: ioctl.ret,
                attr: ioctl.attr,
            },
            Frame::KernelFn(function) => Wire::KernelFn {
                task: self.task(function.pid, function.tid),
                delta: self.delta(function.exit_ns),
                duration: function.exit_ns.wrapping_sub(function.enter_ns),
                function: Cow::Borrowed(&function.function),
                ret: function.ret,
                calls: Cow::Borrowed(&function.calls),
            },
            Frame::VcpuEdges(edges) => Wire::VcpuEdges {
                task: self.task(edges.pid, edges.tid),
                vcpu: edges.vcpu,
                delta: self.delta(edges.first_enter_ns),
                last_enter: edges
                    .last_enter_ns
                    .wrapping_sub(edges.first_enter_ns)
                    .cast_signed(),
                last_exit: edges
                    .last_exit_ns
                    .wrapping_sub(edges.first_enter_ns)
                    .cast_signed(),
                runs: edges.runs,
            },
            Frame::VcpuGap(gap) => Wire::VcpuGap {
                task: self.task(gap.pid, gap.tid),
                vcpu: gap.vcpu,
                delta: self.delta(gap.enter_ns),
                duration: gap.enter_ns.wrapping_sub(gap.exit_ns),
            },
            Frame::VcpuGuest(guest) => Wire::VcpuGuest {
                task: self.task(guest.pid, guest.tid),
                left: guest.left_ns.map(|left| self.delta(left)),
                entered: guest.entered_ns.map(|entered| self.delta(entered)),
            },
            Frame::Lost {
                since_ns,
                at_ns,
                count,
            } => Wire::LostSince {
                delta: self.delta(*at_ns),
                duration: at_ns.wrapping_sub(*since_ns),
                count: *count,
            },
            Frame::Clock(clock) => Wire::Clock(*clock),
            Frame::Cost(cost) => Wire::Cost(*cost),
            Frame::End { at_ns } => Wire::End {
                delta: self.delta(*at_ns),
            },
            Frame::Joined(relation) => {
                *self = Self::default();
                Wire::Joined(*relation)
            }
        }
    }

    fn task(&self, pid: u32, tid: u32) -> u32 {
        self.tasks.get(&(pid, tid)).copied().unwrap_or(u32::MAX)
    }

    fn delta(&mut self, ns: u64) -> i64 {
        let delta = ns.wrapping_sub(self.last_ns).cast_signed();
        self.last_ns = ns;
        delta
    }
}

/// At most so many tasks are told of, 8 bytes each.
const MOST_TASKS: usize = 1 << 22;

/// The reader's half of the coding.
#[derive(Debug, Default)]
pub(super) struct Decoder {
    last_ns: u64,
    tasks: Vec<(u32, u32)>,
    begun: bool,
    ended: bool,
    /// Whether this is the second recording of the file.
    joined: bool,
}

impl Decoder {
    /// Whether the end frame was seen.
    pub(super) fn ended(&self) -> bool {
        self.ended
    }

    /// Undoes [`Encoder::encode`]. `None` is a frame of the coding itself.
    ///
    /// # Errors
    /// What is wrong with the frame, as the end of a sentence.
    pub(super) fn decode(&mut self, wire: Wire<'static>) -> Result<Option<Frame>, &'static str> {
        match (&wire, self.begun) {
            (Wire::Header(_), false) => self.begun = true,
            (Wire::Header(_), true) => return Err("is a second header"),
            (_, false) => return Err("comes before the header"),
            (Wire::Joined(_), true) if self.joined => return Err("joins a third recording"),
            (Wire::Joined(_), true) => {
                *self = Self {
                    joined: true,
                    ..Self::default()
                };
            }
            (_, true) if self.ended => return Err("comes after the end"),
            (Wire::End { .. }, true) => self.ended = true,
            (_, true) => {}
        }
        Ok(Some(match wire {
            Wire::Header(header) => Frame::Header(header.into_owned()),
            Wire::Process(process) => Frame::Process(process.into_owned()),
            Wire::Thread(thread) => Frame::Thread(thread.into_owned()),
            Wire::Probe(probe) => Frame::Probe(probe.into_owned()),
            Wire::Task { pid, tid } => {
                if self.tasks.len() >= MOST_TASKS {
                    return Err("tells of more threads than a recording may");
                }
                self.tasks.push((pid, tid));
                return Ok(None);
            }
            Wire::Hit {
                task,
                delta,
                probe,
                args,
            } => {
                let (pid, tid) = self.task(task)?;
                let ts_ns = self.time(delta);
                Frame::Hit(Hit {
                    ts_ns,
                    pid,
                    tid,
                    probe,
                    args: args.into_owned(),
                })
            }
            Wire::Ioctl {
                task,
                delta,
                duration,
                fd,
                fd_kind,
                cmd,
                ret,
                attr,
            } => {
                let (pid, tid) = self.task(task)?;
                let exit_ns = self.time(delta);
                let enter_ns = exit_ns.wrapping_sub(duration);
                Frame::Ioctl(Ioctl {
                    pid,
                    tid,
                    enter_ns,
                    exit_ns,
                    fd,
                    fd_kind,
                    cmd,
                    ret,
                    attr,
                })
            }
            Wire::KernelFn {
                task,
                delta,
                duration,
                function,
                ret,
                calls,
            } => {
                let (pid, tid) = self.task(task)?;
                let exit_ns = self.time(delta);
                Frame::KernelFn(KernelFn {
                    pid,
                    tid,
                    function: function.into_owned(),
                    enter_ns: exit_ns.wrapping_sub(duration),
                    exit_ns,
                    ret,
                    calls: calls.into_owned(),
                })
            }
            Wire::VcpuEdges {
                task,
                vcpu,
                delta,
                last_enter,
                last_exit,
                runs,
            } => {
                let (pid, tid) = self.task(task)?;
                let first_enter_ns = self.time(delta);
                Frame::VcpuEdges(VcpuEdges {
                    pid,
                    tid,
                    vcpu,
                    first_enter_ns,
                    last_enter_ns: first_enter_ns.wrapping_add_signed(last_enter),
                    last_exit_ns: first_enter_ns.wrapping_add_signed(last_exit),
                    runs,
                })
            }
            Wire::VcpuGap {
                task,
                vcpu,
                delta,
                duration,
            } => {
                let (pid, tid) = self.task(task)?;
                let enter_ns = self.time(delta);
                let exit_ns = enter_ns.wrapping_sub(duration);
                Frame::VcpuGap(VcpuGap {
                    pid,
                    tid,
                    vcpu,
                    exit_ns,
                    enter_ns,
                })
            }
            Wire::VcpuGuest {
                task,
                left,
                entered,
            } => {
                let (pid, tid) = self.task(task)?;
                Frame::VcpuGuest(VcpuGuest {
                    pid,
                    tid,
                    left_ns: left.map(|left| self.time(left)),
                    entered_ns: entered.map(|entered| self.time(entered)),
                })
            }
            Wire::Lost { delta, count } => Frame::Lost {
                since_ns: 0,
                at_ns: self.time(delta),
                count,
            },
            Wire::LostSince {
                delta,
                duration,
                count,
            } => {
                let at_ns = self.time(delta);
                Frame::Lost {
                    since_ns: at_ns.wrapping_sub(duration),
                    at_ns,
                    count,
                }
            }
            Wire::Clock(clock) => Frame::Clock(clock),
            Wire::Cost(cost) => Frame::Cost(cost),
            Wire::End { delta } => Frame::End {
                at_ns: self.time(delta),
            },
            Wire::Joined(relation) => Frame::Joined(relation),
        }))
    }

    fn task(&self, index: u32) -> Result<(u32, u32), &'static str> {
        let index = usize::try_from(index).unwrap_or(usize::MAX);
        self.tasks
            .get(index)
            .copied()
            .ok_or("refers to a task that was never told")
    }

    fn time(&mut self, delta: i64) -> u64 {
        self.last_ns = self.last_ns.wrapping_add_signed(delta);
        self.last_ns
    }
}
