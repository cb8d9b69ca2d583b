use std::fs;
use std::io::Write;

use tempfile::NamedTempFile;

use super::super::testing::Driver;
use super::*;

const SECTORS: u64 = 256;
const HEADER: u64 = 0x10_0000;
const STATUS: u64 = 0x10_1000;
const DATA: u64 = 0x11_0000;

fn image() -> NamedTempFile {
    let mut file = NamedTempFile::new().unwrap();
    let bytes: Vec<u8> = (0..SECTORS)
        .flat_map(|sector| [sector as u8; SECTOR as usize])
        .collect();
    file.write_all(&bytes).unwrap();
    file
}

fn open(image: &NamedTempFile, readonly: bool) -> Box<Blk> {
    let options = Options {
        path: image.path().to_owned(),
        readonly,
        id: "a-disk".to_owned(),
    };
    Box::new(Blk::open(&options).unwrap())
}

fn start(image: &NamedTempFile) -> Driver {
    Driver::start(open(image, false), 0, 1)
}

/// One request with its header and status at `n`th places; returns where its status will be.
fn offer(driver: &mut Driver, n: u64, kind: u32, sector: u64, data: &[(u64, u32, bool)]) -> u64 {
    let (header, status) = (HEADER + 16 * n, STATUS + n);
    let mut bytes = [0; 16];
    bytes[..4].copy_from_slice(&kind.to_le_bytes());
    bytes[8..].copy_from_slice(&sector.to_le_bytes());
    driver.ram.write(header, &bytes).unwrap();
    driver.ram.write(status, &[0xee]).unwrap();
    let mut buffers = vec![(header, 16, false)];
    buffers.extend(data);
    buffers.push((status, 1, true));
    driver.offer(0, &buffers);
    status
}

fn byte(driver: &Driver, at: u64) -> u8 {
    let mut byte = [0];
    driver.ram.read(at, &mut byte).unwrap();
    byte[0]
}

/// One request from beginning to end: its status, and how many bytes were written.
fn request(driver: &mut Driver, kind: u32, sector: u64, data: &[(u64, u32, bool)]) -> (u8, u32) {
    let status = offer(driver, 0, kind, sector, data);
    let (_, len) = driver.used(0);
    (byte(driver, status), len)
}

#[test]
fn a_guest_reads_and_writes() {
    let image = image();
    let mut driver = start(&image);
    let read = [(DATA, 512, true), (DATA + 512, 1024, true)];
    assert_eq!(request(&mut driver, 0, 7, &read), (0, 1537));
    for (sector, expected) in [(0, 7), (1, 8), (2, 9)] {
        assert_eq!(byte(&driver, DATA + 512 * sector), expected);
    }
    driver.wait_interrupt(1);

    driver.ram.write(DATA, &[0x5a; 1024]).unwrap();
    assert_eq!(request(&mut driver, 1, 2, &[(DATA, 1024, false)]), (0, 1));
    assert_eq!(request(&mut driver, 4, 0, &[]), (0, 1));
    let contents = fs::read(image.path()).unwrap();
    assert_eq!(contents[1023], 1);
    assert_eq!(contents[1024..2048], [0x5a; 1024]);
    assert_eq!(contents[2048], 4);

    assert_eq!(request(&mut driver, 8, 0, &[(DATA, 20, true)]), (0, 21));
    let mut id = [0; 20];
    driver.ram.read(DATA, &mut id).unwrap();
    assert_eq!(&id[..7], b"a-disk\0");
}

#[test]
fn what_is_discarded_or_zeroed_reads_as_zero() {
    let image = image();
    let mut driver = start(&image);
    for (kind, sector, flags) in [(11, 10u64, 0u32), (13, 20, 0), (13, 30, 1)] {
        let mut range = [0; 16];
        range[..8].copy_from_slice(&sector.to_le_bytes());
        range[8..12].copy_from_slice(&2u32.to_le_bytes());
        range[12..].copy_from_slice(&flags.to_le_bytes());
        driver.ram.write(DATA, &range).unwrap();
        let (status, _) = request(&mut driver, kind, 0, &[(DATA, 16, false)]);
        // Not every file system can zero a range in place.
        assert!(status == 0 || kind == 13 && flags == 0 && status == 2);
        if status == 0 {
            let contents = fs::read(image.path()).unwrap();
            let at = sector as usize * 512;
            assert_eq!(contents[at..at + 1024], [0; 1024]);
            assert_eq!(contents[at + 1024], sector as u8 + 2);
        }
    }
}

#[test]
fn a_request_that_can_not_be_is_answered_with_an_error() {
    let image = image();
    let mut driver = start(&image);
    type Row = (u32, u64, &'static [(u64, u32, bool)], u8);
    let rows: [Row; 7] = [
        (0, SECTORS, &[(DATA, 512, true)], 1),
        (0, SECTORS - 1, &[(DATA, 1024, true)], 1),
        (0, u64::MAX, &[(DATA, 512, true)], 1),
        (0, 0, &[(DATA, 100, true)], 1),
        (1, SECTORS, &[(DATA, 512, false)], 1),
        (11, 0, &[(DATA, 15, false)], 1),
        (99, 0, &[], 2),
    ];
    for (kind, sector, data, expected) in rows {
        let (status, len) = request(&mut driver, kind, sector, data);
        assert_eq!((status, len), (expected, 1), "kind {kind} sector {sector}");
    }
    assert_eq!(driver.status() & 0x40, 0);

    let mut readonly = Driver::start(open(&image, true), 1 << 5, 1);
    assert_eq!(request(&mut readonly, 1, 0, &[(DATA, 512, false)]).0, 1);
    assert_eq!(request(&mut readonly, 0, 0, &[(DATA, 512, true)]).0, 0);
}

#[test]
fn a_chain_that_can_not_be_answered_stops_the_device_until_a_reset() {
    let chains: [&[(u64, u32, bool)]; 7] = [
        &[(HEADER, 8, false), (STATUS, 1, true)],
        &[(HEADER, 16, false)],
        &[(STATUS, 1, true)],
        &[(STATUS, 1, true), (HEADER, 16, false)],
        &[(u64::MAX, 16, false), (STATUS, 1, true)],
        &[(HEADER, u32::MAX, false), (STATUS, 1, true)],
        &[(HEADER, 16, false), (0x20_0000, 1, true)],
    ];
    for chain in chains {
        let image = image();
        let mut driver = start(&image);
        driver.offer(0, chain);
        driver.wait_needs_reset();
        driver.wait_interrupt(0);
        driver.set_status(0);
        assert_eq!(driver.status(), 0);
        driver.negotiate(0);
        driver.enable(0);
        driver.ram.write(0x2000, &[0; 0x2004]).unwrap();
        driver.set_status(15);
        assert_eq!(request(&mut driver, 0, 1, &[(DATA, 512, true)]), (0, 513));
    }
}

#[test]
fn a_guest_moves_with_requests_under_way() {
    let image = image();
    let mut driver = start(&image);
    driver.start_vm();
    for round in 0..20u64 {
        for n in 0..5 {
            driver
                .ram
                .write(DATA + 512 * n, &[round as u8; 512])
                .unwrap();
            offer(
                &mut driver,
                n,
                1,
                5 * round + n,
                &[(DATA + 512 * n, 512, false)],
            );
        }
        driver = driver.migrate_to(open(&image, false));
        // The interrupt may have been left at the source: there is one here.
        driver.wait_interrupt(1);
        for n in 0..5 {
            driver.used(0);
            assert_eq!(byte(&driver, STATUS + n), 0);
        }
        let contents = fs::read(image.path()).unwrap();
        let at = 5 * round as usize * 512;
        assert_eq!(contents[at..at + 5 * 512], [round as u8; 5 * 512]);
    }
}

#[test]
fn another_image_is_not_taken_for_the_same() {
    let image = image();
    let mut disk = open(&image, false);
    let state = disk.save().unwrap();
    image.as_file().set_len(SECTOR).unwrap();
    assert!(open(&image, false).load(&state).is_err());
    for cut in 0..state.len() {
        assert!(disk.load(&state[..cut]).is_err());
    }
}

#[test]
fn without_io_uring_requests_go_one_by_one() {
    let image = image();
    let mut disk = open(&image, false);
    disk.engine = Engine::Calls(
        File::options()
            .read(true)
            .write(true)
            .open(image.path())
            .unwrap(),
    );
    let mut driver = Driver::start(disk, 0, 1);
    assert_eq!(request(&mut driver, 0, 3, &[(DATA, 512, true)]), (0, 513));
    assert_eq!(byte(&driver, DATA), 3);
    driver.ram.write(DATA, &[1; 512]).unwrap();
    assert_eq!(request(&mut driver, 1, 3, &[(DATA, 512, false)]), (0, 1));
    assert_eq!(request(&mut driver, 4, 0, &[]), (0, 1));
    assert_eq!(fs::read(image.path()).unwrap()[3 * 512], 1);
}
