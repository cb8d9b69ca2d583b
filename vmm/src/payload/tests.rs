//! Payloads that load, and those that must not.

use std::mem::offset_of;

use blackout_abi::guest::BOOT_MAGIC;

use super::*;

const RAM: u64 = 0x20_0000;

/// An ELF64 file for x86-64 with one executable segment of three bytes at 1 MiB.
struct Elf {
    machine: u16,
    entry: u64,
    phoff: u64,
    phnum: u16,
    offset: u64,
    vaddr: u64,
    paddr: u64,
    filesz: u64,
    memsz: u64,
    flags: u32,
}

const ELF: Elf = Elf {
    machine: elf::EM_X86_64,
    entry: 0x10_0001,
    phoff: 64,
    phnum: 1,
    offset: 120,
    vaddr: 0x10_0000,
    paddr: 0x10_0000,
    filesz: 3,
    memsz: 0x1000,
    flags: 5,
};

impl Elf {
    fn bytes(&self) -> Vec<u8> {
        let mut out = b"\x7fELF\x02\x01\x01".to_vec();
        out.resize(16, 0);
        out.extend(2u16.to_le_bytes());
        out.extend(self.machine.to_le_bytes());
        out.extend(1u32.to_le_bytes());
        for word in [self.entry, self.phoff, 0] {
            out.extend(word.to_le_bytes());
        }
        out.extend(0u32.to_le_bytes());
        for half in [64u16, 56, self.phnum, 64, 0, 0] {
            out.extend(half.to_le_bytes());
        }
        out.extend(1u32.to_le_bytes());
        out.extend(self.flags.to_le_bytes());
        for word in [
            self.offset,
            self.vaddr,
            self.paddr,
            self.filesz,
            self.memsz,
            0x1000,
        ] {
            out.extend(word.to_le_bytes());
        }
        out.extend(b"abc");
        out
    }
}

fn load(file: &[u8]) -> Result<(u64, RamMap), Error> {
    let mem = RamMap::from_ranges(&[(GuestAddress(0), RAM as usize)]).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("payload");
    std::fs::write(&path, file).unwrap();
    let target = Target {
        machine: elf::EM_X86_64,
        flat_gpa: 0x10_0000,
        reserved: 0x1000..0x9000,
    };
    let entry = load_elf_or_flat(&mem, &path, &target)?;
    Ok((entry, mem))
}

#[test]
fn an_elf_file_is_loaded_and_entered_at_its_physical_addresses() {
    let moved = Elf {
        vaddr: 0xffff_ffff_8000_0000,
        entry: 0xffff_ffff_8000_0002,
        ..ELF
    };
    for (file, wanted) in [(ELF.bytes(), 0x10_0001), (moved.bytes(), 0x10_0002)] {
        let (entry, mem) = load(&file).unwrap();
        let mut bytes = [0; 4];
        mem.read_slice(&mut bytes, GuestAddress(0x10_0000)).unwrap();
        assert_eq!((entry, &bytes), (wanted, b"abc\0"));
    }
}

#[test]
fn a_flat_binary_is_loaded_and_entered_at_its_first_byte() {
    let (entry, mem) = load(b"xy").unwrap();
    let byte: u8 = mem.read_obj(GuestAddress(0x10_0001)).unwrap();
    assert_eq!((entry, byte), (0x10_0000, b'y'));
}

#[test]
fn hostile_files_are_refused_with_a_reason() {
    let end = RAM - 0x800;
    let cases: &[(&str, Vec<u8>)] = &[
        ("the payload is empty", vec![]),
        ("not a 64-bit", b"\x7fELF".to_vec()),
        ("not a 64-bit", ELF.bytes()[..40].to_vec()),
        (
            "for arm64; this monitor runs x86-64",
            Elf {
                machine: 183,
                ..ELF
            }
            .bytes(),
        ),
        (
            "damaged",
            Elf {
                phoff: u64::MAX,
                ..ELF
            }
            .bytes(),
        ),
        (
            "damaged",
            Elf {
                phnum: u16::MAX,
                ..ELF
            }
            .bytes(),
        ),
        ("damaged", Elf { phnum: 2, ..ELF }.bytes()),
        ("no executable segment", Elf { phnum: 0, ..ELF }.bytes()),
        ("no executable segment", Elf { flags: 6, ..ELF }.bytes()),
        ("no executable segment", Elf { entry: 0, ..ELF }.bytes()),
        ("don't lie in guest RAM", Elf { paddr: end, ..ELF }.bytes()),
        (
            "don't lie in guest RAM",
            Elf {
                paddr: u64::MAX,
                ..ELF
            }
            .bytes(),
        ),
        (
            "don't lie in guest RAM",
            Elf {
                memsz: u64::MAX,
                ..ELF
            }
            .bytes(),
        ),
        (
            "the monitor's boot pages",
            Elf {
                paddr: 0x500,
                ..ELF
            }
            .bytes(),
        ),
        (
            "more room in the file",
            Elf {
                filesz: 0x1001,
                ..ELF
            }
            .bytes(),
        ),
        ("end before the file says", Elf { filesz: 4, ..ELF }.bytes()),
        (
            "beyond the end",
            Elf {
                offset: u64::MAX,
                ..ELF
            }
            .bytes(),
        ),
        (
            "beyond the end",
            Elf {
                offset: 1 << 63,
                ..ELF
            }
            .bytes(),
        ),
        ("don't lie in guest RAM", vec![b'x'; RAM as usize]),
    ];
    for (reason, file) in cases {
        let error = load(file).err().map(|error| error.to_string());
        let found = error.as_deref().is_some_and(|text| text.contains(reason));
        assert!(found, "wanted {reason:?}, got {error:?}");
    }
}

#[test]
fn the_boot_page_is_laid_out_as_the_guest_reads_it() {
    let (cmdline_len, cmdline) = boot_cmdline("dirty=1048576").unwrap();
    let page = BootPage {
        magic: BOOT_MAGIC,
        version: 1,
        vcpus: 4,
        ram_base: 2,
        ram_size: 3,
        serial: 4,
        gicd: 5,
        gicr: 6,
        its: 7,
        cmdline_len,
        cmdline,
    };
    let bytes = boot_page_bytes(&page);
    assert_eq!(bytes.len(), size_of::<BootPage>());
    assert_eq!(&bytes[..8], b"BLACKOUT");
    assert_eq!(bytes[offset_of!(BootPage, vcpus)], 4);
    assert_eq!(bytes[offset_of!(BootPage, its)], 7);
    assert_eq!(bytes[offset_of!(BootPage, cmdline_len)], 13);
    let text = &bytes[offset_of!(BootPage, cmdline)..][..14];
    assert_eq!(text, b"dirty=1048576\0");
}

#[test]
fn a_command_line_that_does_not_fit_is_refused() {
    assert!(boot_cmdline(&"x".repeat(CMDLINE_MAX)).is_ok());
    assert!(boot_cmdline(&"x".repeat(CMDLINE_MAX + 1)).is_err());
    assert!(boot_cmdline("a\0b").is_err());
}
