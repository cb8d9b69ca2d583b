//! The way in from another monitor: QEMU's `-kernel` starts a program that has a note of the type
//! `XEN_ELFNOTE_PHYS32_ENTRY` by Xen's PVH protocol (`xen/include/public/arch-x86/hvm/start_info.h`):
//! in 32-bit mode without paging, `ebx` pointing to a start info. From that the boot page is made
//! that this project's monitor would have written.

use core::arch::global_asm;
use core::ptr;

use blackout_abi::guest::{
    BOOT_MAGIC, BootPage, CMDLINE_MAX, SHARED_PAGE_OFFSET, X86_64_BOOT_PAGE, X86_64_RAM_BASE,
};

const MAGIC: u32 = 0x336e_c578;
const MEMORY_RAM: u32 = 1;
/// RAM above is not one piece with that below.
const HOLE: u64 = 0xc000_0000;
/// COM1.
const SERIAL: u64 = 0x3f8;
const STACK: usize = 16 << 10;

/// A page map level 4, a page directory pointer table, and four page directories.
#[repr(C, align(4096))]
struct Tables([[u64; 512]; 6]);

#[repr(C, align(16))]
struct Stack([u8; STACK]);

static mut TABLES: Tables = Tables([[0; 512]; 6]);
static mut STACK_PAGES: Stack = Stack([0; STACK]);

#[repr(C)]
struct StartInfo {
    magic: u32,
    version: u32,
    flags: u32,
    modules: u32,
    module_list: u64,
    cmdline: u64,
    rsdp: u64,
    memory_map: u64,
    memory_map_entries: u32,
    reserved: u32,
}

#[repr(C)]
struct MemoryMapEntry {
    addr: u64,
    size: u64,
    kind: u32,
    reserved: u32,
}

global_asm!(
    r#"
    .section .note.Xen, "a", @note
    .balign 4
    .long   4, 4, 18
    .asciz  "Xen"
    .long   pvh32

    .section .text.pvh, "ax"
    .code32
pvh32:
    cli
    movl    ${tables}, %edi
    leal    0x1003(%edi), %eax          /* PML4: one entry. */
    movl    %eax, (%edi)
    leal    0x2003(%edi), %eax          /* PDPT: four. */
    leal    0x1000(%edi), %edx
    movl    $4, %ecx
1:  movl    %eax, (%edx)
    addl    $0x1000, %eax
    addl    $8, %edx
    loop    1b
    leal    0x2000(%edi), %edx
    movl    $0x83, %eax                 /* Page directories: 4 GiB by pages of 2 MiB. */
    movl    $2048, %ecx
2:  movl    %eax, (%edx)
    addl    $0x200000, %eax
    addl    $8, %edx
    loop    2b
    lgdtl   pvh_gdt_pointer
    movl    $0x620, %eax                /* OSXMMEXCPT, OSFXSR, PAE. */
    movl    %eax, %cr4
    movl    %edi, %cr3
    movl    $0xc0000080, %ecx           /* EFER: LME. */
    movl    $0x100, %eax
    xorl    %edx, %edx
    wrmsr
    movl    $0x80000033, %eax           /* PG, NE, ET, MP, PE. */
    movl    %eax, %cr0
    ljmpl   $8, $pvh64
    .code64
pvh64:
    movl    $16, %eax
    movl    %eax, %ds
    movl    %eax, %es
    movl    %eax, %ss
    movl    %ebx, %edi
    leaq    {stack} + {stack_size}(%rip), %rsp
    xorl    %ebp, %ebp
    call    {boot}

    .balign 8
pvh_gdt:
    .quad   0, 0x00af9b000000ffff, 0x00cf93000000ffff
pvh_gdt_pointer:
    .word   23
    .long   pvh_gdt
    "#,
    tables = sym TABLES,
    stack = sym STACK_PAGES,
    stack_size = const STACK,
    boot = sym boot,
    options(att_syntax),
);

/// Writes the boot page and goes on as if the monitor had.
extern "C" fn boot(info: u64) -> ! {
    // SAFETY: the first 4 GiB are mapped; the start info is where `ebx` said, by PVH's contract.
    let page = unsafe { boot_page(&*(info as *const StartInfo)) };
    let boot_page = X86_64_BOOT_PAGE as *mut BootPage;
    let shared = (X86_64_BOOT_PAGE + SHARED_PAGE_OFFSET) as *mut u8;
    // SAFETY: firmware has left these pages to whoever is booted, and nothing refers to them yet.
    unsafe {
        ptr::write_bytes(shared, 0, 4096);
        boot_page.write(page);
        crate::boot(X86_64_BOOT_PAGE)
    }
}

/// One vCPU's machine: PVH does not count them.
///
/// # Safety
/// What the start info points to is mapped and as PVH says.
unsafe fn boot_page(info: &StartInfo) -> BootPage {
    let mut page = BootPage {
        // Whoever did not start this by PVH gets no machine.
        magic: if info.magic == MAGIC { BOOT_MAGIC } else { 0 },
        version: 1,
        vcpus: 1,
        ram_base: X86_64_RAM_BASE,
        ram_size: 0,
        serial: SERIAL,
        gicd: 0,
        gicr: 0,
        its: 0,
        cmdline_len: 0,
        cmdline: [0; CMDLINE_MAX + 1],
    };
    for index in 0..info.memory_map_entries as usize {
        // SAFETY: the caller's.
        let entry = unsafe { &*(info.memory_map as *const MemoryMapEntry).add(index) };
        if entry.kind == MEMORY_RAM && entry.addr < HOLE {
            page.ram_size = page.ram_size.max(entry.addr + entry.size);
        }
    }
    for (index, byte) in page.cmdline[..CMDLINE_MAX].iter_mut().enumerate() {
        // SAFETY: the caller's; the text ends with a NUL.
        *byte = unsafe { *(info.cmdline as *const u8).add(index) };
        if *byte == 0 {
            page.cmdline_len = index as u64;
            break;
        }
    }
    page
}
