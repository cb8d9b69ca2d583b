//! From the records of the eBPF programs to the frames of a recording.

use std::collections::HashSet;

use blackout_abi::event::{
    Call, Function, Header, Ioctl, Kind, MAX_TEXTS, Run, RunEdge, RunEdges, TEXT_LEN, Usdt,
    UsdtText, read,
};

use super::fds::Fds;
use super::process;
use super::sites::{self, Sites};
use crate::recording::{
    self, DeviceAttr, Frame, Hit, KernelFn, Value, ValueKind, VcpuEdges, VcpuGap, VcpuGuest,
};

// include/uapi/linux/kvm.h: KVM_SET_DEVICE_ATTR, KVM_GET_DEVICE_ATTR and KVM_HAS_DEVICE_ATTR. The
// high half is the direction and the size, which is that of `struct kvm_device_attr`.
const DEVICE_ATTR: [u32; 3] = [0x4018_aee1, 0x4018_aee2, 0x4018_aee3];

/// The process that a record is of.
pub(super) fn process(bytes: &[u8]) -> Option<u32> {
    read::<Header>(bytes).map(|header| header.tgid)
}

type Texts = [[u8; TEXT_LEN]; MAX_TEXTS];

/// What has to be remembered to understand a record.
#[derive(Debug, Default)]
pub(super) struct Translator {
    pub(super) sites: Sites,
    pub(super) fds: Fds,
    /// Threads whose names were told.
    threads: HashSet<(u32, u32)>,
}

impl Translator {
    /// Appends the frames that one record makes. One that no program of this version writes makes
    /// none.
    pub(super) fn translate(&mut self, bytes: &[u8], frames: &mut Vec<Frame>) {
        let Some(header) = read::<Header>(bytes) else {
            return;
        };
        if self.threads.insert((header.tgid, header.tid)) {
            frames.extend(thread(header.tgid, header.tid));
        }
        match Kind::from_u32(header.kind) {
            Some(Kind::Usdt) => {
                let hit = read::<Usdt>(bytes).and_then(|usdt| self.hit(&usdt, None));
                frames.extend(hit.map(Frame::Hit));
            }
            Some(Kind::UsdtText) => {
                let hit = read::<UsdtText>(bytes)
                    .and_then(|record| self.hit(&record.usdt, Some(&record.texts)));
                frames.extend(hit.map(Frame::Hit));
            }
            Some(Kind::Ioctl) => {
                frames.extend(read(bytes).map(|call| Frame::Ioctl(self.ioctl(&call))));
            }
            Some(Kind::Run) => {
                if let Some(run) = read::<Run>(bytes) {
                    self.run(&run, frames);
                }
            }
            Some(Kind::Call) => {
                frames.extend(
                    read(bytes)
                        .and_then(|call| kernel_fn(&call))
                        .map(Frame::KernelFn),
                );
            }
            None => {}
        }
    }

    /// Appends the frames for a thread's edges as the map has them.
    pub(super) fn edges(&mut self, tid: u32, edges: &RunEdges, frames: &mut Vec<Frame>) {
        frames.push(Frame::VcpuEdges(self.vcpu_edges(tid, edges)));
        let out = edges.exit >= edges.enter;
        if out && edges.guest_exit > edges.guest_enter {
            frames.push(Frame::VcpuGuest(VcpuGuest {
                pid: edges.tgid,
                tid,
                left_ns: Some(edges.guest_exit),
                entered_ns: None,
            }));
        }
    }

    pub(super) fn vcpu_edges(&mut self, tid: u32, edges: &RunEdges) -> VcpuEdges {
        VcpuEdges {
            pid: edges.tgid,
            tid,
            vcpu: self.fds.get(edges.tgid, edges.fd).vcpu,
            first_enter_ns: edges.first,
            last_enter_ns: edges.enter,
            last_exit_ns: edges.exit,
            runs: edges.runs,
        }
    }

    /// The names of all threads of a process that were met: a thread often gets its name only
    /// after it was first seen.
    pub(super) fn threads_of(&self, pid: u32) -> impl Iterator<Item = Frame> {
        let threads = self.threads.iter().filter(move |(owner, _)| *owner == pid);
        threads.filter_map(|(pid, tid)| thread(*pid, *tid))
    }

    fn hit(&self, usdt: &Usdt, texts: Option<&Texts>) -> Option<Hit> {
        let probe = self.sites.by_cookie(usdt.site)?;
        let has = |bits: u16, bit: usize| bits.checked_shr(bit as u32).unwrap_or(0) & 1 == 1;
        let text = |index| {
            let slot = sites::texts(probe).position(|text| text == index)?;
            texts?.get(slot).filter(|_| has(usdt.texts, slot))
        };
        let value = |(index, def): (usize, &recording::ArgDef)| {
            let raw = usdt.args.get(index).filter(|_| !has(usdt.unread, index));
            match (def.kind, raw) {
                (_, None) => Value::Unreadable,
                (ValueKind::U64, Some(raw)) => Value::U64(*raw),
                (ValueKind::I64, Some(raw)) => Value::I64(*raw as i64),
                (ValueKind::Str, Some(_)) => {
                    text(index).map_or(Value::Unreadable, |text| Value::Str(string(text)))
                }
            }
        };
        Some(Hit {
            ts_ns: usdt.header.time,
            pid: usdt.header.tgid,
            tid: usdt.header.tid,
            probe: probe.id,
            args: probe.args.iter().enumerate().map(value).collect(),
        })
    }

    fn ioctl(&mut self, call: &Ioctl) -> recording::Ioctl {
        self.fds.learn(call);
        let [_flags, group, low, high, ..] = call.head;
        let attr = DEVICE_ATTR.contains(&call.cmd) && call.head_len == 24;
        recording::Ioctl {
            pid: call.header.tgid,
            tid: call.header.tid,
            enter_ns: call.start,
            exit_ns: call.header.time,
            fd: call.fd as i32,
            fd_kind: self.fds.get(call.header.tgid, call.fd).kind,
            cmd: call.cmd,
            ret: call.ret,
            attr: attr.then(|| DeviceAttr {
                group,
                attr: u64::from(low) | u64::from(high) << 32,
            }),
        }
    }

    fn run(&mut self, run: &Run, frames: &mut Vec<Frame>) {
        let (time, tid) = (run.header.time, run.header.tid);
        let mut edges = run.edges;
        match RunEdge::from_u32(run.edge) {
            Some(edge @ (RunEdge::First | RunEdge::Gap)) => {
                // The record has the edges from before this call.
                let exit_ns = edges.exit;
                edges.enter = time;
                edges.runs = edges.runs.saturating_add(1);
                let edges = self.vcpu_edges(tid, &edges);
                if edge == RunEdge::Gap {
                    frames.push(Frame::VcpuGap(VcpuGap {
                        pid: edges.pid,
                        tid,
                        vcpu: edges.vcpu,
                        exit_ns,
                        enter_ns: time,
                    }));
                }
                frames.push(Frame::VcpuEdges(edges));
            }
            Some(RunEdge::Entry) => frames.push(Frame::VcpuGuest(VcpuGuest {
                pid: edges.tgid,
                tid,
                left_ns: Some(edges.guest_exit).filter(|left| *left != 0),
                entered_ns: Some(time),
            })),
            Some(RunEdge::End) => self.edges(tid, &edges, frames),
            None => {}
        }
    }
}

fn kernel_fn(call: &Call) -> Option<KernelFn> {
    Some(KernelFn {
        pid: call.header.tgid,
        tid: call.header.tid,
        function: Function::from_u32(call.function)?.symbol().to_string(),
        enter_ns: call.start,
        exit_ns: call.header.time,
        ret: i64::from(call.ret),
        calls: Vec::new(),
    })
}

fn thread(pid: u32, tid: u32) -> Option<Frame> {
    let name = Some(process::thread_name(pid, tid)).filter(|name| !name.is_empty())?;
    Some(Frame::Thread(recording::Thread { pid, tid, name }))
}

/// A text up to its NUL. What the program copied is the process's, so it may be anything.
fn string(text: &[u8; TEXT_LEN]) -> String {
    let end = text.iter().position(|byte| *byte == 0).unwrap_or(TEXT_LEN);
    String::from_utf8_lossy(text.get(..end).unwrap_or_default()).into_owned()
}
