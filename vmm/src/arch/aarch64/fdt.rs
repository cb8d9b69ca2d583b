//! The device tree of the board, for guests that boot as an arm64 `Image`.

use blackout_abi::guest::AARCH64_RAM_BASE;
use vm_fdt::FdtWriter;

use super::Error;
use super::layout::{GICD, GICD_SIZE, GICR, GICR_STRIDE, ITS, ITS_SIZE, SERIAL};
use crate::arch::BootParams;

/// Handles by which nodes name each other.
const GIC: u32 = 1;

/// Kinds and triggers of interrupts (`bindings/interrupt-controller/arm,gic-v3.yaml`).
const SPI: u32 = 0;
const PPI: u32 = 1;
const EDGE: u32 = 1;
const LEVEL: u32 = 4;

/// The tree of a machine with `ram_size` bytes of RAM, flattened.
pub(super) fn build(ram_size: u64, boot: &BootParams<'_>) -> Result<Vec<u8>, Error> {
    let mut fdt = FdtWriter::new()?;
    let root = fdt.begin_node("")?;
    fdt.property_string("compatible", "linux,dummy-virt")?;
    fdt.property_u32("#address-cells", 2)?;
    fdt.property_u32("#size-cells", 2)?;
    fdt.property_u32("interrupt-parent", GIC)?;
    chosen(&mut fdt, boot.cmdline)?;
    memory(&mut fdt, ram_size)?;
    cpus(&mut fdt, boot.vcpus)?;
    gic(&mut fdt, boot.vcpus)?;
    timer(&mut fdt)?;
    serial(&mut fdt)?;
    fdt.end_node(root)?;
    Ok(fdt.finish()?)
}

fn chosen(fdt: &mut FdtWriter, cmdline: &str) -> Result<(), Error> {
    let node = fdt.begin_node("chosen")?;
    fdt.property_string("bootargs", cmdline)?;
    fdt.property_string("stdout-path", &serial_path())?;
    Ok(fdt.end_node(node)?)
}

fn memory(fdt: &mut FdtWriter, ram_size: u64) -> Result<(), Error> {
    let node = fdt.begin_node(&format!("memory@{AARCH64_RAM_BASE:x}"))?;
    fdt.property_string("device_type", "memory")?;
    fdt.property_array_u64("reg", &[AARCH64_RAM_BASE, ram_size])?;
    Ok(fdt.end_node(node)?)
}

fn cpus(fdt: &mut FdtWriter, vcpus: u32) -> Result<(), Error> {
    let node = fdt.begin_node("cpus")?;
    fdt.property_u32("#address-cells", 1)?;
    fdt.property_u32("#size-cells", 0)?;
    for index in 0..vcpus {
        // KVM makes affinities from indices: 16 vCPUs in Aff0, the rest of the index above.
        let affinity = index & 0xf | (index >> 4) << 8;
        let cpu = fdt.begin_node(&format!("cpu@{affinity:x}"))?;
        fdt.property_string("device_type", "cpu")?;
        fdt.property_string("compatible", "arm,armv8")?;
        fdt.property_string("enable-method", "psci")?;
        fdt.property_u32("reg", affinity)?;
        fdt.end_node(cpu)?;
    }
    fdt.end_node(node)?;
    let node = fdt.begin_node("psci")?;
    fdt.property_string_list(
        "compatible",
        ["arm,psci-1.0", "arm,psci-0.2"].map(String::from).to_vec(),
    )?;
    fdt.property_string("method", "hvc")?;
    Ok(fdt.end_node(node)?)
}

fn gic(fdt: &mut FdtWriter, vcpus: u32) -> Result<(), Error> {
    let node = fdt.begin_node(&format!("interrupt-controller@{GICD:x}"))?;
    fdt.property_string("compatible", "arm,gic-v3")?;
    fdt.property_u32("#interrupt-cells", 3)?;
    fdt.property_null("interrupt-controller")?;
    let redistributors = u64::from(vcpus) * GICR_STRIDE;
    fdt.property_array_u64("reg", &[GICD, GICD_SIZE, GICR, redistributors])?;
    fdt.property_u32("#address-cells", 2)?;
    fdt.property_u32("#size-cells", 2)?;
    fdt.property_null("ranges")?;
    fdt.property_phandle(GIC)?;
    let its = fdt.begin_node(&format!("msi-controller@{ITS:x}"))?;
    fdt.property_string("compatible", "arm,gic-v3-its")?;
    fdt.property_null("msi-controller")?;
    fdt.property_u32("#msi-cells", 1)?;
    fdt.property_array_u64("reg", &[ITS, ITS_SIZE])?;
    fdt.end_node(its)?;
    Ok(fdt.end_node(node)?)
}

/// The four timers' private interrupts: secure, non-secure, virtual, hypervisor.
fn timer(fdt: &mut FdtWriter) -> Result<(), Error> {
    let node = fdt.begin_node("timer")?;
    fdt.property_string("compatible", "arm,armv8-timer")?;
    let interrupts = [13, 14, 11, 10].map(|irq| [PPI, irq, LEVEL]);
    fdt.property_array_u32("interrupts", interrupts.as_flattened())?;
    fdt.property_null("always-on")?;
    Ok(fdt.end_node(node)?)
}

fn serial(fdt: &mut FdtWriter) -> Result<(), Error> {
    let node = fdt.begin_node(serial_path().trim_start_matches('/'))?;
    fdt.property_string("compatible", "ns16550a")?;
    fdt.property_array_u64("reg", &[SERIAL.base, SERIAL.size])?;
    fdt.property_u32("clock-frequency", 1_843_200)?;
    fdt.property_array_u32("interrupts", &[SPI, SERIAL.gsi, EDGE])?;
    Ok(fdt.end_node(node)?)
}

fn serial_path() -> String {
    format!("/serial@{:x}", SERIAL.base)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tree_is_well_formed_for_any_number_of_vcpus() {
        for vcpus in [1, 17, 32] {
            let boot = BootParams {
                vcpus,
                cmdline: "console=ttyS0",
            };
            let tree = build(128 << 20, &boot).unwrap();
            assert_eq!(tree[..4], 0xd00d_feed_u32.to_be_bytes());
            assert_eq!(tree[4..8], u32::try_from(tree.len()).unwrap().to_be_bytes());
            let count = tree.windows(4).filter(|at| at == b"psci").count();
            assert!(count > vcpus as usize);
        }
    }
}
