//! Guest RAM at fixed places of a file: QEMU's `mapped-ram`.
//!
//! Each page of RAM has one place in the file, whatever the round that it is written in, so that the
//! file is never longer than the guest, and pages of zeroes are holes in it. The stream goes around
//! them:
//!
//! ```text
//!   start                start + at                         start + at + size of RAM
//!   │ preface, hello │ … │ RAM, region after region         │ ram …, round-end, device …, end │
//! ```
//!
//! `at` is in [`Terms`](super::message::Terms); it puts RAM at a multiple of 1 MiB of the file. The
//! `ram` frames come when the guest is stopped. They have the pages of all RAM once, those of zeroes as
//! elsewhere, and of the others a checksum each: the file may be damaged, or written to since.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use super::frame::HEADER_LEN;
use super::ram::{Packer, Tally};
use crate::memory::{self, GuestRam, PAGE_SIZE, PageRun};
use crate::probes::Errno;

/// What RAM is aligned to in the file, and the least room before it; also QEMU's.
const ALIGN: u64 = 1 << 20;
const PAGE: usize = PAGE_SIZE as usize;
/// Pages that are read or written at once.
pub(crate) const BATCH: u64 = 64;
const SUM_LEN: usize = 4;

/// The RAM of the file can't be read or written, or is not what it was.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// The file takes no more.
    #[error("writing guest RAM to the file at byte {offset}")]
    Write {
        /// Where.
        offset: u64,
        /// What the kernel said.
        source: io::Error,
    },
    /// The file is too short, or its disk fails.
    #[error("reading the page at {gpa:#x} of guest RAM from the file at byte {offset}")]
    Read {
        /// The page.
        gpa: u64,
        /// Where.
        offset: u64,
        /// What the kernel said.
        source: io::Error,
    },
    /// A page is not the one that was written.
    #[error("the page at {gpa:#x} of guest RAM is damaged in the file at byte {offset}")]
    Damaged {
        /// The page.
        gpa: u64,
        /// Where.
        offset: u64,
    },
    /// Guest RAM.
    #[error("guest RAM")]
    Memory(#[from] memory::Error),
}

impl Errno for Error {
    fn errno(&self) -> i32 {
        match self {
            Error::Write { source, .. } | Error::Read { source, .. } => source.errno(),
            Error::Damaged { .. } => libc::EBADMSG,
            Error::Memory(source) => source.errno(),
        }
    }
}

/// How far behind the start of a stream, which is at `start` of its file, RAM comes.
pub(crate) fn place_behind(start: u64) -> u64 {
    let at = start.saturating_add(ALIGN).checked_next_multiple_of(ALIGN);
    at.map_or(ALIGN, |at| at - start)
}

/// Where in a file RAM is.
#[derive(Debug)]
pub(crate) struct Place {
    file: File,
    /// Of the first page.
    at: u64,
    /// Guest-physical address and size, in their order in the file.
    regions: Vec<(u64, u64)>,
}

impl Place {
    /// The place of `ram` from byte `at` of `file` on.
    pub(crate) fn new(file: File, at: u64, ram: &GuestRam) -> Self {
        Place {
            file,
            at,
            regions: ram.regions().collect(),
        }
    }

    /// The number of the page at `gpa` in the order of the file, and how many of the `pages` from there
    /// on are in the same region. None if that page is not RAM.
    fn find(&self, gpa: u64, pages: u64) -> Option<(u64, u64)> {
        let mut before = 0;
        for &(base, size) in &self.regions {
            if let Some(within) = gpa.checked_sub(base).filter(|&within| within < size) {
                let left = (size - within) / PAGE_SIZE;
                return Some(((before + within) / PAGE_SIZE, pages.min(left)));
            }
            before += size;
        }
        None
    }

    fn offset(&self, index: u64) -> u64 {
        self.at.saturating_add(index * PAGE_SIZE)
    }

    /// Puts the pages from `gpa` on into `ram`, one for each of `sums`, CRC-32C in little-endian.
    ///
    /// # Errors
    /// At the first page that is not RAM, not in the file, or not what the checksum is of.
    pub(super) fn load(&self, ram: &GuestRam, gpa: u64, sums: &[u8]) -> Result<(), Error> {
        let most = (sums.len() / SUM_LEN).min(BATCH as usize);
        let mut buffer = vec![0; PAGE * most];
        let mut gpa = gpa;
        for sums in sums.chunks(SUM_LEN * BATCH as usize) {
            let pages = &mut buffer[..PAGE * (sums.len() / SUM_LEN)];
            let first = gpa;
            for (sum, page) in sums.chunks_exact(SUM_LEN).zip(pages.chunks_exact_mut(PAGE)) {
                self.read(gpa, page, sum)?;
                gpa = gpa.wrapping_add(PAGE_SIZE);
            }
            ram.put_pages(first, pages)?;
        }
        Ok(())
    }

    fn read(&self, gpa: u64, page: &mut [u8], sum: &[u8]) -> Result<(), Error> {
        // What is not RAM has no place in the file, and is refused where it is put.
        let Some((index, _)) = self.find(gpa, 1) else {
            return Ok(());
        };
        let offset = self.offset(index);
        let read = self.file.read_exact_at(page, offset);
        read.map_err(|source| Error::Read {
            gpa,
            offset,
            source,
        })?;
        match crc32c::crc32c(page).to_le_bytes() == sum {
            true => Ok(()),
            false => Err(Error::Damaged { gpa, offset }),
        }
    }
}

/// Writes RAM to its place, and knows what is there.
#[derive(Debug)]
pub(crate) struct Saver {
    place: Place,
    /// The checksum of each page in the order of the file; none of a page of zeroes.
    sums: Vec<Option<u32>>,
    buffer: Box<[u8]>,
}

impl Saver {
    /// All of `ram` counts as zeroes at first. What the file holds of an earlier guest from that place on is
    /// gone: half of a guest must not be followed by the end of another.
    ///
    /// # Errors
    /// When the file can't be written to.
    pub(crate) fn new(place: Place, ram: &GuestRam) -> io::Result<Self> {
        match place.file.metadata()?.is_file() {
            true => place.file.set_len(place.at)?,
            false => {
                let end = place.at.saturating_add(ram.size());
                place.file.write_all_at(&[0; HEADER_LEN], end)?;
            }
        }
        let pages = usize::try_from(ram.size() / PAGE_SIZE).unwrap_or(usize::MAX);
        Ok(Saver {
            place,
            sums: vec![None; pages],
            buffer: vec![0; PAGE * BATCH as usize].into(),
        })
    }

    /// Notes pages that are known to be zeroes.
    ///
    /// # Errors
    /// When they are not RAM.
    pub(crate) fn clear(&mut self, run: PageRun) -> Result<Tally, Error> {
        self.each_region(run, |saver, index, part| {
            saver.sums[index..][..part.pages as usize].fill(None);
            Ok(())
        })?;
        Ok(Tally {
            pages: run.pages,
            zero: run.pages,
            bytes: 0,
        })
    }

    /// Writes pages that are read from `ram`, no more than [`BATCH`]. A page that the guest writes to
    /// meanwhile is dirty, and comes again; what is summed is what is written.
    ///
    /// # Errors
    /// When they are not RAM, or the file does not take them.
    pub(crate) fn save(&mut self, ram: &GuestRam, run: PageRun) -> Result<Tally, Error> {
        let mut tally = Tally::default();
        self.each_region(run, |saver, index, part| {
            tally.add(saver.save_within(ram, index, part)?);
            Ok(())
        })?;
        Ok(tally)
    }

    fn save_within(&mut self, ram: &GuestRam, index: usize, run: PageRun) -> Result<Tally, Error> {
        let pages = &mut self.buffer[..PAGE * run.pages as usize];
        ram.read(run.gpa, pages)?;
        let sum = |page: &[u8]| (page != [0; PAGE]).then(|| crc32c::crc32c(page));
        let sums = &mut self.sums[index..][..run.pages as usize];
        for (known, page) in sums.iter_mut().zip(pages.chunks_exact(PAGE)) {
            *known = sum(page);
        }
        let (mut first, mut data) = (0, 0);
        for group in sums.chunk_by(|a, b| a.is_some() == b.is_some()) {
            if group[0].is_some() {
                let offset = self.place.offset((index + first) as u64);
                let stretch = &pages[PAGE * first..][..PAGE * group.len()];
                let written = self.place.file.write_all_at(stretch, offset);
                written.map_err(|source| Error::Write { offset, source })?;
                data += group.len() as u64;
            }
            first += group.len();
        }
        Ok(Tally {
            pages: run.pages,
            zero: run.pages - data,
            bytes: data * PAGE_SIZE,
        })
    }

    /// Calls `act` with each part of `run` that lies in one region, and the number of its first page.
    fn each_region(
        &mut self,
        run: PageRun,
        mut act: impl FnMut(&mut Self, usize, PageRun) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let PageRun { mut gpa, mut pages } = run;
        while pages > 0 {
            let Some((index, within)) = self.place.find(gpa, pages) else {
                return Err(memory::Error::outside(gpa, PAGE).into());
            };
            let part = PageRun { gpa, pages: within };
            act(self, usize::try_from(index).unwrap_or(usize::MAX), part)?;
            (gpa, pages) = (gpa + within * PAGE_SIZE, pages - within);
        }
        Ok(())
    }

    /// What the file holds, as `ram` frames of round 1, each given to `send`. Returns how many pages that
    /// is: all of RAM.
    ///
    /// # Errors
    /// Those of `send`.
    pub(crate) fn tell<E>(
        &self,
        mut send: impl FnMut(&mut Packer) -> Result<(), E>,
    ) -> Result<u64, E> {
        let mut packer = Packer::new(1);
        let mut sums = self.sums.iter();
        for &(base, size) in &self.place.regions {
            let pages = (0..size).step_by(PAGE).zip(sums.by_ref());
            for (offset, sum) in pages {
                if packer.room() == 0 {
                    send(&mut packer)?;
                    packer.clear();
                }
                packer.add_saved(base + offset, *sum);
            }
        }
        send(&mut packer)?;
        Ok(self.sums.len() as u64)
    }
}

#[cfg(test)]
mod tests {
    use super::super::ram;
    use super::*;

    const LOW: u64 = 0x4000_0000;
    const HIGH: u64 = 0x1_0000_0000;
    const AT: u64 = 3 << 20;

    fn ram() -> GuestRam {
        GuestRam::new(&[(LOW, 300 * PAGE_SIZE), (HIGH, 4 * PAGE_SIZE)]).unwrap()
    }

    fn fill(ram: &GuestRam, gpa: u64, value: u8) {
        ram.write(gpa, &[value; PAGE]).unwrap();
    }

    fn saver(file: &File, ram: &GuestRam) -> Saver {
        let place = Place::new(file.try_clone().unwrap(), AT, ram);
        Saver::new(place, ram).unwrap()
    }

    /// Loads a table into RAM full of rubbish.
    fn restore(saver: &Saver, file: &File) -> Result<GuestRam, ram::LoadError> {
        let target = ram();
        for gpa in [LOW, HIGH] {
            fill(&target, gpa + PAGE_SIZE, 0xee);
        }
        let place = Place::new(file.try_clone().unwrap(), AT, &target);
        let mut pages = 0;
        saver.tell(|packer| {
            let payload = &packer.frame()[HEADER_LEN..];
            pages += ram::load(&target, payload, Some(&place))?.1.pages;
            Ok::<_, ram::LoadError>(())
        })?;
        assert_eq!(pages, 304);
        Ok(target)
    }

    fn run(gpa: u64, pages: u64) -> PageRun {
        PageRun { gpa, pages }
    }

    #[test]
    fn pages_are_where_they_belong_however_often_they_are_written() {
        let (file, source) = (tempfile::tempfile().unwrap(), ram());
        let mut saver = saver(&file, &source);
        for (gpa, value) in [(LOW, 1), (LOW + 5 * PAGE_SIZE, 2), (HIGH + PAGE_SIZE, 3)] {
            fill(&source, gpa, value);
        }
        let tally = saver.save(&source, run(LOW, 64)).unwrap();
        assert_eq!((tally.pages, tally.zero, tally.bytes), (64, 62, 2 << 12));
        saver.save(&source, run(HIGH, 4)).unwrap();
        // One becomes another page, one becomes zeroes.
        fill(&source, LOW, 4);
        fill(&source, LOW + 5 * PAGE_SIZE, 0);
        saver.save(&source, run(LOW, 1)).unwrap();
        saver.save(&source, run(LOW + 5 * PAGE_SIZE, 1)).unwrap();
        let target = restore(&saver, &file).unwrap();
        assert_eq!(target.checksum().unwrap(), source.checksum().unwrap());
        let end = AT + (300 + 2) * PAGE_SIZE;
        assert_eq!(file.metadata().unwrap().len(), end);
        saver.clear(run(LOW, 300)).unwrap();
        fill(&source, LOW, 0);
        let target = restore(&saver, &file).unwrap();
        assert_eq!(target.checksum().unwrap(), source.checksum().unwrap());
    }

    #[test]
    fn a_file_that_is_damaged_or_cut_is_refused() {
        let (file, source) = (tempfile::tempfile().unwrap(), ram());
        let mut saver = saver(&file, &source);
        fill(&source, HIGH, 7);
        saver.save(&source, run(HIGH, 1)).unwrap();
        restore(&saver, &file).unwrap();
        let offset = AT + 300 * PAGE_SIZE;
        file.write_all_at(&[6], offset + 9).unwrap();
        let error = restore(&saver, &file).unwrap_err().to_string();
        let place =
            format!("the page at {HIGH:#x} of guest RAM is damaged in the file at byte {offset}");
        assert_eq!(error, place);
        file.set_len(offset + 9).unwrap();
        let error = restore(&saver, &file).unwrap_err().to_string();
        assert!(error.starts_with("reading the page at"), "{error}");
    }

    #[test]
    fn what_is_not_ram_is_neither_saved_nor_loaded() {
        let (file, source) = (tempfile::tempfile().unwrap(), ram());
        let mut saver = saver(&file, &source);
        assert!(saver.save(&source, run(LOW + 299 * PAGE_SIZE, 2)).is_err());
        assert!(saver.clear(run(0, 1)).is_err());
        for at in [0, u64::MAX - 4095] {
            let place = Place::new(file.try_clone().unwrap(), at, &source);
            assert!(place.load(&source, LOW - PAGE_SIZE, &[0; 8]).is_err());
            assert!(place.load(&source, u64::MAX - 4095, &[0; 8]).is_err());
            assert!(place.load(&source, LOW, &[0; 8]).is_err());
        }
    }

    #[test]
    fn ram_comes_at_a_round_place_behind_the_start() {
        for start in [0, 1, 4096, ALIGN - 1, ALIGN, 5 * ALIGN + 7] {
            let behind = place_behind(start);
            assert!((ALIGN..2 * ALIGN).contains(&behind), "{start}");
            assert_eq!((start + behind) % ALIGN, 0);
        }
        assert_eq!(place_behind(u64::MAX), ALIGN);
    }
}
