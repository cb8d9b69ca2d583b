//! As much of an ELF file as probes need, read piece by piece and bounded.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use object::LittleEndian as LE;
use object::elf::{
    ELFCLASS64, ELFDATA2LSB, ELFMAG, EM_AARCH64, EM_X86_64, ET_EXEC, FileHeader64, PF_X, PT_LOAD,
    ProgramHeader64, SHN_UNDEF, SHT_DYNSYM, SHT_NOBITS, SHT_SYMTAB, SectionHeader64, Sym64,
};
use object::pod::{Pod, from_bytes, slice_from_all_bytes};

use super::Error;

/// More than any linker makes.
const MAX_HEADERS: u64 = 4 << 20;
const MAX_NAMES: u64 = 4 << 20;
/// A large static binary with full symbols has some tens of MiB of them.
const MAX_SYMBOLS: u64 = 256 << 20;
/// No page of either architecture is larger.
const MAX_PAGE: u64 = 64 << 10;

/// The architectures whose operands are understood.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Machine {
    /// x86-64
    X86_64,
    /// arm64
    Aarch64,
}

/// An ELF file's headers. [`Binary`](super::Binary) is the one user.
#[derive(Debug)]
pub(super) struct Elf {
    path: PathBuf,
    file: File,
    pub(super) machine: Machine,
    /// Whether addresses in the file are those in memory: no load bias.
    pub(super) fixed: bool,
    segments: Vec<ProgramHeader64<LE>>,
    sections: Vec<SectionHeader64<LE>>,
    names: Vec<u8>,
}

/// A section's place.
#[derive(Clone, Copy, Debug)]
pub(super) struct Section {
    pub(super) address: u64,
    pub(super) align: u64,
    offset: u64,
    size: u64,
}

impl Elf {
    pub(super) fn open(path: &Path) -> Result<Self, Error> {
        let file = File::open(path).map_err(|source| Error::Open {
            path: path.to_path_buf(),
            source,
        })?;
        let head = Piece {
            path,
            file: &file,
            what: "ELF header",
        };
        let head = head.read(0, size_of::<FileHeader64<LE>>() as u64, u64::MAX);
        let not_elf = || Error::NotElf {
            path: path.to_path_buf(),
        };
        // Whatever is too short for a header is no ELF file.
        let head = head.map_err(|_| not_elf())?;
        let (header, _) = from_bytes::<FileHeader64<LE>>(&head).map_err(|()| not_elf())?;
        let machine = machine(header).ok_or_else(not_elf)?;
        let table = |what, offset: u64, entry: u16, size: usize, count: u64| {
            if count == 0 {
                return Ok(Vec::new());
            }
            if usize::from(entry) != size {
                return Err(Error::Damaged {
                    path: path.to_path_buf(),
                    what,
                });
            }
            Piece {
                path,
                file: &file,
                what,
            }
            .read(offset, count * size as u64, MAX_HEADERS)
        };
        let segments = table(
            "program headers",
            header.e_phoff.get(LE),
            header.e_phentsize.get(LE),
            size_of::<ProgramHeader64<LE>>(),
            header.e_phnum.get(LE).into(),
        )?;
        let sections = table(
            "section headers",
            header.e_shoff.get(LE),
            header.e_shentsize.get(LE),
            size_of::<SectionHeader64<LE>>(),
            header.e_shnum.get(LE).into(),
        )?;
        let mut elf = Self {
            path: path.to_path_buf(),
            machine,
            fixed: header.e_type.get(LE) == ET_EXEC,
            segments: rows(&segments),
            sections: rows(&sections),
            names: Vec::new(),
            file,
        };
        if let Some(names) = elf.sections.get(usize::from(header.e_shstrndx.get(LE))) {
            elf.names = elf.data("section names", place(names), MAX_NAMES)?;
        }
        Ok(elf)
    }

    /// The sections called `name` that have contents.
    pub(super) fn sections(&self, name: &str) -> impl Iterator<Item = Section> {
        self.sections
            .iter()
            .filter(move |section| {
                section.sh_type.get(LE) != SHT_NOBITS
                    && string(&self.names, section.sh_name.get(LE)) == Some(name.as_bytes())
            })
            .map(place)
    }

    /// The contents of `section`, if they are not longer than `limit`.
    pub(super) fn data(
        &self,
        what: &'static str,
        section: Section,
        limit: u64,
    ) -> Result<Vec<u8>, Error> {
        let piece = Piece {
            path: &self.path,
            file: &self.file,
            what,
        };
        piece.read(section.offset, section.size, limit)
    }

    pub(super) fn damaged(&self, what: &'static str) -> Error {
        Error::Damaged {
            path: self.path.clone(),
            what,
        }
    }

    /// Where in the file the code at `address` is.
    pub(super) fn code_offset(&self, address: u64) -> Option<u64> {
        self.file_offset(address, |flags| flags & PF_X != 0)
    }

    /// Where in the file the datum at `address` is.
    pub(super) fn data_offset(&self, address: u64) -> Option<u64> {
        self.file_offset(address, |_| true)
    }

    /// Whether the file page at `offset` is in more than one segment's mapping. The kernel may then
    /// raise a semaphore in the wrong one, and the probe stays off.
    pub(super) fn is_mapped_twice(&self, offset: u64) -> bool {
        let mappings = self.loads().filter(|load| {
            let page = load.p_align.get(LE).clamp(1, MAX_PAGE);
            let start = load.p_offset.get(LE);
            let end = start.saturating_add(load.p_filesz.get(LE));
            start / page <= offset / page && offset / page <= end.saturating_sub(1) / page
        });
        mappings.count() > 1
    }

    /// The addresses of the symbols `wanted`; one that two symbols claim has none.
    pub(super) fn symbols(&self, wanted: &HashSet<&str>) -> Result<HashMap<String, u64>, Error> {
        let mut found: HashMap<String, Option<u64>> = HashMap::new();
        if !wanted.is_empty() {
            for table in [SHT_SYMTAB, SHT_DYNSYM] {
                self.symbols_of(table, wanted, &mut found)?;
                if !found.is_empty() {
                    break;
                }
            }
        }
        Ok(found
            .into_iter()
            .filter_map(|(name, at)| Some((name, at?)))
            .collect())
    }

    fn symbols_of(
        &self,
        table: u32,
        wanted: &HashSet<&str>,
        found: &mut HashMap<String, Option<u64>>,
    ) -> Result<(), Error> {
        for header in self
            .sections
            .iter()
            .filter(|section| section.sh_type.get(LE) == table)
        {
            let Some(names) = self.sections.get(header.sh_link.get(LE) as usize) else {
                return Err(self.damaged("symbol table"));
            };
            let symbols = self.data("symbol table", place(header), MAX_SYMBOLS)?;
            let names = self.data("symbol names", place(names), MAX_SYMBOLS)?;
            for symbol in symbols.chunks_exact(size_of::<Sym64<LE>>()) {
                let Ok((symbol, _)) = from_bytes::<Sym64<LE>>(symbol) else {
                    return Err(self.damaged("symbol table"));
                };
                let name = string(&names, symbol.st_name.get(LE));
                let name = name.and_then(|name| wanted.get(std::str::from_utf8(name).ok()?));
                let (Some(name), true) = (name, symbol.st_shndx.get(LE) != SHN_UNDEF) else {
                    continue;
                };
                let address = symbol.st_value.get(LE);
                found
                    .entry((*name).to_string())
                    .and_modify(|known| *known = known.filter(|known| *known == address))
                    .or_insert(Some(address));
            }
        }
        Ok(())
    }

    fn loads(&self) -> impl Iterator<Item = &ProgramHeader64<LE>> {
        self.segments
            .iter()
            .filter(|segment| segment.p_type.get(LE) == PT_LOAD)
    }

    fn file_offset(&self, address: u64, wanted: impl Fn(u32) -> bool) -> Option<u64> {
        self.loads()
            .filter(|load| wanted(load.p_flags.get(LE)))
            .find_map(|load| {
                let inside = address.checked_sub(load.p_vaddr.get(LE))?;
                let held = inside < load.p_filesz.get(LE);
                held.then(|| load.p_offset.get(LE).checked_add(inside))
                    .flatten()
            })
    }
}

/// A piece of a file that is about to be read.
struct Piece<'a> {
    path: &'a Path,
    file: &'a File,
    what: &'static str,
}

impl Piece<'_> {
    fn read(&self, offset: u64, size: u64, limit: u64) -> Result<Vec<u8>, Error> {
        let Self { path, file, what } = *self;
        if size > limit {
            return Err(Error::TooLarge {
                path: path.to_path_buf(),
                what,
                size,
                limit,
            });
        }
        let failed = |source| Error::Read {
            path: path.to_path_buf(),
            what,
            offset,
            size,
            source,
        };
        // The length is asked first, so that nothing is allocated for what is not there.
        let length = file.metadata().map_err(failed)?.len();
        if offset.checked_add(size).is_none_or(|end| end > length) {
            return Err(failed(std::io::ErrorKind::UnexpectedEof.into()));
        }
        let mut bytes = vec![0; size as usize];
        file.read_exact_at(&mut bytes, offset).map_err(failed)?;
        Ok(bytes)
    }
}

fn machine(header: &FileHeader64<LE>) -> Option<Machine> {
    let ident = &header.e_ident;
    if ident.magic != ELFMAG || ident.class != ELFCLASS64 || ident.data != ELFDATA2LSB {
        return None;
    }
    match header.e_machine.get(LE) {
        EM_X86_64 => Some(Machine::X86_64),
        EM_AARCH64 => Some(Machine::Aarch64),
        _ => None,
    }
}

fn place(section: &SectionHeader64<LE>) -> Section {
    Section {
        address: section.sh_addr.get(LE),
        align: section.sh_addralign.get(LE),
        offset: section.sh_offset.get(LE),
        size: section.sh_size.get(LE),
    }
}

/// The rows of a table whose size is a multiple of a row's.
fn rows<T: Pod>(bytes: &[u8]) -> Vec<T> {
    slice_from_all_bytes(bytes)
        .map(<[T]>::to_vec)
        .unwrap_or_default()
}

/// The string that begins at `offset`, without its NUL.
fn string(strings: &[u8], offset: u32) -> Option<&[u8]> {
    let rest = strings.get(offset as usize..)?;
    let end = rest.iter().position(|byte| *byte == 0)?;
    rest.get(..end)
}
