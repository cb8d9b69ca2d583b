use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use super::super::testing::Driver;
use super::packet::{HOST, NO_RECEIVE, NO_SEND, Op, Ports, SIZE};
use super::*;

const CID: u32 = 7;
const SEND: u64 = 0x10_0000;
const RECEIVE: u64 = 0x11_0000;
const PORTS: Ports = Ports {
    guest: 1000,
    host: 52,
};

fn vsock(folder: &Path) -> Box<Vsock> {
    let path = folder.join("v");
    Box::new(Vsock::new(&Options { cid: CID, path }).unwrap())
}

fn start(folder: &Path) -> Driver {
    let driver = Driver::start(vsock(folder), 0, 3);
    // Nothing serves the sockets before the VM runs.
    driver.stop_vm();
    driver.start_vm();
    driver
}

/// A packet of the guest.
fn send(driver: &mut Driver, ports: Ports, op: u16, flags: u32, data: &[u8]) {
    let mut bytes = [0; SIZE];
    bytes[..8].copy_from_slice(&u64::from(CID).to_le_bytes());
    bytes[8..16].copy_from_slice(&HOST.to_le_bytes());
    bytes[16..20].copy_from_slice(&ports.guest.to_le_bytes());
    bytes[20..24].copy_from_slice(&ports.host.to_le_bytes());
    bytes[24..28].copy_from_slice(&(data.len() as u32).to_le_bytes());
    bytes[28..30].copy_from_slice(&1u16.to_le_bytes());
    bytes[30..32].copy_from_slice(&op.to_le_bytes());
    bytes[32..36].copy_from_slice(&flags.to_le_bytes());
    bytes[36..40].copy_from_slice(&4096u32.to_le_bytes());
    driver.ram.write(SEND, &bytes).unwrap();
    driver.ram.write(SEND + SIZE as u64, data).unwrap();
    let len = SIZE as u32;
    match data.len() as u32 {
        0 => driver.offer(1, &[(SEND, len, false)]),
        data => driver.offer(1, &[(SEND, len, false), (SEND + SIZE as u64, data, false)]),
    };
    driver.used(1);
}

/// The next packet of the host: what it is for, its ports, flags, data.
fn receive(driver: &mut Driver) -> (Op, Ports, u32, Vec<u8>) {
    driver.offer(0, &[(RECEIVE, 8192, true)]);
    let (_, len) = driver.used(0);
    let mut bytes = vec![0; len as usize];
    driver.ram.read(RECEIVE, &mut bytes).unwrap();
    // Read from the guest's side: it is the host's packet with the sides exchanged.
    let (head, data) = bytes.split_at(SIZE);
    let mut swapped = head.to_vec();
    swapped[..8].copy_from_slice(&head[8..16]);
    swapped[8..16].copy_from_slice(&head[..8]);
    swapped[16..20].copy_from_slice(&head[20..24]);
    swapped[20..24].copy_from_slice(&head[16..20]);
    driver.ram.write(RECEIVE, &swapped).unwrap();
    let mut pieces = driver.ram.pieces([(RECEIVE, SIZE as u32)]).unwrap();
    let header = Header::from_guest(&mut pieces, u64::from(CID)).unwrap();
    assert_eq!(header.len as usize, data.len());
    (
        header.op.unwrap(),
        header.ports,
        header.flags,
        data.to_vec(),
    )
}

/// A connection that the guest opened to a listener of the host.
fn connected(folder: &Path, driver: &mut Driver) -> UnixStream {
    let listener = UnixListener::bind(folder.join("v_52")).unwrap();
    send(driver, PORTS, 1, 0, &[]);
    let stream = listener.accept().unwrap().0;
    assert_eq!(receive(driver).0, Op::Response);
    stream
}

#[test]
fn a_guest_connects_to_the_host() {
    let folder = tempfile::tempdir().unwrap();
    let mut driver = start(folder.path());
    let mut stream = connected(folder.path(), &mut driver);
    send(&mut driver, PORTS, 5, 0, b"ping");
    let mut heard = [0; 4];
    stream.read_exact(&mut heard).unwrap();
    assert_eq!(&heard, b"ping");
    stream.write_all(b"pong").unwrap();
    let (op, ports, _, data) = receive(&mut driver);
    assert_eq!((op, ports, data), (Op::Data, PORTS, b"pong".to_vec()));

    // The guest closes its side, then the host does.
    send(&mut driver, PORTS, 4, NO_SEND, &[]);
    assert_eq!(stream.read(&mut heard).unwrap(), 0);
    drop(stream);
    let (op, _, flags, _) = receive(&mut driver);
    assert_eq!((op, flags), (Op::Shutdown, NO_SEND));
    send(&mut driver, PORTS, 4, NO_SEND | NO_RECEIVE, &[]);
    assert_eq!(receive(&mut driver).0, Op::Reset);
}

#[test]
fn the_host_connects_to_a_guest() {
    let folder = tempfile::tempdir().unwrap();
    let mut driver = start(folder.path());
    let mut stream = UnixStream::connect(folder.path().join("v")).unwrap();
    stream.write_all(b"CONNECT 1234\nearly").unwrap();
    let (op, ports, _, _) = receive(&mut driver);
    assert_eq!((op, ports.guest), (Op::Request, 1234));
    send(&mut driver, ports, 2, 0, &[]);
    let mut line = String::new();
    let mut reader = BufReader::new(stream.try_clone().unwrap());
    reader.read_line(&mut line).unwrap();
    assert_eq!(line, format!("OK {}\n", ports.host));
    assert_eq!(receive(&mut driver).3, b"early");
    send(&mut driver, ports, 3, 0, &[]);
    assert_eq!(reader.read_line(&mut line).unwrap(), 0);
}

#[test]
fn nobody_gets_more_than_it_has_room_for() {
    let folder = tempfile::tempdir().unwrap();
    let mut driver = start(folder.path());
    let mut stream = connected(folder.path(), &mut driver);
    stream.write_all(&[1; 10_000]).unwrap();
    // The guest said 4096 bytes.
    assert_eq!(receive(&mut driver).3.len(), 4096);
    driver.offer(0, &[(RECEIVE, 8192, true)]);
    driver.stop_vm();
    driver.start_vm();
    // The host's buffer, and what the socket holds: more is the guest's fault.
    let chunk = vec![2; 32 << 10];
    for _ in 0..100 {
        send(&mut driver, PORTS, 5, 0, &chunk);
    }
    let (_, len) = driver.used(0);
    assert_eq!(len as usize, SIZE);
    let mut op = [0; 2];
    driver.ram.read(RECEIVE + 30, &mut op).unwrap();
    assert!([3, 6].contains(&u16::from_le_bytes(op)));
}

#[test]
fn what_nobody_listens_to_is_reset() {
    let folder = tempfile::tempdir().unwrap();
    let mut driver = start(folder.path());
    for (op, flags) in [(1, 0), (2, 0), (4, 3), (5, 0), (6, 0), (7, 0), (99, 0)] {
        send(&mut driver, PORTS, op, flags, &[]);
        assert_eq!(receive(&mut driver).0, Op::Reset, "op {op}");
    }
    send(&mut driver, PORTS, 3, 0, &[]);
    // More requests than are answered at a time: the others wait.
    for _ in 0..300 {
        driver.offer(1, &[(SEND, 10, false)]);
        driver.used(1);
    }
    assert_eq!(driver.status() & 0x40, 0);
}

#[test]
fn a_guest_that_moved_learns_that_its_connections_are_gone() {
    let folder = tempfile::tempdir().unwrap();
    let mut driver = start(folder.path());
    let mut stream = connected(folder.path(), &mut driver);
    driver.offer(2, &[(RECEIVE, 4, true)]);
    driver.ram.write(RECEIVE, &[0xff; 4]).unwrap();
    let mut driver = driver.migrate_to(vsock(folder.path()));
    assert_eq!(driver.used(2), (0, 4));
    let mut event = [0xff; 4];
    driver.ram.read(RECEIVE, &mut event).unwrap();
    assert_eq!(event, TRANSPORT_RESET);
    assert_eq!(stream.read(&mut [0]).unwrap(), 0);
    // The destination listens where the source did.
    let mut stream = UnixStream::connect(folder.path().join("v")).unwrap();
    stream.write_all(b"CONNECT 5\n").unwrap();
    assert_eq!(receive(&mut driver).0, Op::Request);
}
