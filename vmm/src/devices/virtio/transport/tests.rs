//! The function as a whole, driven by a test's driver: interrupts, BARs, what hostile drivers do.

use super::super::rng::Rng;
use super::super::testing::{Driver, WINDOW};
use super::*;
use crate::devices::DeviceState;
use crate::devices::pci::FunctionState;

const BUFFER: u64 = 0x10_0000;
const EVENT_IDX: u64 = 1 << 29;
const INDIRECT: u64 = 1 << 28;
const RING_RESET: u64 = 1 << 40;

fn rng(features: u64) -> Driver {
    Driver::start(Box::new(Rng), features, 1)
}

/// One request for 8 bytes, which are put where zeroes were.
fn works(driver: &mut Driver) {
    driver.ram.write(BUFFER, &[0; 8]).unwrap();
    driver.offer(0, &[(BUFFER, 8, true)]);
    assert_eq!(driver.used(0).1, 8);
    let mut bytes = [0; 8];
    driver.ram.read(BUFFER, &mut bytes).unwrap();
    assert_ne!(bytes, [0; 8]);
}

fn mask(driver: &Driver, vector: u64, masked: bool) {
    driver.write(0x4000 + 16 * vector + 12, &u32::from(masked).to_le_bytes());
}

fn pending(driver: &Driver) -> u8 {
    let mut byte = [0];
    driver.read(0x5000, &mut byte);
    byte[0]
}

#[test]
fn a_masked_interrupt_is_pending_until_it_is_unmasked() {
    let mut driver = rng(0);
    works(&mut driver);
    driver.wait_interrupt(1);
    mask(&driver, 1, true);
    works(&mut driver);
    super::super::testing::until("the pending bit", || pending(&driver) == 2);
    assert!(!driver.interrupted(1));
    // As a whole too.
    let msix = driver.capability(0x11).unwrap();
    driver.config_write(msix + 2, &[0, 0xc0]);
    mask(&driver, 1, false);
    assert!(!driver.interrupted(1) && pending(&driver) == 2);
    driver.config_write(msix + 2, &[0, 0x80]);
    assert!(driver.interrupted(1) && pending(&driver) == 0);
}

#[test]
fn a_pending_interrupt_goes_with_the_guest() {
    let mut driver = rng(0);
    mask(&driver, 1, true);
    works(&mut driver);
    super::super::testing::until("the pending bit", || pending(&driver) == 2);
    let mut driver = driver.migrate_to(Box::new(Rng));
    assert!(!driver.interrupted(1) && pending(&driver) == 2);
    mask(&driver, 1, false);
    driver.wait_interrupt(1);
    works(&mut driver);
    driver.wait_interrupt(1);
    let routes = driver.recorder.routes.lock().unwrap();
    let route = routes.get(&1).unwrap();
    assert_eq!(
        (route.address, route.data, route.device),
        (0xfee0_0000, 1, 8)
    );
}

#[test]
fn a_route_follows_the_table() {
    let driver = rng(0);
    mask(&driver, 1, true);
    driver.write(0x4010, &0x1234_5678_9abc_def0_u64.to_le_bytes());
    driver.write(0x4018, &0x55u32.to_le_bytes());
    let data = |d: &Driver| d.recorder.routes.lock().unwrap()[&1];
    assert_eq!(data(&driver).data, 1);
    mask(&driver, 1, false);
    let route = data(&driver);
    assert_eq!((route.address, route.data), (0x1234_5678_9abc_def0, 0x55));
}

#[test]
fn a_bar_moves_and_its_doorbell_with_it() {
    let mut driver = rng(0);
    works(&mut driver);
    let bells = |driver: &Driver| driver.recorder.bells.lock().unwrap().clone();
    assert_eq!(bells(&driver), [WINDOW + at::NOTIFY]);
    let there = WINDOW + 0x10_0000;
    driver.config_write(0x10, &(there as u32).to_le_bytes());
    assert_eq!(bells(&driver), [there + at::NOTIFY]);
    let mut byte = [0];
    driver.read(0x14, &mut byte);
    assert_eq!(byte, [0xff], "nothing is where it was");
    driver.set_bar(there);
    works(&mut driver);
    // Sizing, while memory is on: what is meant is the end of the address space.
    driver.config_write(0x10, &[0xff; 8]);
    assert!(bells(&driver).is_empty());
    // Over RAM, beyond the windows, across their end: it decodes nowhere.
    for address in [
        0,
        0x10_0000,
        0x0fff_8000,
        0x2000_0000,
        WINDOW + 0x1000_0000,
        !0x7fff,
    ] {
        driver.config_write(0x10, &u64::to_le_bytes(address));
        assert!(bells(&driver).is_empty(), "{address:#x}");
    }
    driver.config_write(0x10, &there.to_le_bytes());
    works(&mut driver);
    driver.config_write(4, &[0]);
    assert!(bells(&driver).is_empty());
}

#[test]
fn of_two_bars_over_each_other_the_first_decodes() {
    let mut driver = rng(0);
    let second = {
        let mut root = driver.root.lock().unwrap();
        let name = CString::new("device/1").unwrap();
        let ram = driver.ram.clone();
        VirtioPci::add(&mut root, name, Box::new(Rng), ram).unwrap()
    };
    let config = |driver: &Driver, offset: u16, data: &[u8]| {
        let mut root = driver.root.lock().unwrap();
        root.function(second).write_config(offset, data);
    };
    config(&driver, 0x10, &(WINDOW + at::BAR_SIZE).to_le_bytes());
    config(&driver, 4, &[6]);
    // A store to its own configuration makes the bus look.
    driver.config_write(0x3c, &[1]);
    assert_eq!(driver.recorder.bells.lock().unwrap().len(), 2);
    config(&driver, 0x10, &WINDOW.to_le_bytes());
    driver.config_write(0x3c, &[2]);
    assert_eq!(
        *driver.recorder.bells.lock().unwrap(),
        [WINDOW + at::NOTIFY]
    );
    works(&mut driver);
}

#[test]
fn a_queue_that_can_not_be_stops_the_device_until_a_reset() {
    let good = [0x1000, 0x2000, 0x3000];
    let rows = [
        (0, good),
        (3, good),
        (65535, good),
        (128, good),
        (16, [0x1008, 0x2000, 0x3000]),
        (16, [0x1000, 0x2001, 0x3000]),
        (16, [0x1000, 0x2000, 0x3002]),
        (16, [0x20_0000, 0x2000, 0x3000]),
        (16, [0x1000, 0x1f_fff0, 0x3000]),
        (16, [0x1000, 0x2000, u64::MAX - 3]),
        (16, [0x1000, 0, 0x3000]),
    ];
    let mut driver = Driver::new(Box::new(Rng));
    driver.switch_on(2);
    for (size, rings) in rows {
        driver.negotiate(0);
        driver.enable_at(0, size, rings);
        driver.set_status(15);
        driver.kick(0);
        assert_eq!(driver.status(), 0x4f, "{size} {rings:x?}");
        assert!(driver.interrupted(0));
        driver.set_status(0);
        assert_eq!(driver.status(), 0);
    }
    driver.negotiate(0);
    driver.enable(0);
    driver.set_status(15);
    works(&mut driver);
}

#[test]
fn loops_and_heads_that_are_not_there_do_no_harm() {
    let loops = |flags: u16, next: u16| {
        let mut descriptor = [0; 16];
        descriptor[..8].copy_from_slice(&BUFFER.to_le_bytes());
        descriptor[8] = 8;
        descriptor[12..14].copy_from_slice(&flags.to_le_bytes());
        descriptor[14..].copy_from_slice(&next.to_le_bytes());
        descriptor
    };
    // A chain that is its own end, one that leads out of the table, an indirect table in itself.
    for descriptor in [loops(3, 0), loops(3, 999), loops(4, 0), loops(5, 0)] {
        let mut driver = rng(INDIRECT);
        driver.ram.write(0x1000, &descriptor).unwrap();
        driver.publish(0, 0);
        driver.publish(0, 0xffff);
        driver.kick(0);
        driver.set_status(0);
        assert_eq!(driver.status(), 0);
    }
    // More heads than the queue has places.
    let driver = rng(0);
    driver.ram.write(0x2002, &0x8000u16.to_le_bytes()).unwrap();
    driver.kick(0);
    driver.wait_needs_reset();
}

#[test]
fn interrupts_come_where_the_driver_asked_for_them() {
    let mut driver = rng(EVENT_IDX);
    // used_event, behind the available ring: tell me after the third.
    driver.ram.write(0x2000 + 4 + 2 * 16, &[2, 0]).unwrap();
    for _ in 0..2 {
        works(&mut driver);
    }
    driver.stop_vm();
    assert!(!driver.interrupted(1));
    driver.start_vm();
    works(&mut driver);
    driver.wait_interrupt(1);
}

#[test]
fn a_queue_is_reset_and_set_up_again_while_the_device_runs() {
    let mut driver = rng(RING_RESET);
    works(&mut driver);
    driver.write(0x3a, &1u16.to_le_bytes());
    driver.ram.write(0x1000, &[0; 0x2100]).unwrap();
    driver.kick(0);
    let mut enabled = [0; 2];
    driver.read(0x1c, &mut enabled);
    assert_eq!(enabled, [0, 0]);
    driver.enable(0);
    works(&mut driver);
    assert_eq!(driver.status(), 15);
}

#[test]
fn features_that_were_not_offered_are_refused() {
    let driver = Driver::new(Box::new(Rng));
    let mut driver = driver;
    driver.switch_on(2);
    driver.negotiate(1 << 5);
    assert_eq!(driver.status(), 3);
    driver.set_status(0);
    driver.negotiate(0);
    assert_eq!(driver.status(), 11);
}

#[test]
fn configuration_space_reaches_into_the_bar() {
    let driver = rng(0);
    // The last of the vendor capabilities.
    let mut at = driver.capability(0x09).unwrap();
    let mut header = [0; 4];
    loop {
        driver.config_read(at, &mut header);
        if header[3] == 5 {
            break;
        }
        at = u64::from(header[1]);
    }
    driver.config_write(at + 8, &0x14u32.to_le_bytes());
    driver.config_write(at + 12, &1u32.to_le_bytes());
    let mut byte = [0];
    driver.config_read(at + 16, &mut byte);
    assert_eq!(byte, [15]);
    driver.config_write(at + 16, &[0]);
    assert_eq!(driver.status(), 0);
    for (offset, width) in [(u32::MAX, 1u32), (0x7fff, 2), (0x8000, 4), (0, 0), (0, 64)] {
        driver.config_write(at + 8, &offset.to_le_bytes());
        driver.config_write(at + 12, &width.to_le_bytes());
        let mut data = [0; 4];
        driver.config_write(at + 16, &data);
        driver.config_read(at + 16, &mut data);
    }
}

#[test]
fn a_broken_state_is_refused_and_leaves_a_device_that_works() {
    let driver = rng(0);
    driver.stop_vm();
    let state = FunctionState::new(&driver.root, driver.slot)
        .save()
        .unwrap();
    let there = Driver::new(Box::new(Rng));
    let mut function = FunctionState::new(&there.root, there.slot);
    for cut in 0..state.len() {
        assert!(function.load(1, &state[..cut]).is_err(), "cut at {cut}");
    }
    for at in 0..state.len() {
        for bit in 0..8 {
            let mut broken = state.clone();
            broken[at] ^= 1 << bit;
            // Many are other states that a guest could be in; none may do harm.
            let _ = function.load(1, &broken);
        }
    }
    assert!(function.load(2, &state).is_err());
    function.load(1, &state).unwrap();
    there.ram.write(0x1000, &[0; 0x2100]).unwrap();
    there.start_vm();
    there.stop_vm();
}
