//! Loads a uprobe program for multi-links (`BPF_TRACE_UPROBE_MULTI`), one link for all sites of a
//! process. aya 0.14 cannot, though it has all the parts; a single link matters because the kernel
//! takes perf uprobes away one by one, waiting each time: seconds for a monitor's probes.
#![allow(unsafe_code)]

use std::collections::HashSet;
use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};

use aya::Ebpf;
use aya::maps::{Map, MapData};
use aya_obj::generated::bpf_insn;
use aya_obj::relocation::EbpfRelocationError;
use aya_obj::{Object, ParseError};
use thiserror::Error;

use super::kernel;

/// Why the program could not be loaded this way.
#[derive(Debug, Error)]
pub(super) enum Error {
    /// A multi-link that is given a process traced its first thread only.
    #[error("before Linux 6.10 it misses the threads of a process")]
    OldKernel,
    /// The object has no such program.
    #[error("the object has no such program")]
    NoProgram,
    /// The object could not be parsed.
    #[error("cannot parse the object")]
    Parse(#[from] ParseError),
    /// A map that the program uses is not there.
    #[error("cannot relocate the program")]
    Relocate(#[from] EbpfRelocationError),
    /// The kernel refused the program.
    #[error("the kernel refuses the program")]
    Load(#[from] io::Error),
}

/// The head of the part of `union bpf_attr` that `BPF_PROG_LOAD` takes
/// (`include/uapi/linux/bpf.h`).
#[repr(C)]
#[derive(Default)]
struct ProgLoad {
    kind: u32,
    instruction_count: u32,
    instructions: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log: u64,
    kernel_version: u32,
    flags: u32,
    name: [u8; 16],
    interface: u32,
    expected_attach_type: u32,
}

const BPF_PROG_LOAD: libc::c_int = 5;
const BPF_PROG_TYPE_KPROBE: u32 = 2;
const BPF_F_SLEEPABLE: u32 = 1 << 4;
const BPF_TRACE_UPROBE_MULTI: u32 = 48;

/// Loads the uprobe program `name` of `object`, which may sleep, on the maps that `ebpf` made of
/// the same object.
///
/// # Errors
/// Whatever keeps the kernel or aya from it; the perf way is there for that.
pub(super) fn load(object: &[u8], ebpf: &Ebpf, name: &str) -> Result<OwnedFd, Error> {
    if !kernel::is_at_least(6, 10) {
        return Err(Error::OldKernel);
    }
    let mut object = Object::parse(object)?;
    let sections: HashSet<_> = object
        .functions
        .keys()
        .map(|(section, _)| *section)
        .collect();
    let maps = std::mem::take(&mut object.maps);
    let described = maps
        .iter()
        .filter_map(|(name, map)| Some((name.as_str(), descriptor(ebpf.map(name)?)?, map)));
    object.relocate_maps(described, &sections)?;
    object.relocate_calls(&sections)?;
    let program = object.programs.get(name).ok_or(Error::NoProgram)?;
    let function = object
        .functions
        .get(&program.function_key())
        .ok_or(Error::NoProgram)?;
    Ok(load_program(
        name,
        &function.instructions,
        &program.license,
    )?)
}

fn load_program(name: &str, instructions: &[bpf_insn], license: &CStr) -> io::Result<OwnedFd> {
    let mut attr = ProgLoad {
        kind: BPF_PROG_TYPE_KPROBE,
        instruction_count: instructions.len() as u32,
        instructions: instructions.as_ptr() as u64,
        license: license.as_ptr() as u64,
        flags: BPF_F_SLEEPABLE,
        expected_attach_type: BPF_TRACE_UPROBE_MULTI,
        ..Default::default()
    };
    // The last byte stays 0: the kernel wants the name terminated.
    for (to, from) in attr.name.iter_mut().take(15).zip(name.bytes()) {
        *to = from;
    }
    // SAFETY: `attr` is as long as the size given; it, the instructions, of which there are as many
    // as it says, and the NUL-terminated licence outlive the call.
    let fd = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            BPF_PROG_LOAD,
            &raw const attr,
            size_of::<ProgLoad>(),
        )
    };
    let Some(fd) = i32::try_from(fd).ok().filter(|fd| *fd >= 0) else {
        return Err(io::Error::last_os_error());
    };
    // SAFETY: the kernel just made it for this call, so nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// The descriptor of a map of one of the types that the programs use.
fn descriptor(map: &Map) -> Option<RawFd> {
    let fd = |data: &MapData| data.fd().as_fd().as_raw_fd();
    match map {
        Map::Array(data) | Map::HashMap(data) | Map::PerCpuArray(data) | Map::RingBuf(data) => {
            Some(fd(data))
        }
        _ => None,
    }
}
