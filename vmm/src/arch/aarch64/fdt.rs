//! The device tree of the board, for Linux.

use std::ops::Range;

use blackout_abi::guest::AARCH64_RAM_BASE;
use vm_fdt::FdtWriter;

use super::Error;
use super::layout::{
    DEVICE_SIZE, GICD, GICD_SIZE, GICR, GICR_STRIDE, GPIO, GPIO_SPI, ITS, ITS_SIZE, PCI, RTC,
    RTC_SPI, SERIAL, SERIAL_SPI,
};
use crate::arch::BootParams;
use crate::devices::pl061;

/// Handles by which nodes name each other.
const GIC: u32 = 1;
const CLOCK: u32 = 2;
const GPIO_CONTROLLER: u32 = 3;
const MSI: u32 = 4;

/// Kinds and triggers of interrupts (`bindings/interrupt-controller/arm,gic-v3.yaml`).
const SPI: u32 = 0;
const PPI: u32 = 1;
const LEVEL: u32 = 4;

/// What Linux calls the power button (`input-event-codes.h`).
const KEY_POWER: u32 = 116;

/// The tree of a machine with `ram_size` bytes of RAM, flattened; `initrd` is where the initial RAM
/// disk lies.
pub(super) fn build(
    ram_size: u64,
    boot: &BootParams<'_>,
    initrd: Option<Range<u64>>,
) -> Result<Vec<u8>, Error> {
    let mut fdt = FdtWriter::new()?;
    let root = fdt.begin_node("")?;
    fdt.property_string("compatible", "linux,dummy-virt")?;
    fdt.property_u32("#address-cells", 2)?;
    fdt.property_u32("#size-cells", 2)?;
    fdt.property_u32("interrupt-parent", GIC)?;
    chosen(&mut fdt, boot.cmdline, initrd)?;
    memory(&mut fdt, ram_size)?;
    cpus(&mut fdt, boot.vcpus)?;
    gic(&mut fdt, boot.vcpus)?;
    timer(&mut fdt)?;
    clock(&mut fdt)?;
    serial(&mut fdt)?;
    rtc(&mut fdt)?;
    power_button(&mut fdt)?;
    pci(&mut fdt)?;
    fdt.end_node(root)?;
    Ok(fdt.finish()?)
}

fn chosen(fdt: &mut FdtWriter, cmdline: &str, initrd: Option<Range<u64>>) -> Result<(), Error> {
    let node = fdt.begin_node("chosen")?;
    fdt.property_string("bootargs", cmdline)?;
    fdt.property_string("stdout-path", &format!("/{}", serial_name()))?;
    if let Some(Range { start, end }) = initrd {
        fdt.property_u64("linux,initrd-start", start)?;
        fdt.property_u64("linux,initrd-end", end)?;
    }
    // Without them the kernel waits for entropy, and lies where every other guest's does.
    let mut seed = [0; 40];
    getrandom::fill(&mut seed)?;
    let (kaslr, rng) = seed.split_at(8);
    fdt.property("kaslr-seed", kaslr)?;
    fdt.property("rng-seed", rng)?;
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
    fdt.property_phandle(MSI)?;
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

/// The clock that drives the peripherals: nothing depends on its frequency.
fn clock(fdt: &mut FdtWriter) -> Result<(), Error> {
    let node = fdt.begin_node("apb-pclk")?;
    fdt.property_string("compatible", "fixed-clock")?;
    fdt.property_u32("#clock-cells", 0)?;
    fdt.property_u32("clock-frequency", 24_000_000)?;
    fdt.property_string("clock-output-names", "clk24mhz")?;
    fdt.property_phandle(CLOCK)?;
    Ok(fdt.end_node(node)?)
}

fn serial(fdt: &mut FdtWriter) -> Result<(), Error> {
    let node = fdt.begin_node(&serial_name())?;
    prime_cell(
        fdt,
        "arm,pl011",
        SERIAL,
        SERIAL_SPI,
        &["uartclk", "apb_pclk"],
    )?;
    Ok(fdt.end_node(node)?)
}

fn serial_name() -> String {
    format!("pl011@{SERIAL:x}")
}

fn rtc(fdt: &mut FdtWriter) -> Result<(), Error> {
    let node = fdt.begin_node(&format!("pl031@{RTC:x}"))?;
    prime_cell(fdt, "arm,pl031", RTC, RTC_SPI, &["apb_pclk"])?;
    Ok(fdt.end_node(node)?)
}

fn power_button(fdt: &mut FdtWriter) -> Result<(), Error> {
    let node = fdt.begin_node(&format!("pl061@{GPIO:x}"))?;
    prime_cell(fdt, "arm,pl061", GPIO, GPIO_SPI, &["apb_pclk"])?;
    fdt.property_null("gpio-controller")?;
    fdt.property_u32("#gpio-cells", 2)?;
    fdt.property_phandle(GPIO_CONTROLLER)?;
    fdt.end_node(node)?;
    let keys = fdt.begin_node("gpio-keys")?;
    fdt.property_string("compatible", "gpio-keys")?;
    let key = fdt.begin_node("poweroff")?;
    fdt.property_string("label", "Power")?;
    fdt.property_u32("linux,code", KEY_POWER)?;
    fdt.property_array_u32("gpios", &[GPIO_CONTROLLER, pl061::BUTTON, 0])?;
    fdt.end_node(key)?;
    Ok(fdt.end_node(keys)?)
}

/// What Arm's peripherals have in common: a page of registers with an id, an interrupt, clocks.
fn prime_cell(
    fdt: &mut FdtWriter,
    compatible: &str,
    base: u64,
    spi: u32,
    clocks: &[&str],
) -> Result<(), Error> {
    let strings = |list: &[&str]| list.iter().map(|&s| s.to_owned()).collect();
    fdt.property_string_list("compatible", strings(&[compatible, "arm,primecell"]))?;
    fdt.property_array_u64("reg", &[base, DEVICE_SIZE])?;
    fdt.property_array_u32("interrupts", &[SPI, spi, LEVEL])?;
    fdt.property_array_u32("clocks", &vec![CLOCK; clocks.len()])?;
    Ok(fdt.property_string_list("clock-names", strings(clocks))?)
}

/// The host bridge (`bindings/pci/host-generic-pci.yaml`). A function's requester id is its device
/// id at the ITS.
fn pci(fdt: &mut FdtWriter) -> Result<(), Error> {
    /// First cells of a range: memory below 4 GiB; memory above, prefetchable.
    const MEMORY_32: u32 = 0x0200_0000;
    const MEMORY_64: u32 = 0x4300_0000;
    const REQUESTERS: u32 = 1 << 16;
    let ecam = &PCI.ecam;
    let node = fdt.begin_node(&format!("pcie@{:x}", ecam.start))?;
    fdt.property_string("compatible", "pci-host-ecam-generic")?;
    fdt.property_string("device_type", "pci")?;
    fdt.property_u32("#address-cells", 3)?;
    fdt.property_u32("#size-cells", 2)?;
    fdt.property_array_u64("reg", &[ecam.start, ecam.end - ecam.start])?;
    fdt.property_array_u32("bus-range", &[0, 0])?;
    let windows = [(MEMORY_32, &PCI.mmio32), (MEMORY_64, &PCI.mmio64)];
    let halves = |value: u64| [(value >> 32) as u32, value as u32];
    let ranges = windows.map(|(kind, window)| {
        let [high, low] = halves(window.start);
        let [size_high, size_low] = halves(window.end - window.start);
        [kind, high, low, high, low, size_high, size_low]
    });
    fdt.property_array_u32("ranges", ranges.as_flattened())?;
    fdt.property_array_u32("msi-map", &[0, MSI, 0, REQUESTERS])?;
    fdt.property_null("dma-coherent")?;
    Ok(fdt.end_node(node)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tree_is_well_formed_for_any_number_of_vcpus() {
        for vcpus in [1, 17, 32] {
            let boot = BootParams {
                vcpus,
                cmdline: "console=ttyAMA0",
            };
            let tree = build(128 << 20, &boot, Some(0x4000_0000..0x4000_1000)).unwrap();
            assert_eq!(tree[..4], 0xd00d_feed_u32.to_be_bytes());
            assert_eq!(tree[4..8], u32::try_from(tree.len()).unwrap().to_be_bytes());
            let count = tree.windows(4).filter(|at| at == b"psci").count();
            assert!(count > vcpus as usize);
        }
    }
}
