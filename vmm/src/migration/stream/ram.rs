//! Pages on the wire.
//!
//! The payload of a `ram` frame is the round (u32), then records: guest-physical address (u64),
//! pages (u32), content (u32: 0 for zeroes, 1 for data, 2 for data that is [elsewhere in the
//! file](super::mapped)), and, for data, the bytes, or the CRC-32C of each page (u32). All numbers are
//! little-endian. Neighbouring pages of one content share a record, so that any stretch of zero
//! pages costs 16 bytes.

use super::frame::HEADER_LEN;
use super::mapped::{self, Place};
use crate::memory::{self, GuestRam, PAGE_SIZE, PageRun};

/// The longest payload of a frame: 64 pages of data with a record each, or more in fewer records.
/// Frames are small so that the destination loads one while the source fills the next.
pub(crate) const MAX_PAYLOAD: usize = ROUND_LEN + 64 * (RECORD_LEN + PAGE);
const PAGE: usize = PAGE_SIZE as usize;
const ROUND_LEN: usize = 4;
const RECORD_LEN: usize = 16;
const SUM_LEN: usize = 4;
const ZERO: u32 = 0;
const DATA: u32 = 1;
const MAPPED: u32 = 2;

/// What a frame or a round holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Tally {
    /// Pages, zero ones too.
    pub(crate) pages: u64,
    /// Zero pages.
    pub(crate) zero: u64,
    /// Payload bytes.
    pub(crate) bytes: u64,
}

impl Tally {
    /// What was added since it was `before`.
    pub(crate) fn since(self, before: Tally) -> Tally {
        Tally {
            pages: self.pages - before.pages,
            zero: self.zero - before.zero,
            bytes: self.bytes - before.bytes,
        }
    }

    /// Adds another one.
    pub(crate) fn add(&mut self, other: Tally) {
        self.pages += other.pages;
        self.zero += other.zero;
        self.bytes += other.bytes;
    }
}

/// Fills one frame after the other with pages.
///
/// A page is copied before it is checked for zeroes and summed: the guest writes to it meanwhile,
/// and what is summed must be what is sent.
pub(crate) struct Packer {
    /// A whole frame, room for its header included.
    frame: Box<[u8]>,
    len: usize,
    record: Option<OpenRecord>,
    tally: Tally,
}

/// The record that the next page may still join.
#[derive(Clone, Copy)]
struct OpenRecord {
    at: usize,
    content: u32,
    pages: u32,
    next_gpa: u64,
}

impl Packer {
    /// Zero pages that one frame covers at most: the destination hears from the source now and then,
    /// also in a long stretch of them.
    pub(crate) const MAX_ZERO_PAGES: u64 = (64 << 20) / PAGE_SIZE;

    /// An empty frame for `round`.
    pub(crate) fn new(round: u32) -> Self {
        let mut packer = Packer {
            frame: vec![0; HEADER_LEN + MAX_PAYLOAD].into_boxed_slice(),
            len: HEADER_LEN + ROUND_LEN,
            record: None,
            tally: Tally::default(),
        };
        packer.begin(round);
        packer
    }

    /// Empties the frame for pages of `round`.
    pub(crate) fn begin(&mut self, round: u32) {
        self.frame[HEADER_LEN..][..ROUND_LEN].copy_from_slice(&round.to_le_bytes());
        self.clear();
    }

    /// Empties the frame for more of the same round.
    pub(crate) fn clear(&mut self) {
        self.len = HEADER_LEN + ROUND_LEN;
        self.record = None;
        self.tally = Tally::default();
    }

    /// How many more pages fit, whatever they are.
    pub(crate) fn room(&self) -> u64 {
        if self.tally.zero >= Packer::MAX_ZERO_PAGES {
            return 0;
        }
        ((self.frame.len() - self.len) / (RECORD_LEN + PAGE)) as u64
    }

    /// What is in the frame.
    pub(crate) fn tally(&self) -> Tally {
        Tally {
            bytes: (self.len - HEADER_LEN) as u64,
            ..self.tally
        }
    }

    /// The frame, ready for [`send_frame`](super::writer::FrameWriter::send_frame).
    pub(crate) fn frame(&mut self) -> &mut [u8] {
        &mut self.frame[..self.len]
    }

    /// Copies one page out of `ram`. There must be room.
    ///
    /// # Errors
    /// When there is no such page.
    pub(crate) fn add(&mut self, ram: &GuestRam, gpa: u64) -> Result<(), memory::Error> {
        let at = self.len + RECORD_LEN;
        let joined = self
            .record
            .filter(|r| r.content == DATA && r.next_gpa == gpa);
        let at = if joined.is_some() { self.len } else { at };
        let page = &mut self.frame[at..at + PAGE];
        ram.read(gpa, page)?;
        if page == [0; PAGE] {
            self.push(gpa, ZERO, 1);
            self.tally.zero += 1;
        } else {
            self.push(gpa, DATA, 1);
            self.len += PAGE;
        }
        self.tally.pages += 1;
        Ok(())
    }

    /// Adds the first pages of a run that is known to be zeroes, as many as one frame may cover, and
    /// returns how many. There must be room.
    pub(crate) fn add_zeroes(&mut self, run: PageRun) -> u64 {
        let pages = run.pages.min(Packer::MAX_ZERO_PAGES);
        self.push(run.gpa, ZERO, pages as u32);
        self.tally.zero += pages;
        self.tally.pages += pages;
        pages
    }

    /// Adds a page of which the file has the data, with this checksum, or that is zeroes. There must be
    /// room.
    pub(crate) fn add_saved(&mut self, gpa: u64, sum: Option<u32>) {
        self.tally.pages += 1;
        let Some(sum) = sum else {
            self.push(gpa, ZERO, 1);
            self.tally.zero += 1;
            return;
        };
        self.push(gpa, MAPPED, 1);
        self.frame[self.len..][..SUM_LEN].copy_from_slice(&sum.to_le_bytes());
        self.len += SUM_LEN;
    }

    fn push(&mut self, gpa: u64, content: u32, pages: u32) {
        let joins = |r: &OpenRecord| {
            r.content == content && r.next_gpa == gpa && r.pages.checked_add(pages).is_some()
        };
        let mut record = self.record.filter(joins).unwrap_or_else(|| {
            let at = self.len;
            self.frame[at..at + 8].copy_from_slice(&gpa.to_le_bytes());
            self.frame[at + 12..at + 16].copy_from_slice(&content.to_le_bytes());
            self.len += RECORD_LEN;
            OpenRecord {
                at,
                content,
                pages: 0,
                next_gpa: gpa,
            }
        });
        record.pages += pages;
        record.next_gpa = gpa.wrapping_add(u64::from(pages) * PAGE_SIZE);
        self.frame[record.at + 8..record.at + 12].copy_from_slice(&record.pages.to_le_bytes());
        self.record = Some(record);
    }
}

/// The pages of a frame could not be loaded.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LoadError {
    /// The payload is no list of records.
    #[error("{0}")]
    Malformed(&'static str),
    /// A record lies outside guest RAM.
    #[error(transparent)]
    Memory(#[from] memory::Error),
    /// The pages are in the file, but not as they should be.
    #[error(transparent)]
    Mapped(#[from] mapped::Error),
}

/// The round of a frame's payload, if it has one.
pub(crate) fn round(payload: &[u8]) -> Option<u32> {
    u32_at(payload, 0)
}

/// Puts the pages of a frame's payload into `ram`, and returns its round and what it held. Data that is
/// elsewhere in the file is read from `place`.
///
/// # Errors
/// When the payload is malformed or reaches outside RAM; some of its pages may be loaded then.
pub(crate) fn load(
    ram: &GuestRam,
    payload: &[u8],
    place: Option<&Place>,
) -> Result<(u32, Tally), LoadError> {
    let short = LoadError::Malformed("a record is cut short");
    let Some((round, mut rest)) = payload.split_first_chunk() else {
        return Err(short);
    };
    let mut tally = Tally {
        bytes: payload.len() as u64,
        ..Tally::default()
    };
    while !rest.is_empty() {
        let (Some(gpa), Some(pages), Some(content)) =
            (u64_at(rest, 0), u32_at(rest, 8), u32_at(rest, 12))
        else {
            return Err(short);
        };
        rest = rest.get(RECORD_LEN..).unwrap_or_default();
        if pages == 0 || gpa % PAGE_SIZE != 0 {
            return Err(LoadError::Malformed("a record is not made of whole pages"));
        }
        let pages = u64::from(pages);
        match content {
            ZERO => {
                ram.zero(PageRun { gpa, pages })?;
                tally.zero += pages;
            }
            DATA => {
                let len = usize::try_from(pages * PAGE_SIZE).unwrap_or(usize::MAX);
                let Some((data, after)) = rest.split_at_checked(len) else {
                    return Err(short);
                };
                ram.put_pages(gpa, data)?;
                rest = after;
            }
            MAPPED => {
                let place = place.ok_or(LoadError::Malformed("a record has its data elsewhere"))?;
                let len = usize::try_from(pages).unwrap_or(usize::MAX) * SUM_LEN;
                let Some((sums, after)) = rest.split_at_checked(len) else {
                    return Err(short);
                };
                place.load(ram, gpa, sums)?;
                rest = after;
            }
            _ => return Err(LoadError::Malformed("a record has an unknown content")),
        }
        tally.pages += pages;
    }
    Ok((u32::from_le_bytes(*round), tally))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(*bytes.get(at..)?.first_chunk()?))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(*bytes.get(at..)?.first_chunk()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    const BASE: u64 = 0x4000_0000;

    fn ram() -> GuestRam {
        GuestRam::new(&[(BASE, 256 * PAGE_SIZE)]).unwrap()
    }

    fn pack(ram: &GuestRam, pages: impl IntoIterator<Item = u64>) -> (Vec<u8>, Tally) {
        let mut packer = Packer::new(7);
        for page in pages {
            assert!(packer.room() > 0);
            packer.add(ram, BASE + page * PAGE_SIZE).unwrap();
        }
        let tally = packer.tally();
        (packer.frame()[HEADER_LEN..].to_vec(), tally)
    }

    #[test]
    fn pages_arrive_and_zeroes_cost_a_record_a_run() {
        let source = ram();
        for page in [3u64, 4, 9] {
            source
                .write(BASE + page * PAGE_SIZE + 5, &[page as u8])
                .unwrap();
        }
        let (payload, sent) = pack(&source, 0..200);
        // Zero, data, zero, data, zero.
        assert_eq!(payload.len(), ROUND_LEN + 5 * RECORD_LEN + 3 * PAGE);
        assert_eq!(
            sent,
            Tally {
                pages: 200,
                zero: 197,
                bytes: payload.len() as u64
            }
        );

        let destination = ram();
        destination
            .write(BASE + 8 * PAGE_SIZE, &[0xff; 4096])
            .unwrap();
        assert_eq!(load(&destination, &payload, None).unwrap(), (7, sent));
        assert_eq!(destination.checksum().unwrap(), source.checksum().unwrap());
    }

    #[test]
    fn known_zeroes_are_not_looked_at_and_fill_a_frame_by_their_number() {
        let mut packer = Packer::new(1);
        let run = PageRun {
            gpa: BASE,
            pages: Packer::MAX_ZERO_PAGES + 1,
        };
        assert_eq!(packer.add_zeroes(run), Packer::MAX_ZERO_PAGES);
        assert!(packer.room() == 0);
        packer.clear();
        let (some, more) = (
            PageRun {
                gpa: BASE,
                pages: 3,
            },
            PageRun {
                gpa: BASE + 3 * PAGE_SIZE,
                pages: 2,
            },
        );
        packer.add_zeroes(some);
        packer.add_zeroes(more);
        let ram = ram();
        ram.write(BASE, &[1; 6 * PAGE]).unwrap();
        let (_, loaded) = load(&ram, &packer.frame()[HEADER_LEN..], None).unwrap();
        assert_eq!(loaded.pages, 5);
        assert_eq!(loaded.bytes, (ROUND_LEN + RECORD_LEN) as u64, "one record");
        let (written, untouched) = ram.written_and_untouched().unwrap();
        assert_eq!((written[0].pages, untouched[0].pages), (1, 5));
    }

    #[test]
    fn a_frame_is_full_before_it_overflows() {
        let source = ram();
        source.write(BASE, &vec![1; 256 * PAGE]).unwrap();
        // Pages that are no neighbours need the most room.
        let mut packer = Packer::new(1);
        let mut pages = (0..128).map(|i| BASE + 2 * i * PAGE_SIZE);
        while packer.room() > 0 {
            packer.add(&source, pages.next().unwrap()).unwrap();
        }
        assert_eq!(packer.tally().pages, 64);
        assert!(packer.tally().bytes <= MAX_PAYLOAD as u64);
        packer.clear();
        assert_eq!(
            packer.tally(),
            Tally {
                bytes: ROUND_LEN as u64,
                ..Tally::default()
            }
        );
    }

    #[test]
    fn hostile_records_are_refused() {
        let ram = ram();
        let record = |gpa: u64, pages: u32, content: u32| {
            let mut payload = 1u32.to_le_bytes().to_vec();
            payload.extend(gpa.to_le_bytes());
            payload.extend(pages.to_le_bytes());
            payload.extend(content.to_le_bytes());
            payload
        };
        for (gpa, pages, content) in [
            (BASE, 0, ZERO),
            (BASE + 1, 1, ZERO),
            (BASE, 257, ZERO),
            (BASE - PAGE_SIZE, 1, ZERO),
            (u64::MAX - PAGE_SIZE + 1, u32::MAX, ZERO),
            (BASE, 1, MAPPED),
            (BASE, 1, 3),
            (BASE, 1, DATA),
            (BASE, u32::MAX, DATA),
        ] {
            assert!(
                load(&ram, &record(gpa, pages, content), None).is_err(),
                "{gpa:#x} {pages} {content}"
            );
        }
        let mut outside = record(BASE + 256 * PAGE_SIZE, 1, DATA);
        outside.extend([1; PAGE]);
        assert!(matches!(
            load(&ram, &outside, None),
            Err(LoadError::Memory(_))
        ));

        let (payload, _) = pack(&ram, 0..2);
        for len in (0..payload.len()).filter(|&len| len != ROUND_LEN) {
            assert!(load(&ram, &payload[..len], None).is_err(), "cut at {len}");
        }
    }
}
