//! The ACPI tables of the board, for Linux (ACPI 6.5).
//!
//! The hardware is the full one, not the reduced: the power button is PM1's, which needs no AML.
//! ECAM must be reserved in the memory map besides, or Linux does not use it.

use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, Device, EISAName, IO, Interrupt, Name, Package, Path,
    ResourceTemplate, ZERO,
};
use acpi_tables::facs::FACS;
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace as Space, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, ProcessorLocalApic};
use acpi_tables::mcfg::MCFG;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, AmlSink};
use vm_memory::{Bytes, GuestAddress};

use super::layout::{
    ACPI, IO_APIC, LOCAL_APIC, PCI, PM1, RESET_CONTROL, RESET_CPU, SCI_GSI, SERIAL, SERIAL_GSI,
    SERIAL_SIZE,
};
use crate::memory::GuestRam;
use crate::payload;

const OEM: [u8; 6] = *b"BLACKO";
const OEM_TABLE: [u8; 8] = *b"BLACKOUT";
const REVISION: u32 = 1;

/// `IAPC_BOOT_ARCH`: there are devices at PC ports, but neither VGA nor a CMOS clock, and no
/// keyboard controller to be probed.
const BOOT_ARCH: u16 = 1 | 1 << 2 | 1 << 5;

/// Writes all tables and returns where the first, the RSDP, is: the start of [`ACPI`].
pub(super) fn write(ram: &GuestRam, vcpus: u32) -> Result<u64, payload::Error> {
    let (rsdp, tables) = tables(vcpus);
    let put = |gpa, bytes: &[u8]| ram.mem().write_slice(bytes, GuestAddress(gpa));
    put(ACPI.start, &rsdp)?;
    for (gpa, bytes) in &tables {
        put(*gpa, bytes)?;
    }
    Ok(ACPI.start)
}

/// The RSDP, and each other table with its address.
fn tables(vcpus: u32) -> (Vec<u8>, Vec<(u64, Vec<u8>)>) {
    let mut tables = Vec::new();
    // The RSDP has 36 bytes; FACS wants a multiple of 64.
    let mut next = ACPI.start + 64;
    let mut place = |table: Vec<u8>| {
        let gpa = next;
        next = (gpa + table.len() as u64).next_multiple_of(64);
        tables.push((gpa, table));
        gpa
    };
    let facs = place(bytes(&FACS::new()));
    let dsdt = place(dsdt());
    let listed = [
        place(bytes(&fadt(facs, dsdt).finalize())),
        place(madt(vcpus)),
        place(bytes(&mcfg())),
    ];
    let mut xsdt = XSDT::new(OEM, OEM_TABLE, REVISION);
    listed.into_iter().for_each(|table| xsdt.add_entry(table));
    let xsdt = place(bytes(&xsdt));
    (bytes(&Rsdp::new(OEM, xsdt)), tables)
}

fn bytes(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

fn fadt(facs: u64, dsdt: u64) -> FADTBuilder {
    let mut fadt = FADTBuilder::new(OEM, OEM_TABLE, REVISION)
        .firmware_ctrl_64(facs)
        .dsdt_64(dsdt)
        .flag(Flags::Wbinvd)
        .flag(Flags::ProcC1)
        .flag(Flags::SlpButton)
        .flag(Flags::ResetRegSup);
    fadt.sci_int = (SCI_GSI as u16).into();
    let port = |port: u64, bits| GAS::new(Space::SystemIo, bits, 0, AccessSize::Undefined, port);
    fadt.pm1a_evt_blk = (PM1 as u32).into();
    fadt.pm1_evt_len = 4;
    fadt.x_pm1a_evt_blk = port(PM1, 32);
    fadt.pm1a_cnt_blk = (PM1 as u32 + 4).into();
    fadt.pm1_cnt_len = 2;
    fadt.x_pm1a_cnt_blk = port(PM1 + 4, 16);
    // No C2 and no C3.
    fadt.p_lvl2_lat = 0xfff.into();
    fadt.p_lvl3_lat = 0xfff.into();
    fadt.iapc_boot_arch = BOOT_ARCH.into();
    fadt.reset_reg = port(RESET_CONTROL, 8);
    fadt.reset_value = RESET_CPU | 2;
    fadt
}

fn madt(vcpus: u32) -> Vec<u8> {
    // There are PICs, too.
    const PC_AT_COMPATIBLE: u32 = 1;
    let mut madt = Sdt::new(*b"APIC", 44, 5, OEM, OEM_TABLE, REVISION);
    madt.write_u32(36, LOCAL_APIC);
    madt.write_u32(40, PC_AT_COMPATIBLE);
    for id in 0..vcpus.min(u8::MAX.into()) as u8 {
        let enabled = EnabledStatus::Enabled;
        madt.append_slice(&bytes(&ProcessorLocalApic::new(id, id, enabled)));
    }
    madt.append_slice(&bytes(&IoApic::new(0, IO_APIC, 0)));
    // An interrupt source override: the SCI is the one ISA interrupt that is a level, active high.
    let gsi = SCI_GSI as u8;
    madt.append_slice(&[2, 10, 0, gsi, gsi, 0, 0, 0, 0xd, 0]);
    madt.as_slice().to_vec()
}

fn mcfg() -> MCFG {
    let mut mcfg = MCFG::new(OEM, OEM_TABLE, REVISION);
    mcfg.add_ecam(PCI.ecam.start, 0, 0, 0);
    mcfg
}

/// The devices that can't be found by looking: the PCI host bridge and COM1; and how to switch off.
fn dsdt() -> Vec<u8> {
    let mut dsdt = Sdt::new(*b"DSDT", 36, 2, OEM, OEM_TABLE, REVISION);
    let mut aml = Vec::new();
    pci_host(&mut aml);
    serial(&mut aml);
    // The power management's only sleep state has the type 0.
    let off = Package::new(vec![&ZERO, &ZERO, &ZERO, &ZERO]);
    Name::new(Path::new("_S5_"), &off).to_aml_bytes(&mut aml);
    dsdt.append_slice(&aml);
    dsdt.as_slice().to_vec()
}

fn pci_host(aml: &mut dyn AmlSink) {
    let uncached = AddressSpaceCacheable::NotCacheable;
    let (low, high) = (PCI.mmio32, PCI.mmio64);
    let (low_start, low_end) = (low.start as u32, (low.end - 1) as u32);
    let buses = AddressSpace::new_bus_number(0u16, 0);
    let mmio32 = AddressSpace::new_memory(uncached, true, low_start, low_end, None);
    let mmio64 = AddressSpace::new_memory(uncached, true, high.start, high.end - 1, None);
    Device::new(
        Path::new("_SB_.PCI0"),
        vec![
            &Name::new(Path::new("_HID"), &EISAName::new("PNP0A08")),
            &Name::new(Path::new("_CID"), &EISAName::new("PNP0A03")),
            &Name::new(Path::new("_UID"), &ZERO),
            &Name::new(Path::new("_SEG"), &ZERO),
            &Name::new(Path::new("_BBN"), &ZERO),
            // What devices write is in the CPU's caches.
            &Name::new(Path::new("_CCA"), &acpi_tables::aml::ONE),
            &Name::new(
                Path::new("_CRS"),
                &ResourceTemplate::new(vec![&buses, &mmio32, &mmio64]),
            ),
        ],
    )
    .to_aml_bytes(aml);
}

fn serial(aml: &mut dyn AmlSink) {
    let port = SERIAL as u16;
    Device::new(
        Path::new("_SB_.COM1"),
        vec![
            &Name::new(Path::new("_HID"), &EISAName::new("PNP0501")),
            &Name::new(Path::new("_UID"), &ZERO),
            &Name::new(
                Path::new("_CRS"),
                &ResourceTemplate::new(vec![
                    &IO::new(port, port, 0, SERIAL_SIZE as u8),
                    &Interrupt::new(true, true, false, false, SERIAL_GSI),
                ]),
            ),
        ],
    )
    .to_aml_bytes(aml);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    #[test]
    fn tables_are_whole_apart_and_inside_their_range() {
        for vcpus in [1, 32, 255] {
            let (rsdp, tables) = tables(vcpus);
            assert_eq!(sum(&rsdp), 0);
            assert_eq!(&rsdp[..8], b"RSD PTR ");
            let mut end = ACPI.start + rsdp.len() as u64;
            for (gpa, table) in &tables {
                assert!(*gpa >= end);
                end = gpa + table.len() as u64;
                let length = u32::from_le_bytes(table[4..8].try_into().unwrap());
                assert_eq!(length as usize, table.len());
                assert!(&table[..4] == b"FACS" || sum(table) == 0);
            }
            assert!(end <= ACPI.end);
            let (gpa, xsdt) = tables.last().unwrap();
            assert_eq!(rsdp[24..32], gpa.to_le_bytes());
            assert_eq!(xsdt.len(), 36 + 3 * 8);
        }
    }

    #[test]
    fn every_vcpu_has_its_entry() {
        let one = madt(1).len();
        assert_eq!(madt(4).len(), one + 3 * 8);
    }
}
