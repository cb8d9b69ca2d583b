//! The loaded eBPF object: its settings and its maps. Which of its programs run, and where, is
//! [`attach`](super::attach)'s part.

use std::io::ErrorKind;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use aya::maps::{Array, HashMap, Map, MapData, MapError, PerCpuArray, RingBuf};
use aya::{Ebpf, EbpfLoader};
use blackout_abi::event::{Lost, RunEdges, SiteSpec};

use super::{Backend, Error, kernel, multi};

/// More sites than QEMU has with every trace point, at 200 bytes each.
pub(super) const MAX_SITES: usize = 8192;

/// What a user may set.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// A vCPU that is out of `KVM_RUN` for longer than this is reported, ns.
    pub gap_ns: u64,
    /// Whether processes that make an ioctl of KVM are recorded without being named.
    pub all: bool,
    /// Size of the ring buffer, bytes; rounded up to a power of two.
    pub buffer: u32,
    /// The ways by which KVM's calls may be seen.
    pub backend: Backend,
}

/// The eBPF programs and maps in the kernel. Dropping it takes them all away.
pub struct Programs {
    pub(super) backend: Backend,
    pub(super) ebpf: Ebpf,
    /// The USDT program as one link can put it onto many sites, or why there is none.
    pub(super) multi: Result<OwnedFd, multi::Error>,
    pub(super) records: RingBuf<MapData>,
    lost: PerCpuArray<MapData, Lost>,
    targets: HashMap<MapData, u32, u8>,
    sites: Array<MapData, SiteSpec>,
    runs: HashMap<MapData, u32, RunEdges>,
}

impl Programs {
    /// Creates the maps of `object`; its programs are loaded when they are attached.
    ///
    /// # Errors
    /// [`Error::Rights`], [`Error::Load`], [`Error::Foreign`] and [`Error::Map`].
    pub fn load(object: &[u8], options: Options) -> Result<Self, Error> {
        kernel::check_rights()?;
        let buffer = options
            .buffer
            .max(4096)
            .checked_next_power_of_two()
            .unwrap_or(1 << 31);
        let wake_bytes = u64::from(buffer / 2);
        let (pidns_dev, pidns_ino) = kernel::pid_namespace()?;
        let registers = kernel::registers();
        let mut ebpf = EbpfLoader::new()
            .map_max_entries("RECORDS", buffer)
            .map_max_entries("SITES", MAX_SITES as u32)
            .override_global("GAP_NS", &options.gap_ns, true)
            .override_global("ALL", &u64::from(options.all), true)
            .override_global("WAKE_BYTES", &wake_bytes, true)
            .override_global("PIDNS_DEV", &pidns_dev, true)
            .override_global("PIDNS_INO", &pidns_ino, true)
            .override_global("RETURN_OFFSET", &registers.return_value, true)
            .override_global("FIRST_ARG_OFFSET", &registers.first_arg, true)
            .override_global("SECOND_ARG_OFFSET", &registers.second_arg, true)
            .override_global("THIRD_ARG_OFFSET", &registers.third_arg, true)
            // The programs have nothing to relocate, and parsing the kernel's BTF takes long.
            .btf(None)
            .load(object)
            .map_err(|source| Error::Load(Box::new(source)))?;
        Ok(Self {
            backend: options.backend,
            multi: multi::load(object, &ebpf, "usdt_sleepable"),
            records: map(&mut ebpf, "RECORDS")?,
            lost: map(&mut ebpf, "LOST")?,
            targets: map(&mut ebpf, "TARGETS")?,
            sites: map(&mut ebpf, "SITES")?,
            runs: map(&mut ebpf, "RUNS")?,
            ebpf,
        })
    }

    /// Hands the programs a site; `cookie` is what its uprobe was given.
    pub(super) fn set_site(&mut self, cookie: u32, spec: &SiteSpec) -> Result<(), Error> {
        self.sites.set(cookie, spec, 0).map_err(failed("SITES"))
    }

    /// From here on the process is traced.
    pub(super) fn add_target(&mut self, pid: u32) -> Result<(), Error> {
        self.targets.insert(pid, 1, 0).map_err(failed("TARGETS"))
    }

    /// The process is to be left alone from here on; it may have ended, or been removed before.
    pub(super) fn remove_target(&mut self, pid: u32) -> Result<(), Error> {
        match self.targets.remove(&pid) {
            Err(MapError::SyscallError(error)) if error.io_error.kind() == ErrorKind::NotFound => {
                Ok(())
            }
            result => result.map_err(failed("TARGETS")),
        }
    }

    /// The edges of every vCPU thread that lives. One that changes while it is read may be missed.
    pub(super) fn runs(&self) -> impl Iterator<Item = (u32, RunEdges)> {
        self.runs.iter().filter_map(Result::ok)
    }

    /// Records lost so far.
    pub(super) fn lost(&self) -> Result<u64, Error> {
        let per_cpu = self.lost.get(&0, 0).map_err(failed("LOST"))?;
        Ok(per_cpu.iter().flat_map(|lost| lost.by_kind).sum())
    }

    /// The ring buffer's descriptor: readable when the buffer fills.
    pub(super) fn records_fd(&self) -> BorrowedFd<'_> {
        self.records.as_fd()
    }
}

/// Takes a map out of the object, as the type that it is.
fn map<T: TryFrom<Map, Error = MapError>>(ebpf: &mut Ebpf, name: &'static str) -> Result<T, Error> {
    let map = ebpf.take_map(name).ok_or(Error::Foreign(name))?;
    T::try_from(map).map_err(failed(name))
}

fn failed(name: &'static str) -> impl Fn(MapError) -> Error {
    move |source| Error::Map { name, source }
}
