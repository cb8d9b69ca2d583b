//! Operands of x86-64, in the AT&T syntax: `$9`, `%eax`, `-16(%rbp)`, `(%rax,%rbx,8)`,
//! `counter+4(%rip)`.

use super::operand::{Expression, Operand, Surroundings};

/// Offset of `ip` in `struct pt_regs` (`arch/x86/include/asm/ptrace.h`).
const IP: u16 = 128;

/// Each register by its four names, and its offset in `struct pt_regs`.
const REGISTERS: [([&str; 4], u16); 16] = [
    (["rax", "eax", "ax", "al"], 80),
    (["rbx", "ebx", "bx", "bl"], 40),
    (["rcx", "ecx", "cx", "cl"], 88),
    (["rdx", "edx", "dx", "dl"], 96),
    (["rsi", "esi", "si", "sil"], 104),
    (["rdi", "edi", "di", "dil"], 112),
    (["rbp", "ebp", "bp", "bpl"], 32),
    (["rsp", "esp", "sp", "spl"], 152),
    (["r8", "r8d", "r8w", "r8b"], 72),
    (["r9", "r9d", "r9w", "r9b"], 64),
    (["r10", "r10d", "r10w", "r10b"], 56),
    (["r11", "r11d", "r11w", "r11b"], 48),
    (["r12", "r12d", "r12w", "r12b"], 24),
    (["r13", "r13d", "r13w", "r13b"], 16),
    (["r14", "r14d", "r14w", "r14b"], 8),
    (["r15", "r15d", "r15w", "r15b"], 0),
];

/// The second bytes of the first four registers.
const HIGH_BYTES: [(&str, u16); 4] = [("ah", 81), ("bh", 41), ("ch", 89), ("dh", 97)];

/// Parses an operand.
///
/// # Errors
/// Why it cannot be read.
pub(super) fn operand(text: &str, around: &Surroundings<'_>) -> Result<Operand, &'static str> {
    const UNKNOWN: &str = "its operand is of an unknown form";
    if let Some(constant) = text.strip_prefix('$') {
        let constant = Expression::parse(constant).ok_or(UNKNOWN)?;
        return around.absolute(constant).map(Operand::Constant);
    }
    if text.contains(':') {
        return Err("it is in a segment (thread-local)");
    }
    if let Some(name) = text.strip_prefix('%') {
        let at = register(name).ok_or("its register is not one that the kernel saves")?;
        return Ok(Operand::Register { at });
    }
    let Some((displacement, registers)) = text.split_once('(') else {
        let address = Expression::parse(text).ok_or(UNKNOWN)?;
        if address.symbol.is_none() && !around.fixed {
            return Err(UNKNOWN);
        }
        return around
            .address(address)
            .map(|address| around.memory_at(address, IP));
    };
    let displacement = match displacement {
        "" => Expression::default(),
        displacement => Expression::parse(displacement).ok_or(UNKNOWN)?,
    };
    let registers = registers.strip_suffix(')').ok_or(UNKNOWN)?;
    let mut parts = registers.split(',').map(str::trim);
    let (base, index, scale) = (parts.next(), parts.next(), parts.next());
    if parts.next().is_some() {
        return Err(UNKNOWN);
    }
    let base = base.unwrap_or_default();
    let Some(index) = index else {
        return match base {
            // A bare number would count from the next instruction, of which a probe has none.
            "%rip" if displacement.symbol.is_none() => Err(UNKNOWN),
            "%rip" => around
                .address(displacement)
                .map(|address| around.memory_at(address, IP)),
            base => Ok(Operand::Memory {
                base: address_register(base)?,
                displacement: around.absolute(displacement)?,
            }),
        };
    };
    let index = address_register(index)?;
    let scale = match scale {
        None | Some("1") => 0,
        Some("2") => 1,
        Some("4") => 2,
        Some("8") => 3,
        Some(_) => return Err(UNKNOWN),
    };
    let base = match base {
        "" => None,
        base => Some(address_register(base)?),
    };
    let displacement = around.absolute(displacement)?;
    Ok(Operand::Indexed {
        base,
        index,
        scale,
        displacement,
    })
}

/// The part of an operand that may name a symbol.
pub(super) fn expression(text: &str) -> Option<&str> {
    match text.strip_prefix('$') {
        Some(constant) => Some(constant),
        None if text.starts_with('%') => None,
        None => text.split('(').next(),
    }
}

fn register(name: &str) -> Option<u16> {
    let high = HIGH_BYTES
        .iter()
        .find(|(high, _)| *high == name)
        .map(|(_, at)| *at);
    high.or_else(|| {
        REGISTERS
            .iter()
            .find(|(names, _)| names.contains(&name))
            .map(|(_, at)| *at)
    })
}

/// A register in an address: whole, since half ones belong to the x32 ABI.
fn address_register(text: &str) -> Result<u16, &'static str> {
    let name = text.strip_prefix('%').unwrap_or_default();
    REGISTERS
        .iter()
        .find(|([whole, ..], _)| *whole == name)
        .map(|(_, at)| *at)
        .ok_or("its address is not in a 64-bit general register")
}
