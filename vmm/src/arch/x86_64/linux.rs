//! Starts Linux: a bzImage by the 32-bit boot protocol (`Documentation/arch/x86/boot.rst`), an
//! uncompressed `vmlinux` by PVH (Xen's `public/arch-x86/hvm/start_info.h`).
//!
//! Both begin in protected mode without paging, with flat segments, and find in a register the
//! address of a page that leads to the rest: memory map, command line, initial RAM disk, ACPI
//! tables. `layout` says where everything lies.

use std::fs::File;
use std::io::{Read, Seek};
use std::ops::Range;

use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use linux_loader::loader::elf::start_info::{
    XEN_HVM_START_MAGIC_VALUE, hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
};
use linux_loader::loader::{BzImage, Elf, KernelLoader, KernelLoaderResult, PvhBootCapability};
use object::elf::ELFMAG;
use vm_memory::{ByteValued, Bytes, GuestAddress};

use super::layout::{ACPI, BOOT_INFO, CMDLINE, KERNEL_MIN, LEGACY_HOLE, MEMORY_MAP, MODULES, PCI};
use super::{Entry, Error, acpi, boot};
use crate::arch::BootParams;
use crate::memory::{GuestRam, PAGE_SIZE};
use crate::payload::linux::{self, Linux};
use crate::payload::{self};

/// Kinds of memory, in both protocols' maps (ACPI 6.5, 15.1).
const RAM: u32 = 1;
const RESERVED: u32 = 2;
const ACPI_TABLES: u32 = 3;

/// `setup_header.type_of_loader`: one that has no number of its own.
const LOADER: u8 = 0xff;
/// The highest address of the initial RAM disk, for kernels that do not say.
const INITRD_MAX: u64 = 0x37ff_ffff;

/// Loads the kernel, its initial RAM disk, and all that the kernel is told, into fresh RAM.
///
/// # Errors
/// When a file can't be loaded or has no place.
pub(super) fn load(ram: &GuestRam, linux: &Linux, params: &BootParams<'_>) -> Result<Entry, Error> {
    let mut file = linux::open_kernel(&linux.kernel, ram.size())?;
    let foreign = |problem: &str| linux::Error::Foreign {
        path: linux.kernel.clone(),
        problem: problem.to_owned(),
    };
    let kernel = Kernel::load(ram, &mut file).map_err(|source| linux::Error::Kernel {
        path: linux.kernel.clone(),
        source,
    })?;
    let start = kernel
        .entry()
        .ok_or_else(|| foreign("it has no PVH entry point; give the bzImage of the same build"))?;
    let used = kernel.memory();
    let low_end = ram.regions().next().map_or(0, |(start, size)| start + size);
    if used.end > low_end {
        let (path, gpa) = (linux.kernel.clone(), used.start);
        let size = used.end - used.start;
        return Err(linux::Error::Place { path, gpa, size }.into());
    }
    // As high as it may lie: behind the kernel it would be in the way of its unpacking.
    let highest = low_end.min(kernel.initrd_max() + 1);
    let place = |size: u64| {
        let start = highest.checked_sub(size)? & !(PAGE_SIZE - 1);
        (start >= used.end).then_some(start)
    };
    let load_initrd = |path| linux::load_initrd(ram, path, used.end, place);
    let initrd = linux.initrd.as_deref().map(load_initrd).transpose()?;

    boot::write_gdt(ram)?;
    let (_, cmdline) = payload::boot_cmdline(params.cmdline)?;
    put(ram, CMDLINE, &cmdline)?;
    let told = Told {
        cmdline_size: params.cmdline.len() as u32,
        rsdp: acpi::write(ram, params.vcpus)?,
        initrd,
        map: memory_map(ram),
    };
    match kernel {
        Kernel::Compressed(_, header) => {
            put(ram, BOOT_INFO, told.boot_params(header).as_slice())?;
            Ok(Entry::protected(start, BOOT_INFO))
        }
        Kernel::Plain(_) => {
            put(ram, BOOT_INFO, told.start_info().as_slice())?;
            let (map, modules) = (told.pvh_map(), told.pvh_modules());
            for (gpa, entry) in (MEMORY_MAP..)
                .step_by(size_of::<hvm_memmap_table_entry>())
                .zip(&map)
            {
                put(ram, gpa, entry.as_slice())?;
            }
            if let Some(module) = &modules {
                put(ram, MODULES, module.as_slice())?;
            }
            Ok(Entry::protected(start, BOOT_INFO))
        }
    }
}

fn put(ram: &GuestRam, gpa: u64, bytes: &[u8]) -> Result<(), payload::Error> {
    Ok(ram.mem().write_slice(bytes, GuestAddress(gpa))?)
}

/// A kernel in RAM.
enum Kernel {
    /// A bzImage, which unpacks itself.
    Compressed(KernelLoaderResult, setup_header),
    /// A `vmlinux`.
    Plain(KernelLoaderResult),
}

impl Kernel {
    fn load(ram: &GuestRam, file: &mut File) -> Result<Self, linux_loader::loader::Error> {
        let mut magic = [0; 4];
        let is_elf = file.read_exact(&mut magic).is_ok() && magic == ELFMAG;
        // What can't be read here can't be read there either, and is reported.
        let _ = file.rewind();
        let min = Some(GuestAddress(KERNEL_MIN));
        if is_elf {
            return Ok(Kernel::Plain(Elf::load(ram.mem(), None, file, None)?));
        }
        let loaded = BzImage::load(ram.mem(), None, file, min)?;
        let header = loaded.setup_header.unwrap_or_default();
        Ok(Kernel::Compressed(loaded, header))
    }

    /// Its first instruction, guest-physical.
    fn entry(&self) -> Option<u64> {
        match self {
            Kernel::Compressed(loaded, _) => Some(loaded.kernel_load.0),
            Kernel::Plain(loaded) => match loaded.pvh_boot_cap {
                PvhBootCapability::PvhEntryPresent(entry) => Some(entry.0),
                _ => None,
            },
        }
    }

    /// What it needs for itself, once it is unpacked.
    fn memory(&self) -> Range<u64> {
        let (Kernel::Compressed(loaded, _) | Kernel::Plain(loaded)) = self;
        let (start, mut end) = (loaded.kernel_load.0, loaded.kernel_end);
        if let Kernel::Compressed(_, header) = self {
            let preferred = header.pref_address.max(start);
            end = end.max(preferred.saturating_add(header.init_size.into()));
        }
        start..end
    }

    fn initrd_max(&self) -> u64 {
        match self {
            Kernel::Compressed(_, header) if { header.version } >= 0x0203 => {
                header.initrd_addr_max.into()
            }
            Kernel::Compressed(..) => INITRD_MAX,
            Kernel::Plain(_) => u32::MAX.into(),
        }
    }
}

/// What a kernel is told of its machine.
struct Told {
    cmdline_size: u32,
    rsdp: u64,
    initrd: Option<Range<u64>>,
    /// Address, size, kind.
    map: Vec<(u64, u64, u32)>,
}

impl Told {
    fn boot_params(&self, header: setup_header) -> boot_params {
        let mut params = boot_params {
            hdr: header,
            acpi_rsdp_addr: self.rsdp,
            e820_entries: self.map.len() as u8,
            ..Default::default()
        };
        params.hdr.type_of_loader = LOADER;
        params.hdr.cmd_line_ptr = CMDLINE as u32;
        params.hdr.cmdline_size = self.cmdline_size;
        if let Some(Range { start, end }) = self.initrd {
            params.hdr.ramdisk_image = start as u32;
            params.hdr.ramdisk_size = (end - start) as u32;
        }
        for (entry, &(addr, size, kind)) in params.e820_table.iter_mut().zip(&self.map) {
            *entry = boot_e820_entry {
                addr,
                size,
                r#type: kind,
            };
        }
        params
    }

    fn start_info(&self) -> hvm_start_info {
        hvm_start_info {
            magic: XEN_HVM_START_MAGIC_VALUE,
            version: 1,
            nr_modules: u32::from(self.initrd.is_some()),
            modlist_paddr: MODULES,
            cmdline_paddr: CMDLINE,
            rsdp_paddr: self.rsdp,
            memmap_paddr: MEMORY_MAP,
            memmap_entries: self.map.len() as u32,
            ..Default::default()
        }
    }

    fn pvh_map(&self) -> Vec<hvm_memmap_table_entry> {
        let entry = |&(addr, size, type_)| hvm_memmap_table_entry {
            addr,
            size,
            type_,
            reserved: 0,
        };
        self.map.iter().map(entry).collect()
    }

    fn pvh_modules(&self) -> Option<hvm_modlist_entry> {
        self.initrd.as_ref().map(|initrd| hvm_modlist_entry {
            paddr: initrd.start,
            size: initrd.end - initrd.start,
            ..Default::default()
        })
    }
}

/// RAM but for where PCs have their graphics and firmware, the ACPI tables in there, and ECAM,
/// which the kernel only believes in when its place is reserved.
fn memory_map(ram: &GuestRam) -> Vec<(u64, u64, u32)> {
    let length = |range: &Range<u64>| range.end - range.start;
    let mut map = Vec::new();
    for (start, size) in ram.regions() {
        let end = start + size;
        if start < LEGACY_HOLE.start && LEGACY_HOLE.end < end {
            map.push((start, LEGACY_HOLE.start - start, RAM));
            map.push((ACPI.start, length(&ACPI), ACPI_TABLES));
            map.push((LEGACY_HOLE.end, end - LEGACY_HOLE.end, RAM));
        } else {
            map.push((start, size, RAM));
        }
    }
    map.push((PCI.ecam.start, length(&PCI.ecam), RESERVED));
    map.sort_unstable();
    map
}

#[cfg(test)]
mod tests {
    use super::super::layout::ram_layout;
    use super::*;

    #[test]
    fn the_memory_map_leaves_out_what_is_no_ram() {
        let ram = GuestRam::new(&ram_layout(4 << 30).unwrap()).unwrap();
        let expected = [
            (0, 0xa_0000, RAM),
            (0xe_0000, 0x2_0000, ACPI_TABLES),
            (0x10_0000, 0xbff0_0000, RAM),
            (0xe000_0000, 0x10_0000, RESERVED),
            (0x1_0000_0000, 0x4000_0000, RAM),
        ];
        assert_eq!(memory_map(&ram), expected);
    }

    #[test]
    fn both_protocols_tell_the_same() {
        let told = Told {
            cmdline_size: 5,
            rsdp: ACPI.start,
            initrd: Some(0x20_0000..0x20_1000),
            map: vec![(0, 0x1000, RAM)],
        };
        let params = told.boot_params(setup_header::default());
        let (image, size) = (params.hdr.ramdisk_image, params.hdr.ramdisk_size);
        assert_eq!((image, size), (0x20_0000, 0x1000));
        assert_eq!(
            ({ params.acpi_rsdp_addr }, params.e820_entries),
            (ACPI.start, 1)
        );
        let info = told.start_info();
        assert_eq!((info.nr_modules, info.memmap_entries), (1, 1));
        assert_eq!(info.rsdp_paddr, ACPI.start);
        let module = told.pvh_modules().unwrap();
        assert_eq!((module.paddr, module.size), (0x20_0000, 0x1000));
    }
}
