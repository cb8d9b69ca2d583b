//! The way in from another monitor: QEMU's `virt` machine starts an ELF program with nothing in its
//! registers and a device tree (Devicetree Specification, chapter 5) at the start of RAM. From that the
//! boot page is made that this project's monitor would have written there.

use core::{ptr, slice};

use blackout_abi::guest::{
    AARCH64_BOOT_PAGE, AARCH64_RAM_BASE, BOOT_MAGIC, BootPage, CMDLINE_MAX, SHARED_PAGE_OFFSET,
};

/// Bytes from the start of RAM to this program: the tree is no longer.
const ROOM: usize = 0x20_0000;
const MAGIC: u32 = 0xd00d_feed;

mod token {
    pub(super) const BEGIN_NODE: u32 = 1;
    pub(super) const END_NODE: u32 = 2;
    pub(super) const PROP: u32 = 3;
    pub(super) const NOP: u32 = 4;
}

/// Writes the boot page, and leaves the shared page behind it empty.
///
/// # Safety
/// RAM is mapped where it is, and nothing refers to what lies below this program.
pub(super) unsafe fn make_boot_page() {
    // SAFETY: the caller's.
    let tree = unsafe { slice::from_raw_parts(AARCH64_RAM_BASE as *const u8, ROOM) };
    let page = read(tree);
    let boot_page = AARCH64_BOOT_PAGE as *mut BootPage;
    let shared = (AARCH64_BOOT_PAGE + SHARED_PAGE_OFFSET) as *mut u8;
    // SAFETY: the caller's; the tree was read.
    unsafe {
        ptr::write_bytes(shared, 0, 4096);
        boot_page.write(page);
    }
}

/// What a tree says of its machine. Without one there is no magic, and so no machine.
fn read(tree: &[u8]) -> BootPage {
    let mut page = BootPage {
        magic: 0,
        version: 1,
        vcpus: 0,
        ram_base: 0,
        ram_size: 0,
        serial: 0,
        gicd: 0,
        gicr: 0,
        its: 0,
        cmdline_len: 0,
        cmdline: [0; CMDLINE_MAX + 1],
    };
    if number(tree, 0) == Some(MAGIC) && walk(tree, &mut page).is_some() {
        page.magic = BOOT_MAGIC;
    }
    page
}

/// Visits every property; `None` for a tree that is cut off.
fn walk(tree: &[u8], page: &mut BootPage) -> Option<()> {
    let structure = number(tree, 8)? as usize;
    let strings = tree.get(number(tree, 12)? as usize..)?;
    let (mut at, mut depth, mut node) = (structure, 0_u32, &tree[..0]);
    loop {
        let token = number(tree, at)?;
        at += 4;
        match token {
            token::BEGIN_NODE => {
                node = text(tree.get(at..)?)?;
                at = (at + node.len() + 1).next_multiple_of(4);
                depth += 1;
                page.vcpus += u32::from(node.starts_with(b"cpu@"));
            }
            token::PROP => {
                let length = number(tree, at)? as usize;
                let name = text(strings.get(number(tree, at + 4)? as usize..)?)?;
                let value = tree.get(at + 8..at + 8 + length)?;
                at = (at + 8 + length).next_multiple_of(4);
                property(page, node, name, value)?;
            }
            token::END_NODE => {
                depth = depth.checked_sub(1)?;
                if depth == 0 {
                    return Some(());
                }
            }
            token::NOP => {}
            _ => return None,
        }
    }
}

/// Takes over what is wanted; addresses and sizes have two cells each. A node's properties come before
/// the nodes in it.
fn property(page: &mut BootPage, node: &[u8], name: &[u8], value: &[u8]) -> Option<()> {
    let is = |kind: &[u8]| name == b"reg" && node.starts_with(kind);
    if is(b"memory@") {
        (page.ram_base, page.ram_size) = (cells(value, 0)?, cells(value, 1)?);
    } else if is(b"pl011@") {
        page.serial = cells(value, 0)?;
    } else if is(b"intc@") {
        (page.gicd, page.gicr) = (cells(value, 0)?, cells(value, 2)?);
    } else if is(b"its@") {
        page.its = cells(value, 0)?;
    } else if (node, name) == (b"chosen", b"bootargs") {
        let words = text(value)?;
        page.cmdline.get_mut(..words.len())?.copy_from_slice(words);
        page.cmdline_len = words.len() as u64;
    }
    Some(())
}

/// The bytes up to a NUL.
fn text(bytes: &[u8]) -> Option<&[u8]> {
    let end = bytes.iter().position(|&byte| byte == 0)?;
    bytes.get(..end)
}

fn number(bytes: &[u8], at: usize) -> Option<u32> {
    let bytes = bytes.get(at..)?.first_chunk()?;
    Some(u32::from_be_bytes(*bytes))
}

/// The `index`th pair of cells.
fn cells(bytes: &[u8], index: usize) -> Option<u64> {
    let bytes = bytes.get(index * 8..)?.first_chunk()?;
    Some(u64::from_be_bytes(*bytes))
}
