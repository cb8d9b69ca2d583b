//! What both sides must agree on before a byte of RAM is sent.

use std::ffi::CString;

use super::message::{Hello, Terms, Token};
use crate::memory::PAGE_SIZE;
use crate::probes::Errno;

/// The part of a VM that the other side must have too.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Shape {
    /// The architecture's name.
    pub(crate) arch: String,
    /// Regions of RAM: guest-physical address and size.
    pub(crate) ram: Vec<(u64, u64)>,
    /// vCPUs.
    pub(crate) vcpus: u32,
    /// Devices in machine order: name and version of the state.
    pub(crate) devices: Vec<(String, u32)>,
}

/// The first thing in which the two sides differ.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the destination can't take this guest: its {what} {here}, the source's {there}")]
pub(crate) struct Mismatch {
    what: &'static str,
    here: String,
    there: String,
}

impl Errno for Mismatch {
    fn errno(&self) -> i32 {
        libc::EINVAL
    }
}

impl Shape {
    /// The devices' names, for probes.
    pub(crate) fn device_names(&self) -> Vec<CString> {
        let name = |(name, _): &(String, u32)| CString::new(name.as_str()).unwrap_or_default();
        self.devices.iter().map(name).collect()
    }

    /// The source's introduction.
    pub(crate) fn hello(&self, id: u64, token: Token, terms: Terms) -> Hello {
        let Shape {
            arch,
            ram,
            vcpus,
            devices,
        } = self.clone();
        Hello {
            id,
            token,
            terms,
            arch,
            page_size: PAGE_SIZE,
            ram,
            vcpus,
            devices,
        }
    }

    /// Whether this VM can take the guest that `hello` introduces.
    ///
    /// # Errors
    /// Names the first difference.
    pub(crate) fn accepts(&self, hello: &Hello) -> Result<(), Mismatch> {
        let ours = self.hello(hello.id, hello.token, hello.terms);
        let same = |what, here: String, there: String| {
            if here == there {
                Ok(())
            } else {
                Err(Mismatch { what, here, there })
            }
        };
        same("architecture is", ours.arch, hello.arch.clone())?;
        same(
            "pages have bytes:",
            ours.page_size.to_string(),
            hello.page_size.to_string(),
        )?;
        same("RAM is", ram_text(&ours.ram), ram_text(&hello.ram))?;
        same(
            "number of vCPUs is",
            ours.vcpus.to_string(),
            hello.vcpus.to_string(),
        )?;
        same(
            "devices are",
            device_text(&ours.devices),
            device_text(&hello.devices),
        )
    }
}

fn ram_text(regions: &[(u64, u64)]) -> String {
    let region = |&(gpa, size): &(u64, u64)| format!("{size:#x} bytes at {gpa:#x}");
    regions.iter().map(region).collect::<Vec<_>>().join(" and ")
}

fn device_text(devices: &[(String, u32)]) -> String {
    let device = |(name, version): &(String, u32)| format!("{name} v{version}");
    devices.iter().map(device).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    const TERMS: Terms = Terms {
        answered: true,
        shared: false,
        lanes: 0,
        mapped: None,
    };

    fn shape() -> Shape {
        Shape {
            arch: "aarch64".into(),
            ram: vec![(0x4000_0000, 0x800_0000)],
            vcpus: 1,
            devices: vec![("cpu/0".into(), 1), ("gic".into(), 1)],
        }
    }

    #[test]
    fn equal_shapes_agree() {
        assert_eq!(shape().accepts(&shape().hello(1, [0; 16], TERMS)), Ok(()));
    }

    #[test]
    fn a_difference_is_named() {
        type Change = fn(&mut Hello);
        let cases: [(Change, &str); 5] = [
            (
                |h| h.arch = "x86_64".into(),
                "architecture is aarch64, the source's x86_64",
            ),
            (
                |h| h.page_size = 65536,
                "pages have bytes: 4096, the source's 65536",
            ),
            (
                |h| h.ram[0].1 = 0x1000_0000,
                "RAM is 0x8000000 bytes at 0x40000000, the source's 0x10000000 bytes at 0x40000000",
            ),
            (|h| h.vcpus = 4, "number of vCPUs is 1, the source's 4"),
            (
                |h| h.devices[1].1 = 2,
                "devices are cpu/0 v1, gic v1, the source's cpu/0 v1, gic v2",
            ),
        ];
        for (change, text) in cases {
            let mut hello = shape().hello(1, [0; 16], TERMS);
            change(&mut hello);
            let error = shape().accepts(&hello).unwrap_err().to_string();
            assert!(error.ends_with(text), "{error}");
        }
    }
}
