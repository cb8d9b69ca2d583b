//! Argument specifications: `N@OPERAND`, where `N` is the size in bytes, negative for a signed
//! value, and `OPERAND` is what the assembler would write for it.

use std::collections::HashMap;

use super::elf::Machine;
use super::{aarch64, x86_64};

/// One argument of a site.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Arg {
    /// The specification as the note has it.
    pub text: String,
    /// Size in bytes: 1, 2, 4 or 8.
    pub size: u8,
    /// Whether the value is sign-extended.
    pub signed: bool,
    /// Where the value is.
    pub operand: Operand,
}

/// Where a value is. Registers are byte offsets into the registers that the kernel saves and hands
/// to a uprobe program: `struct pt_regs` on x86-64, `struct user_pt_regs` on arm64.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operand {
    /// It is this.
    Constant(i64),
    /// It is in the register.
    Register {
        /// The register.
        at: u16,
    },
    /// It is in the process's memory, at the register plus the displacement.
    Memory {
        /// The register.
        base: u16,
        /// The displacement.
        displacement: i64,
    },
    /// It is in the process's memory, at the base register (0 without one) plus the index register
    /// shifted left by the scale, plus the displacement.
    Indexed {
        /// The base register.
        base: Option<u16>,
        /// The index register.
        index: u16,
        /// 0 to 4.
        scale: u8,
        /// The displacement.
        displacement: i64,
    },
    /// An eBPF program cannot get at it, for the reason given.
    Unreadable(&'static str),
}

/// What an operand's meaning depends on, besides its text.
pub(super) struct Surroundings<'a> {
    /// The probe's address in the file.
    pub(super) pc: u64,
    /// Whether addresses in the file are those in memory.
    pub(super) fixed: bool,
    /// The symbols' addresses in the file.
    pub(super) symbols: &'a HashMap<String, u64>,
}

impl Surroundings<'_> {
    /// The operand at an address of the file, given as the distance from the probe: that holds
    /// wherever the file was loaded, and the saved program counter (`pc`) is the probe's address.
    pub(super) fn memory_at(&self, address: u64, pc: u16) -> Operand {
        Operand::Memory {
            base: pc,
            displacement: address.wrapping_sub(self.pc) as i64,
        }
    }

    /// The address of an expression.
    pub(super) fn address(&self, expression: Expression<'_>) -> Result<u64, &'static str> {
        let symbol = match expression.symbol {
            None => 0,
            Some(name) if name.contains('@') => return Err("its symbol is relocated (GOT or TLS)"),
            Some(name) => *self
                .symbols
                .get(name)
                .ok_or("its symbol is not in the symbol table")?,
        };
        Ok(symbol.wrapping_add(expression.addend as u64))
    }

    /// An expression whose value is the same in memory: a number, or a symbol of a file that is
    /// not moved when it is loaded.
    pub(super) fn absolute(&self, expression: Expression<'_>) -> Result<i64, &'static str> {
        if expression.symbol.is_some() && !self.fixed {
            return Err("it is an address that is known only when the file is loaded");
        }
        Ok(self.address(expression)? as i64)
    }
}

/// The sum of at most one symbol and any numbers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Expression<'a> {
    pub(super) symbol: Option<&'a str>,
    pub(super) addend: i64,
}

impl<'a> Expression<'a> {
    /// Parses `8`, `-0x10`, `table`, `table+8-4`, `8+table`.
    pub(super) fn parse(text: &'a str) -> Option<Self> {
        let mut sum = Self::default();
        let mut rest = Some(text).filter(|text| !text.is_empty())?;
        while !rest.is_empty() {
            let (negative, term) = match rest.strip_prefix('-') {
                Some(term) => (true, term),
                None => (false, rest.strip_prefix('+').unwrap_or(rest)),
            };
            let end = term.find(['+', '-']).unwrap_or(term.len());
            let (term, after) = term.split_at_checked(end)?;
            rest = after;
            if let Some(value) = number(term) {
                let value = if negative {
                    value.wrapping_neg()
                } else {
                    value
                };
                sum.addend = sum.addend.wrapping_add(value);
            } else if is_symbol(term) && !negative && sum.symbol.is_none() {
                sum.symbol = Some(term);
            } else {
                return None;
            }
        }
        Some(sum)
    }
}

/// The arguments of a site.
pub(super) fn parse_args(machine: Machine, text: &str, around: &Surroundings<'_>) -> Vec<Arg> {
    let operand = match machine {
        Machine::X86_64 => x86_64::operand,
        Machine::Aarch64 => aarch64::operand,
    };
    let args = split(text).map(|text| {
        let (width, place) = width(text);
        let operand = match width.size {
            1 | 2 | 4 | 8 => operand(place, around).unwrap_or_else(Operand::Unreadable),
            _ => Operand::Unreadable("its size is not 1, 2, 4 or 8 bytes"),
        };
        Arg {
            text: text.to_string(),
            size: width.size,
            signed: width.signed,
            operand,
        }
    });
    args.collect()
}

/// The symbols that the arguments name.
pub(super) fn symbols_in(machine: Machine, text: &str) -> impl Iterator<Item = &str> {
    let expression = match machine {
        Machine::X86_64 => x86_64::expression,
        Machine::Aarch64 => aarch64::expression,
    };
    split(text).filter_map(move |text| Expression::parse(expression(width(text).1)?)?.symbol)
}

struct Width {
    size: u8,
    signed: bool,
}

/// Splits `-4@%eax` at its `@`. What has no size (`sys/sdt.h` before version 3) is a whole word.
/// The `f` of a floating-point size says nothing about the place of its bits.
fn width(text: &str) -> (Width, &str) {
    let whole = (
        Width {
            size: 8,
            signed: false,
        },
        text,
    );
    let Some((width, place)) = text.split_once('@') else {
        return whole;
    };
    let (signed, size) = match width.strip_prefix('-') {
        Some(size) => (true, size),
        None => (false, width),
    };
    match size.strip_suffix('f').unwrap_or(size).parse() {
        Ok(size) => (Width { size, signed }, place),
        Err(_) => whole,
    }
}

/// Splits at the blanks outside brackets: arm64's operands have blanks in them.
fn split(text: &str) -> impl Iterator<Item = &str> {
    let mut depth = 0_u32;
    text.split(move |c| {
        match c {
            '[' | '(' => depth += 1,
            ']' | ')' => depth = depth.saturating_sub(1),
            _ => {}
        }
        c == ' ' && depth == 0
    })
    .filter(|arg| !arg.is_empty())
}

/// A decimal or hexadecimal number of 64 bits, signed or not.
fn number(text: &str) -> Option<i64> {
    match text.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16).ok(),
        None if text.starts_with(|c: char| c.is_ascii_digit()) => text.parse::<u64>().ok(),
        None => None,
    }
    .map(|value| value as i64)
}

fn is_symbol(text: &str) -> bool {
    let inside = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '$' | '@');
    !text.starts_with(|c: char| c.is_ascii_digit()) && !text.is_empty() && text.chars().all(inside)
}
