//! Guest RAM without a guest.

use super::*;

#[test]
fn ram_is_zeroed_and_bounded() {
    let ram = GuestRam::new(&[(0, 0x2000), (0x10_0000, 0x1000)]).unwrap();
    assert_eq!(ram.size(), 0x3000);
    ram.write(0x1ffc, &[1, 2, 3, 4]).unwrap();
    let mut word = [0; 4];
    ram.read(0x1ffc, &mut word).unwrap();
    assert_eq!(word, [1, 2, 3, 4]);
    assert_eq!(ram.write(0x1ffd, &word).unwrap_err().errno(), libc::EFAULT);
    ram.put_pages(0x1000, &[5; 0x1000]).unwrap();
    assert_eq!(
        ram.put_pages(0x1000, &[6; 0x2000]).unwrap_err().errno(),
        libc::EFAULT
    );
    ram.read(0x1ffc, &mut word).unwrap();
    assert_eq!(word, [5; 4]);
    ram.put_pages(0x1000, &[0; 0x1000]).unwrap();
    ram.write(0x1ffc, &[1, 2, 3, 4]).unwrap();
    ram.read(0x1ffc, &mut word).unwrap();
    assert_eq!(ram.checksum().unwrap(), {
        let mut all = vec![0; 0x3000];
        all[0x1ffc..0x2000].copy_from_slice(&word);
        crc32c::crc32c(&all)
    });
}

#[test]
fn zeroed_pages_read_as_zero_and_hold_no_memory() {
    let ram = GuestRam::new(&[(0, 0x2000), (0x2000, 0x2000)]).unwrap();
    ram.write(0, &[0xff; 0x4000]).unwrap();
    ram.zero(PageRun {
        gpa: 0x1000,
        pages: 2,
    })
    .unwrap();
    let mut all = [0; 0x4000];
    ram.read(0, &mut all).unwrap();
    let kept = [[0xff; 0x1000], [0; 0x1000], [0; 0x1000], [0xff; 0x1000]];
    assert_eq!(all, *kept.as_flattened());
    let outside = ram.zero(PageRun {
        gpa: 0x3000,
        pages: 2,
    });
    assert_eq!(outside.unwrap_err().errno(), libc::EFAULT);
}

#[test]
fn untouched_pages_are_told_from_written_ones() {
    let ram = GuestRam::new(&[(0, 0x4000), (0x10_0000, 0x2000)]).unwrap();
    let page = |gpa, pages| PageRun { gpa, pages };
    let untouched = vec![page(0, 4), page(0x10_0000, 2)];
    assert_eq!(ram.written_and_untouched().unwrap(), (vec![], untouched));
    ram.write(0x1ff0, &[1; 32]).unwrap();
    ram.write(0x10_1000, &[1]).unwrap();
    let written = vec![page(0x1000, 2), page(0x10_1000, 1)];
    let untouched = vec![page(0, 1), page(0x3000, 1), page(0x10_0000, 1)];
    assert_eq!(ram.written_and_untouched().unwrap(), (written, untouched));
}

#[test]
fn a_region_is_made_of_whole_pages() {
    assert!(matches!(
        GuestRam::new(&[(0, 0x1001)]),
        Err(Error::Layout { .. })
    ));
    assert!(matches!(
        GuestRam::new(&[(0, 0)]),
        Err(Error::Layout { .. })
    ));
}

#[test]
fn ram_that_is_being_filled_takes_every_page() {
    const PAGES: usize = 96;
    let half = PAGES as u64 / 2 * PAGE_SIZE;
    let ram = GuestRam::new(&[(0, half), (half, half)]).unwrap();
    let mut expected = vec![0; PAGES * PAGE_SIZE as usize];
    for (number, page) in expected.chunks_mut(PAGE_SIZE as usize).enumerate() {
        page.fill(number as u8 + 1);
    }
    // Some pages are there before, or come twice.
    ram.write(5 * PAGE_SIZE, &[0xff; 3]).unwrap();
    let filling = ram.fill();
    let put = |first: usize, pages: usize| {
        let at = first * PAGE_SIZE as usize;
        let pages = &expected[at..at + pages * PAGE_SIZE as usize];
        ram.put_pages(at as u64, pages).unwrap();
    };
    put(47, 2);
    put(90, 1);
    std::thread::scope(|scope| {
        for first in (0..PAGES).step_by(12) {
            scope.spawn(move || put(first, 12));
        }
    });
    let beyond = ram.put_pages(2 * half - PAGE_SIZE, &[0; 2 * PAGE_SIZE as usize]);
    assert_eq!(beyond.unwrap_err().errno(), libc::EFAULT);
    let hole = PageRun {
        gpa: 20 * PAGE_SIZE,
        pages: 3,
    };
    ram.zero(hole).unwrap();
    put(21, 1);
    drop(filling);
    for number in [20, 22] {
        expected[number * PAGE_SIZE as usize..][..PAGE_SIZE as usize].fill(0);
    }
    let mut all = vec![0; expected.len()];
    ram.read(0, &mut all).unwrap();
    assert!(all == expected);
    // It is RAM like any other again.
    ram.put_pages(0, &expected[..4096]).unwrap();
    ram.zero(hole).unwrap();
    ram.write(20 * PAGE_SIZE, &[7]).unwrap();
}
