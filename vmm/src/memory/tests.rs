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
