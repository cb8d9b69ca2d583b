use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::super::testing::{Driver, until};
use super::*;

const MAC: Mac = Mac([0x52, 0x54, 0, 0x12, 0x34, 0x56]);
const BUFFER: u64 = 0x10_0000;
const MERGEABLE: u64 = 1 << VIRTIO_NET_F_MRG_RXBUF;

/// A socket in a tap's place.
struct Socket {
    file: File,
    offloads: Arc<Mutex<Offloads>>,
}

impl Wire for Socket {
    fn file(&self) -> &File {
        &self.file
    }

    fn set_offloads(&self, offloads: Offloads) -> io::Result<()> {
        *self.offloads.lock().unwrap() = offloads;
        Ok(())
    }
}

/// A card, the other end of its cable, and what the host was told that the guest can take.
fn card() -> (Box<Net>, UnixDatagram, Arc<Mutex<Offloads>>) {
    let (ours, theirs) = UnixDatagram::pair().unwrap();
    ours.set_nonblocking(true).unwrap();
    theirs
        .set_read_timeout(Some(Duration::from_secs(20)))
        .unwrap();
    let offloads = Arc::<Mutex<Offloads>>::default();
    let wire = Socket {
        file: File::from(OwnedFd::from(ours)),
        offloads: Arc::clone(&offloads),
    };
    (Box::new(Net::new(Box::new(wire), MAC)), theirs, offloads)
}

fn packet(len: usize) -> Vec<u8> {
    let mut packet = vec![0; HEADER];
    packet.extend((0..len).map(|n| n as u8));
    packet
}

fn at(driver: &Driver, address: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    driver.ram.read(address, &mut bytes).unwrap();
    bytes
}

#[test]
fn packets_go_both_ways() {
    let (card, wire, _) = card();
    let mut driver = Driver::start(card, 0, 2);
    driver.offer(0, &[(BUFFER, 2048, true)]);
    wire.send(&packet(100)).unwrap();
    assert_eq!(driver.used(0), (0, 112));
    driver.wait_interrupt(1);
    let mut expected = packet(100);
    expected[NUM_BUFFERS] = 1;
    assert_eq!(at(&driver, BUFFER, 112), expected);

    driver.ram.write(BUFFER, &packet(1000)).unwrap();
    driver.offer(1, &[(BUFFER, 12, false), (BUFFER + 12, 1000, false)]);
    assert_eq!(driver.used(1), (0, 0));
    let mut sent = vec![0; 2000];
    let len = wire.recv(&mut sent).unwrap();
    assert_eq!(sent[..len], packet(1000));
    driver.wait_interrupt(2);
}

#[test]
fn a_packet_takes_as_many_buffers_as_it_needs_and_waits_for_them() {
    let (card, wire, _) = card();
    let mut driver = Driver::start(card, MERGEABLE, 2);
    for n in 0..2 {
        driver.offer(0, &[(BUFFER + 100 * n, 100, true)]);
    }
    wire.send(&packet(288)).unwrap();
    driver.stop_vm();
    driver.start_vm();
    driver.offer(0, &[(BUFFER + 200, 100, true)]);
    for n in 0..3 {
        assert_eq!(driver.used(0), (n, 100));
    }
    let mut expected = packet(288);
    expected[NUM_BUFFERS] = 3;
    assert_eq!(at(&driver, BUFFER, 300), expected);
}

#[test]
fn a_packet_without_buffers_goes_with_the_guest() {
    let (source, wire, _) = card();
    let driver = Driver::start(source, MERGEABLE, 2);
    wire.send(&packet(50)).unwrap();
    // The device has read it when nothing is left to read.
    until("the packet to be read", || {
        driver.kick(0);
        driver.stop_vm();
        driver.start_vm();
        true
    });
    let (destination, there, offloads) = card();
    let mut driver = driver.migrate_to(destination);
    assert!(!offloads.lock().unwrap().csum);
    let mut announced = [0; 200];
    let len = there.recv(&mut announced).unwrap();
    assert_eq!(announced[..len], announcement(MAC));
    driver.offer(0, &[(BUFFER, 2048, true)]);
    assert_eq!(driver.used(0), (0, 62));
}

#[test]
fn the_host_is_told_what_the_guest_takes() {
    let (card, _wire, offloads) = card();
    let bits = [
        VIRTIO_NET_F_GUEST_CSUM,
        VIRTIO_NET_F_GUEST_TSO4,
        VIRTIO_NET_F_HOST_TSO6,
    ];
    let features = bits.into_iter().fold(0, |all, bit| all | 1 << bit);
    let _driver = Driver::start(card, features, 2);
    let offloads = offloads.lock().unwrap();
    assert!(offloads.csum && offloads.tso4 && !offloads.tso6);
}

#[test]
fn more_packets_than_a_batch_arrive_and_a_stop_is_not_kept_waiting() {
    let (card, wire, _) = card();
    let mut driver = Driver::start(card, 0, 2);
    wire.set_nonblocking(true).unwrap();
    let mut sent = 0;
    while sent < 3 * BATCH {
        driver.offer(0, &[(BUFFER, 256, true)]);
        if wire.send(&packet(60)).is_ok() {
            sent += 1;
        }
        driver.used(0);
    }
    driver.stop_vm();
    driver.start_vm();
}

#[test]
fn what_is_no_packet_stops_the_card() {
    let (card, _wire, _) = card();
    let mut driver = Driver::start(card, 0, 2);
    driver.offer(1, &[(BUFFER, 12, false)]);
    driver.wait_needs_reset();
}

#[test]
fn another_card_is_not_taken_for_the_same() {
    let (mut card, _wire, _) = card();
    let state = card.save().unwrap();
    card.mac = Mac::of_tap("another");
    let error = card.load(&state).unwrap_err().to_string();
    assert!(error.ends_with("give mac=52:54:00:12:34:56"), "{error}");
    for cut in 0..state.len() {
        assert!(card.load(&state[..cut]).is_err());
    }
    let long = Saved {
        mac: card.mac,
        waiting: vec![0; PACKET_MAX + 1],
    };
    assert!(card.load(&encode(&long).unwrap()).is_err());
}
