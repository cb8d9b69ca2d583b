//! Notes in whole files: moved files, segments, semaphores, and files that lie.

use std::fs;

use tempfile::NamedTempFile;

use super::super::{Binary, Error, Machine, Operand, Site};

/// Code at 0x1000 of the file is at 0x401000 in memory; data at 0x2000 is at 0x403000.
const CODE: Segment = Segment {
    flags: 5,
    offset: 0x1000,
    address: 0x40_1000,
    size: 0x1000,
};
const DATA: Segment = Segment {
    flags: 6,
    offset: 0x2000,
    address: 0x40_3000,
    size: 0x800,
};
/// The page before `DATA` in memory, whose last bytes are in the first file page of `DATA`.
const RELRO: Segment = Segment {
    flags: 6,
    offset: 0x1f00,
    address: 0x40_2f00,
    size: 0x200,
};

const PC: u64 = 0x40_1234;
const BASE: u64 = 0x40_0500;

#[derive(Clone, Copy)]
struct Segment {
    flags: u32,
    offset: u64,
    address: u64,
    size: u64,
}

/// A 64-bit little-endian file with the segments, and the notes, `.stapsdt.base` and one symbol as
/// sections.
struct Elf {
    machine: u16,
    kind: u16,
    segments: Vec<Segment>,
    notes: Vec<u8>,
    base: Option<u64>,
    symbol: (&'static str, u64),
}

impl Elf {
    fn new(notes: Vec<u8>) -> Self {
        Self {
            machine: 62,
            kind: 3,
            segments: vec![CODE, DATA],
            notes,
            base: Some(BASE),
            symbol: ("counter", 0x40_3010),
        }
    }

    fn bytes(&self) -> Vec<u8> {
        let names = b"\0.note.stapsdt\0.stapsdt.base\0.symtab\0.strtab\0.shstrtab\0";
        let name = |wanted: &str| {
            let at = names
                .windows(wanted.len())
                .position(|name| name == wanted.as_bytes());
            at.expect("a name of the table") as u32
        };
        let strings = [&[0], self.symbol.0.as_bytes(), &[0]].concat();
        let mut symbols = vec![0; 24];
        symbols.extend(1_u32.to_le_bytes());
        symbols.extend([0x11, 0, 1, 0]);
        symbols.extend([self.symbol.1, 8].map(u64::to_le_bytes).concat());
        // Name, type, address, link, contents.
        let sections = [
            (0, 0, 0, 0, &[][..]),
            (name(".note.stapsdt"), 7, 0, 0, &self.notes[..]),
            (
                name(".stapsdt.base"),
                1,
                self.base.unwrap_or(0),
                0,
                &[0][..],
            ),
            (name(".symtab"), 2, 0, 4, &symbols[..]),
            (name(".strtab"), 3, 0, 0, &strings[..]),
            (name(".shstrtab"), 3, 0, 0, &names[..]),
        ];
        let sections: Vec<_> = sections
            .into_iter()
            .filter(|(at, ..)| self.base.is_some() || *at != name(".stapsdt.base"))
            .collect();
        let mut contents: Vec<u8> = Vec::new();
        let mut headers = Vec::new();
        let start = 0x3000;
        for (name, kind, address, link, data) in &sections {
            let offset = start + contents.len() as u64;
            headers.extend([*name, *kind].map(u32::to_le_bytes).concat());
            headers.extend(
                [0, *address, offset, data.len() as u64]
                    .map(u64::to_le_bytes)
                    .concat(),
            );
            headers.extend([*link, 0].map(u32::to_le_bytes).concat());
            headers.extend([4, 24_u64].map(u64::to_le_bytes).concat());
            contents.extend(*data);
        }
        let mut file = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
        file.extend([self.kind, self.machine].map(u16::to_le_bytes).concat());
        file.extend(1_u32.to_le_bytes());
        file.extend(
            [0, 64, start + contents.len() as u64]
                .map(u64::to_le_bytes)
                .concat(),
        );
        file.extend(0_u32.to_le_bytes());
        let last = sections.len() as u16 - 1;
        let counts = [64, 56, self.segments.len() as u16, 64, last + 1, last];
        file.extend(counts.map(u16::to_le_bytes).concat());
        for segment in &self.segments {
            file.extend([1, segment.flags].map(u32::to_le_bytes).concat());
            let Segment {
                offset,
                address,
                size,
                ..
            } = *segment;
            let row = [offset, address, address, size, size, 0x1000];
            file.extend(row.map(u64::to_le_bytes).concat());
        }
        file.resize(start as usize, 0);
        file.extend(contents);
        file.extend(headers);
        file
    }

    fn read(&self) -> Result<Vec<Site>, Error> {
        Ok(read(&self.bytes())?.sites)
    }

    fn site(&self) -> Site {
        let mut sites = self.read().expect("a good file");
        assert_eq!(sites.len(), 1);
        sites.remove(0)
    }
}

fn read(bytes: &[u8]) -> Result<Binary, Error> {
    let file = NamedTempFile::new().expect("a temporary file");
    read_by(&file, bytes)
}

fn read_by(file: &NamedTempFile, bytes: &[u8]) -> Result<Binary, Error> {
    fs::write(file.path(), bytes).expect("a temporary file can be written");
    Binary::open(file.path())
}

fn note(pc: u64, base: u64, semaphore: u64, strings: &str) -> Vec<u8> {
    let mut descriptor = [pc, base, semaphore].map(u64::to_le_bytes).concat();
    descriptor.extend(strings.bytes());
    let mut note = [8, descriptor.len() as u32, 3]
        .map(u32::to_le_bytes)
        .concat();
    note.extend(b"stapsdt\0");
    note.extend(descriptor);
    note.resize(note.len().next_multiple_of(4), 0);
    note
}

#[test]
fn a_note_names_its_site() {
    let notes = note(PC, BASE, 0, "vmm\0vm_stop_begin\0-8@%rax 8@$1\0");
    let site = Elf::new(notes).site();
    assert_eq!(
        (site.provider.as_str(), site.name.as_str()),
        ("vmm", "vm_stop_begin")
    );
    assert_eq!(site.args.len(), 2);
    assert_eq!(site.offset, 0x1234);
    assert_eq!((site.semaphore, site.semaphore_hazard), (None, false));
}

#[test]
fn every_note_is_read_and_foreign_ones_are_not() {
    let mut notes = note(PC, BASE, 0, "a\0one\0\0");
    let mut foreign = note(PC, BASE, 0, "a\0two\0\0");
    foreign[12..19].copy_from_slice(b"Foreign");
    notes.extend(foreign);
    notes.extend(note(PC + 8, BASE, 0, "a\0three\0-4@%eax\0"));
    let sites = Elf::new(notes).read().expect("a good file");
    let names: Vec<_> = sites
        .iter()
        .map(|site| (site.name.as_str(), site.offset))
        .collect();
    assert_eq!(names, [("one", 0x1234), ("three", 0x123c)]);
}

#[test]
fn a_prelinked_file_has_its_addresses_moved() {
    // The note says where everything was before the whole file was moved up, or down, by 0x1000.
    for moved in [0x1000, 0x1000_u64.wrapping_neg()] {
        let was = |address: u64| address.wrapping_sub(moved);
        let notes = note(was(PC), was(BASE), was(0x40_3020), "a\0b\0\0");
        let site = Elf::new(notes).site();
        assert_eq!((site.offset, site.semaphore), (0x1234, Some(0x2020)));
    }
    let mut without_base = Elf::new(note(PC, 0x999, 0, "a\0b\0\0"));
    without_base.base = None;
    assert_eq!(without_base.site().offset, 0x1234);
}

#[test]
fn semaphores_have_file_offsets_and_hazards() {
    let mut elf = Elf::new(note(PC, BASE, 0x40_3020, "a\0b\0\0"));
    let site = elf.site();
    assert_eq!(
        (site.semaphore, site.semaphore_hazard),
        (Some(0x2020), false)
    );
    elf.segments.push(RELRO);
    let site = elf.site();
    assert_eq!(
        (site.semaphore, site.semaphore_hazard),
        (Some(0x2020), true)
    );
}

#[test]
fn symbols_are_found_whatever_the_bias() {
    let mut elf = Elf::new(note(
        PC,
        BASE,
        0,
        "a\0b\0-4@counter+4(%rip) 4@unknown(%rip)\0",
    ));
    let site = elf.site();
    let displacement = 0x40_3014 - PC as i64;
    assert_eq!(
        site.args[0].operand,
        Operand::Memory {
            base: 128,
            displacement
        }
    );
    assert!(matches!(site.args[1].operand, Operand::Unreadable(_)));
    elf.machine = 183;
    elf.notes = note(PC, BASE, 0, "a\0b\0-4@[x0, #:lo12:counter]\0");
    let site = elf.site();
    assert_eq!(
        site.args[0].operand,
        Operand::Memory {
            base: 0,
            displacement: 0x10
        }
    );
}

#[test]
fn the_machine_is_told() {
    let mut elf = Elf::new(Vec::new());
    assert_eq!(
        read(&elf.bytes()).expect("a good file").machine,
        Machine::X86_64
    );
    elf.machine = 183;
    assert_eq!(
        read(&elf.bytes()).expect("a good file").machine,
        Machine::Aarch64
    );
    elf.machine = 8;
    assert!(matches!(read(&elf.bytes()), Err(Error::NotElf { .. })));
}

#[test]
fn a_note_that_points_nowhere_spoils_no_other() {
    // What linkers leave of a dropped function; in the data; above everything; past the code.
    for pc in [0, 0x40_3000, u64::MAX, CODE.address + CODE.size] {
        let mut notes = note(pc, BASE, 0, "a\0dropped\0\0");
        notes.extend(note(PC, BASE, 0x1_0000, "a\0bad_semaphore\0\0"));
        notes.extend(note(PC, BASE, 0, "a\0good\0\0"));
        let binary = read(&Elf::new(notes).bytes()).expect("a good file");
        let sites: Vec<_> = binary.sites.iter().map(|site| site.name.as_str()).collect();
        let dangling: Vec<_> = binary
            .dangling
            .iter()
            .map(|note| note.name.as_str())
            .collect();
        assert_eq!(sites, ["good"], "{pc:#x}");
        assert_eq!(dangling, ["dropped", "bad_semaphore"], "{pc:#x}");
    }
}

#[test]
fn damaged_notes_are_errors() {
    let whole = note(PC, BASE, 0, "provider\0name\0-8@%rax\0");
    let mut long = whole.clone();
    long[4] = 0xff;
    let name = format!("a\0{}\0\0", "n".repeat(300));
    let bad = [
        whole[..whole.len() - 8].to_vec(),
        whole[..10].to_vec(),
        long,
        note(PC, BASE, 0, "only\0"),
        note(PC, BASE, 0, "a\0\u{0}"),
        note(PC, BASE, 0, &name),
        note(PC, BASE, 0, "a\0b\0c\0")
            .into_iter()
            .map(|byte| if byte == b'b' { 0xff } else { byte })
            .collect(),
    ];
    for notes in bad {
        let length = notes.len();
        match Elf::new(notes).read() {
            Err(Error::Damaged { .. }) => {}
            // Of strings that are not all there, the arguments may be missing.
            Ok(sites) => assert!(sites.iter().all(|site| site.args.is_empty()), "{length}"),
            Err(error) => panic!("{length}: {error}"),
        }
    }
}

#[test]
fn no_cut_and_no_flipped_byte_does_harm() {
    let notes = note(
        PC,
        BASE,
        0x40_3020,
        "vmm\0vm_stop_begin\0-8@%rax -4@counter(%rip)\0",
    );
    let good = Elf::new(notes).bytes();
    let file = NamedTempFile::new().expect("a temporary file");
    for length in (0..good.len()).step_by(97).chain(0..0x180) {
        // What matters is that it ends, without a panic and without a huge allocation.
        let _ = read_by(&file, &good[..length]);
    }
    let interesting = (0..0xb0).chain(0x3000..good.len());
    for at in interesting {
        for bit in [0x80, 0xff] {
            let mut bad = good.clone();
            bad[at] ^= bit;
            let _ = read_by(&file, &bad);
        }
    }
}
