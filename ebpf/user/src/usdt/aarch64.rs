//! Operands of arm64: `9`, `x4`, `w0`, `[sp]`, `[sp, 96]`, `[x0, x1, lsl 3]`,
//! `[x0, #:lo12:counter]`.

use super::operand::{Expression, Operand, Surroundings};

/// Offset of `sp` in `struct user_pt_regs` (`arch/arm64/include/uapi/asm/ptrace.h`); the 31
/// general registers come before it.
const SP: u16 = 248;

/// Low bits of an address that `adrp` leaves to the instruction after it.
const PAGE_OFFSET: u64 = 0xfff;

const UNKNOWN: &str = "its operand is of an unknown form";

/// Parses an operand.
///
/// # Errors
/// Why it cannot be read.
pub(super) fn operand(text: &str, around: &Surroundings<'_>) -> Result<Operand, &'static str> {
    if let Some(address) = text.strip_prefix('[') {
        return memory(address.strip_suffix(']').ok_or(UNKNOWN)?, around);
    }
    if matches!(text, "xzr" | "wzr") {
        return Ok(Operand::Constant(0));
    }
    if let Some(at) = register(text) {
        return Ok(Operand::Register { at });
    }
    if is_vector(text) {
        return Err("its register is not one that the kernel saves");
    }
    let constant = Expression::parse(immediate(text)).ok_or(UNKNOWN)?;
    around.absolute(constant).map(Operand::Constant)
}

/// The part of an operand that may name a symbol.
pub(super) fn expression(text: &str) -> Option<&str> {
    match text.strip_prefix('[') {
        None => Some(immediate(text)).filter(|text| register(text).is_none()),
        Some(address) => {
            let (_, offset) = address.strip_suffix(']')?.split_once(',')?;
            immediate(offset.trim()).strip_prefix(":lo12:")
        }
    }
}

/// What stands between the brackets.
fn memory(address: &str, around: &Surroundings<'_>) -> Result<Operand, &'static str> {
    let mut parts = address.split(',').map(str::trim);
    let base = address_register(parts.next().unwrap_or_default())?;
    let (offset, shift) = (parts.next(), parts.next());
    if parts.next().is_some() {
        return Err(UNKNOWN);
    }
    let Some(offset) = offset else {
        return Ok(Operand::Memory {
            base,
            displacement: 0,
        });
    };
    if let Ok(index) = address_register(offset) {
        let scale = match shift {
            None => 0,
            Some(shift) => shift_of(shift).ok_or(UNKNOWN)?,
        };
        return Ok(Operand::Indexed {
            base: Some(base),
            index,
            scale,
            displacement: 0,
        });
    }
    if shift.is_some() {
        return Err(UNKNOWN);
    }
    let offset = immediate(offset);
    let displacement = match offset.strip_prefix(":lo12:") {
        // The base holds the symbol's page. A file is moved by whole pages when it is loaded, so
        // the place inside the page is that of the file.
        Some(symbol) => {
            let symbol = Expression::parse(symbol).ok_or(UNKNOWN)?;
            (around.address(symbol)? & PAGE_OFFSET) as i64
        }
        None => around.absolute(Expression::parse(offset).ok_or(UNKNOWN)?)?,
    };
    Ok(Operand::Memory { base, displacement })
}

/// `lsl 3`, `lsl #3`; an access of 16 bytes shifts by 4, the most there is.
fn shift_of(text: &str) -> Option<u8> {
    let amount = immediate(text.strip_prefix("lsl")?.trim()).parse().ok()?;
    (amount <= 4).then_some(amount)
}

/// The `#` before a number is a matter of the assembler's taste.
fn immediate(text: &str) -> &str {
    text.strip_prefix('#').unwrap_or(text)
}

/// A general register, whole or its lower half, or the stack pointer.
fn register(name: &str) -> Option<u16> {
    match name {
        "sp" | "wsp" => Some(SP),
        "fp" => general("29"),
        "lr" => general("30"),
        name => general(name.strip_prefix(['x', 'w'])?),
    }
}

/// A register in an address: whole.
fn address_register(name: &str) -> Result<u16, &'static str> {
    let whole = !name.starts_with('w');
    register(name)
        .filter(|_| whole)
        .ok_or("its address is not in a 64-bit general register")
}

fn general(number: &str) -> Option<u16> {
    let canonical = number == "0" || !number.starts_with(['0', '+']);
    number
        .parse()
        .ok()
        .filter(|number: &u16| canonical && *number <= 30)
        .map(|number| number * 8)
}

fn is_vector(name: &str) -> bool {
    name.strip_prefix(['v', 'q', 'd', 's', 'h', 'b'])
        .is_some_and(|number| number.parse::<u8>().is_ok_and(|number| number < 32))
}
