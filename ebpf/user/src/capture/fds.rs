//! What file descriptors stand for: the same group and attribute mean other things on an ITS than
//! on a GIC. Learnt from the ioctls that make KVM's descriptors, and from `/proc/PID/fd` for what
//! was made before.

use std::collections::HashMap;
use std::path::Path;

use blackout_abi::event::Ioctl;

use super::process;
use crate::recording::FdKind;

// include/uapi/linux/kvm.h
const KVM_CREATE_VM: u32 = 0xae01;
const KVM_CREATE_VCPU: u32 = 0xae41;
const KVM_CREATE_DEVICE: u32 = 0xc00c_aee0;
const KVM_CREATE_DEVICE_TEST: u32 = 1;
const KVM_DEV_TYPE_ARM_VGIC_V3: u32 = 7;
const KVM_DEV_TYPE_ARM_VGIC_ITS: u32 = 8;

/// The descriptors of every process that is recorded.
#[derive(Debug, Default)]
pub(super) struct Fds {
    known: HashMap<(u32, u32), Fd>,
}

/// What a descriptor stands for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Fd {
    pub(super) kind: FdKind,
    /// The index, of a vCPU.
    pub(super) vcpu: Option<u32>,
}

impl Fds {
    /// Looks at the descriptors that a process has.
    pub(super) fn scan(&mut self, pid: u32) {
        for (fd, link) in process::descriptors(pid) {
            self.known.insert((pid, fd), Fd::from_link(&link));
        }
    }

    /// Learns from an ioctl that has returned.
    pub(super) fn learn(&mut self, call: &Ioctl) {
        let pid = call.header.tgid;
        let Ok(ret) = u32::try_from(call.ret) else {
            return;
        };
        match call.cmd {
            KVM_CREATE_VM => {
                self.set(pid, call.fd, FdKind::Kvm, None);
                self.set(pid, ret, FdKind::Vm, None);
            }
            KVM_CREATE_VCPU => {
                self.set(pid, call.fd, FdKind::Vm, None);
                self.set(pid, ret, FdKind::Vcpu, u32::try_from(call.arg).ok());
            }
            KVM_CREATE_DEVICE if call.head_len == 12 => {
                let [kind, fd, flags, ..] = call.head;
                if flags & KVM_CREATE_DEVICE_TEST == 0 {
                    let kind = match kind {
                        KVM_DEV_TYPE_ARM_VGIC_ITS => FdKind::Its,
                        KVM_DEV_TYPE_ARM_VGIC_V3 => FdKind::Gic,
                        _ => FdKind::Device,
                    };
                    self.set(pid, fd, kind, None);
                }
            }
            _ => {}
        }
    }

    /// What `fd` of process `pid` stands for. One that is not known is looked up, once.
    pub(super) fn get(&mut self, pid: u32, fd: u32) -> Fd {
        *self.known.entry((pid, fd)).or_insert_with(|| {
            process::descriptor(pid, fd)
                .map(|link| Fd::from_link(&link))
                .unwrap_or_default()
        })
    }

    /// Forgets a process that ended.
    pub(super) fn forget(&mut self, pid: u32) {
        self.known.retain(|(owner, _), _| *owner != pid);
    }

    fn set(&mut self, pid: u32, fd: u32, kind: FdKind, vcpu: Option<u32>) {
        self.known.insert((pid, fd), Fd { kind, vcpu });
    }
}

impl Fd {
    /// From where `/proc/PID/fd/N` points. KVM names a device's descriptor after the device
    /// (`struct kvm_device_ops`), and a vCPU's by its index (`create_vcpu_fd`).
    fn from_link(link: &Path) -> Self {
        let text = link.to_string_lossy();
        let kind = match text.strip_prefix("anon_inode:").map(unbracketed) {
            Some("kvm-vm") => FdKind::Vm,
            Some("kvm-arm-vgic-its") => FdKind::Its,
            Some("kvm-arm-vgic-v3") => FdKind::Gic,
            Some(name) if name.starts_with("kvm-vcpu") => FdKind::Vcpu,
            Some(name) if name.starts_with("kvm-") => FdKind::Device,
            None if text == "/dev/kvm" => FdKind::Kvm,
            _ => FdKind::Unknown,
        };
        let index = text
            .rsplit_once(':')
            .and_then(|(_, index)| unbracketed(index).parse().ok());
        Self {
            kind,
            vcpu: index.filter(|_| kind == FdKind::Vcpu),
        }
    }
}

fn unbracketed(name: &str) -> &str {
    name.trim_start_matches('[').trim_end_matches(']')
}

#[cfg(test)]
mod tests {
    use blackout_abi::event::{Header, Kind};

    use super::*;

    fn call(fd: u32, cmd: u32, arg: u64, ret: i64, head: [u32; 3]) -> Ioctl {
        let [first, second, third] = head;
        Ioctl {
            header: Header {
                time: 2,
                kind: Kind::Ioctl as u32,
                tgid: 7,
                tid: 8,
                cpu: 0,
            },
            start: 1,
            fd,
            cmd,
            arg,
            ret,
            head: [first, second, third, 0, 0, 0],
            head_len: (cmd >> 16) & 0x3fff,
            reserved: 0,
        }
    }

    #[test]
    fn names_in_proc_tell_the_kind() {
        let table = [
            ("/dev/kvm", FdKind::Kvm, None),
            ("anon_inode:kvm-vm", FdKind::Vm, None),
            ("anon_inode:kvm-vcpu:3", FdKind::Vcpu, Some(3)),
            ("anon_inode:[kvm-vcpu:3]", FdKind::Vcpu, Some(3)),
            ("anon_inode:kvm-arm-vgic-its", FdKind::Its, None),
            ("anon_inode:kvm-arm-vgic-v3", FdKind::Gic, None),
            ("anon_inode:kvm-vfio", FdKind::Device, None),
            ("anon_inode:[eventfd]", FdKind::Unknown, None),
            ("socket:[12345]", FdKind::Unknown, None),
        ];
        for (link, kind, vcpu) in table {
            assert_eq!(Fd::from_link(Path::new(link)), Fd { kind, vcpu }, "{link}");
        }
    }

    #[test]
    fn descriptors_are_learnt_as_they_are_made() {
        let mut fds = Fds::default();
        fds.learn(&call(3, KVM_CREATE_VM, 0, 4, [0; 3]));
        fds.learn(&call(4, KVM_CREATE_VCPU, 1, 5, [0; 3]));
        fds.learn(&call(
            4,
            KVM_CREATE_DEVICE,
            0,
            0,
            [KVM_DEV_TYPE_ARM_VGIC_V3, 6, 0],
        ));
        fds.learn(&call(
            4,
            KVM_CREATE_DEVICE,
            0,
            0,
            [KVM_DEV_TYPE_ARM_VGIC_ITS, 9, 0],
        ));
        let kinds = [3, 4, 5, 6, 9].map(|fd| fds.get(7, fd).kind);
        assert_eq!(
            kinds,
            [
                FdKind::Kvm,
                FdKind::Vm,
                FdKind::Vcpu,
                FdKind::Gic,
                FdKind::Its
            ]
        );
        assert_eq!(fds.get(7, 5).vcpu, Some(1));
    }

    #[test]
    fn what_failed_or_only_asked_makes_nothing() {
        let mut fds = Fds::default();
        fds.learn(&call(3, KVM_CREATE_VM, 0, -12, [0; 3]));
        fds.learn(&call(
            4,
            KVM_CREATE_DEVICE,
            0,
            0,
            [KVM_DEV_TYPE_ARM_VGIC_ITS, 9, 1],
        ));
        assert_eq!(fds.known, HashMap::new());
    }

    #[test]
    fn a_process_is_forgotten_alone() {
        let mut fds = Fds::default();
        fds.set(7, 3, FdKind::Kvm, None);
        fds.set(8, 3, FdKind::Kvm, None);
        fds.forget(7);
        assert_eq!(fds.known.keys().copied().collect::<Vec<_>>(), [(8, 3)]);
    }
}
