//! The reader of `.note.stapsdt`.

use std::collections::HashMap;
use std::path::Path;

use object::LittleEndian as LE;
use object::elf::FileHeader64;
use object::read::elf::NoteIterator;

use super::Error;
use super::elf::{Elf, Machine};
use super::operand::{Arg, Surroundings, parse_args, symbols_in};

/// QEMU with every trace point has 0.5 MiB of notes.
const MAX_NOTES: u64 = 16 << 20;
const MAX_NAME: usize = 256;
const MAX_ARGS_TEXT: usize = 2048;

const OWNER: &[u8] = b"stapsdt";
const NOTE_TYPE: u32 = 3;

/// The probes of one ELF file.
#[derive(Clone, Debug)]
pub struct Binary {
    /// What it runs on.
    pub machine: Machine,
    /// Its probe sites, in the order of the notes. A probe that the compiler copied, by inlining
    /// for one, has several.
    pub sites: Vec<Site>,
    /// Notes whose probe is not in the file: they cannot be attached. Linkers that drop a function
    /// (`--gc-sections`) leave the notes of its probes behind, pointing nowhere.
    pub dangling: Vec<Dangling>,
}

/// A note without a probe.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Dangling {
    /// The note's provider.
    pub provider: String,
    /// The note's name.
    pub name: String,
    /// Where it points instead.
    pub why: &'static str,
}

/// One place in the code where a probe is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Site {
    /// The note's provider.
    pub provider: String,
    /// The note's name.
    pub name: String,
    /// The arguments, in order.
    pub args: Vec<Arg>,
    /// Where the probe's nop is in the file: what a uprobe is put on.
    pub offset: u64,
    /// Where the 16-bit semaphore is in the file, which the process reads to see whether anybody
    /// is attached; `None` for a probe without one.
    pub semaphore: Option<u64>,
    /// The semaphore's file page is mapped twice, so that raising it may change the wrong copy: the
    /// probe then never fires in a process started after the attach. rustc's default linker lays
    /// it out like this; `-C link-arg=-Wl,-z,separate-loadable-segments` helps.
    pub semaphore_hazard: bool,
}

impl Binary {
    /// Reads the probes of the ELF file at `path`. A file without any has no sites. `/proc/PID/exe`
    /// is a good path: it names the file that runs, even where that was replaced or deleted.
    ///
    /// # Errors
    /// [`Error::Open`], [`Error::Read`], [`Error::NotElf`], [`Error::Damaged`] and
    /// [`Error::TooLarge`].
    pub fn open(path: &Path) -> Result<Self, Error> {
        let elf = Elf::open(path)?;
        let mut notes = Vec::new();
        for section in elf.sections(".note.stapsdt") {
            let data = elf.data(WHAT, section, MAX_NOTES)?;
            read_notes(&elf, &data, section.align, &mut notes)?;
        }
        // Only sections that keep their place have a note of it, so a prelinked or otherwise moved
        // file is told by where this one is now.
        let base = elf
            .sections(".stapsdt.base")
            .next()
            .map(|section| section.address);
        let wanted = notes
            .iter()
            .flat_map(|note| symbols_in(elf.machine, &note.args))
            .collect();
        let symbols = elf.symbols(&wanted)?;
        let (mut sites, mut dangling) = (Vec::new(), Vec::new());
        for note in notes {
            match note.site(&elf, base, &symbols) {
                Ok(site) => sites.push(site),
                Err(why) => {
                    let Note { provider, name, .. } = note;
                    dangling.push(Dangling {
                        provider,
                        name,
                        why,
                    });
                }
            }
        }
        Ok(Self {
            machine: elf.machine,
            sites,
            dangling,
        })
    }
}

const WHAT: &str = "probe notes";

/// A note as it stands in the file.
struct Note {
    pc: u64,
    base: u64,
    semaphore: u64,
    provider: String,
    name: String,
    args: String,
}

impl Note {
    fn parse(descriptor: &[u8]) -> Option<Self> {
        let (pc, rest) = descriptor.split_first_chunk::<8>()?;
        let (base, rest) = rest.split_first_chunk::<8>()?;
        let (semaphore, rest) = rest.split_first_chunk::<8>()?;
        let mut strings = rest.split(|byte| *byte == 0);
        let mut string = |limit| {
            let bytes = strings.next().filter(|bytes| bytes.len() <= limit)?;
            String::from_utf8(bytes.to_vec()).ok()
        };
        Some(Self {
            pc: u64::from_le_bytes(*pc),
            base: u64::from_le_bytes(*base),
            semaphore: u64::from_le_bytes(*semaphore),
            provider: string(MAX_NAME)?,
            name: string(MAX_NAME)?,
            args: string(MAX_ARGS_TEXT)?,
        })
    }

    fn site(
        &self,
        elf: &Elf,
        base: Option<u64>,
        symbols: &HashMap<String, u64>,
    ) -> Result<Site, &'static str> {
        // Where the file was moved to after it was linked, as two's complement.
        let moved = base.map_or(0, |base| base.wrapping_sub(self.base));
        let pc = self.pc.wrapping_add(moved);
        let around = Surroundings {
            pc,
            fixed: elf.fixed,
            symbols,
        };
        let semaphore = match self.semaphore {
            0 => None,
            address => {
                let offset = elf.data_offset(address.wrapping_add(moved));
                Some(offset.ok_or("its semaphore is not in the file")?)
            }
        };
        Ok(Site {
            provider: self.provider.clone(),
            name: self.name.clone(),
            args: parse_args(elf.machine, &self.args, &around),
            offset: elf
                .code_offset(pc)
                .ok_or("its address is not in the code")?,
            semaphore,
            semaphore_hazard: semaphore.is_some_and(|offset| elf.is_mapped_twice(offset)),
        })
    }
}

fn read_notes(elf: &Elf, data: &[u8], align: u64, notes: &mut Vec<Note>) -> Result<(), Error> {
    let damaged = |_| elf.damaged(WHAT);
    let mut all = NoteIterator::<FileHeader64<LE>>::new(LE, align, data).map_err(damaged)?;
    while let Some(note) = all.next().map_err(damaged)? {
        if note.name() == OWNER && note.n_type(LE) == NOTE_TYPE {
            notes.push(Note::parse(note.desc()).ok_or_else(|| elf.damaged(WHAT))?);
        }
    }
    Ok(())
}
