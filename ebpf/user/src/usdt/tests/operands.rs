//! Every kind of operand on both architectures.

use std::collections::HashMap;

use super::super::elf::Machine::{self, Aarch64, X86_64};
use super::super::operand::{Surroundings, parse_args};
use super::super::{Arg, Operand};

const PC: u64 = 0x4000;

/// Operands of one argument each, in a file that is moved when it is loaded.
fn operand(machine: Machine, text: &str) -> Operand {
    only(machine, text, false).operand
}

fn only(machine: Machine, text: &str, fixed: bool) -> Arg {
    let mut args = args(machine, text, fixed);
    assert_eq!(args.len(), 1, "{text} is one argument");
    args.remove(0)
}

fn args(machine: Machine, text: &str, fixed: bool) -> Vec<Arg> {
    let symbols = HashMap::from([
        ("counter".to_string(), 0x7010),
        (".Ltable.0".to_string(), 0x9128),
    ]);
    let args = parse_args(
        machine,
        text,
        &Surroundings {
            pc: PC,
            fixed,
            symbols: &symbols,
        },
    );
    assert_eq!(
        args.iter()
            .map(|arg| arg.text.as_str())
            .collect::<Vec<_>>()
            .join(" "),
        text
    );
    args
}

fn register(at: u16) -> Operand {
    Operand::Register { at }
}

fn memory(base: u16, displacement: i64) -> Operand {
    Operand::Memory { base, displacement }
}

fn indexed(base: Option<u16>, index: u16, scale: u8, displacement: i64) -> Operand {
    Operand::Indexed {
        base,
        index,
        scale,
        displacement,
    }
}

#[test]
fn operands_of_x86_64() {
    let table = [
        ("-4@$9", Operand::Constant(9)),
        ("-4@$-1", Operand::Constant(-1)),
        ("8@$0x1f", Operand::Constant(31)),
        ("8@$18446744073709551615", Operand::Constant(-1)),
        ("8@%rax", register(80)),
        ("-4@%edi", register(112)),
        ("2@%r9w", register(64)),
        ("1@%sil", register(104)),
        ("1@%r15b", register(0)),
        ("1@%dh", register(97)),
        ("8@%rsp", register(152)),
        ("4f@%eax", register(80)),
        ("-4@-16(%rbp)", memory(32, -16)),
        ("8@(%rsp)", memory(152, 0)),
        ("8@0x10(%r12)", memory(24, 16)),
        ("-1@-96(%rbp,%rax,8)", indexed(Some(32), 80, 3, -96)),
        ("4@(%rax,%rbx)", indexed(Some(80), 40, 0, 0)),
        ("4@8(,%rcx,4)", indexed(None, 88, 2, 8)),
        ("-1@counter(%rip)", memory(128, 0x3010)),
        ("4@counter+4(%rip)", memory(128, 0x3014)),
        ("4@8+counter(%rip)", memory(128, 0x3018)),
        ("4@counter", memory(128, 0x3010)),
        ("8@.Ltable.0-8(%rip)", memory(128, 0x5120)),
    ];
    for (text, expected) in table {
        assert_eq!(operand(X86_64, text), expected, "{text}");
    }
}

#[test]
fn operands_of_arm64() {
    let table = [
        ("4@5", Operand::Constant(5)),
        ("-4@-1", Operand::Constant(-1)),
        ("8@#0x20", Operand::Constant(32)),
        ("-8@x4", register(32)),
        ("8@x0", register(0)),
        ("-4@w0", register(0)),
        ("8@x30", register(240)),
        ("8@lr", register(240)),
        ("8@fp", register(232)),
        ("8@sp", register(248)),
        ("4@wzr", Operand::Constant(0)),
        ("8@xzr", Operand::Constant(0)),
        ("-4@[sp]", memory(248, 0)),
        ("-4@[sp, 96]", memory(248, 96)),
        ("-4@[sp,#96]", memory(248, 96)),
        ("8@[x29, -24]", memory(232, -24)),
        ("8@[x0, x1]", indexed(Some(0), 8, 0, 0)),
        ("8@[x0, x1, lsl 3]", indexed(Some(0), 8, 3, 0)),
        ("4@[x0, x1, lsl #2]", indexed(Some(0), 8, 2, 0)),
        ("4@[x2, #:lo12:counter]", memory(16, 0x10)),
        ("4@[x2, :lo12:.Ltable.0+4]", memory(16, 0x12c)),
    ];
    for (text, expected) in table {
        assert_eq!(operand(Aarch64, text), expected, "{text}");
    }
}

#[test]
fn operands_that_no_program_can_read() {
    let table = [
        (X86_64, "8@%xmm0"),
        (X86_64, "8@%fs:counter@tpoff"),
        (X86_64, "8@counter@GOTPCREL(%rip)"),
        (X86_64, "8@missing(%rip)"),
        (X86_64, "8@$counter"),
        (X86_64, "4@counter(%rax)"),
        (X86_64, "8@(%eax)"),
        (X86_64, "8@8(%rip)"),
        (X86_64, "8@(%rax,%rbx,3)"),
        (X86_64, "8@(%rax,%rbx,8,1)"),
        (X86_64, "8@(%rax"),
        (X86_64, "8@"),
        (X86_64, "8@$"),
        (X86_64, "16@(%rax)"),
        (X86_64, "0@%rax"),
        (Aarch64, "8@d0"),
        (Aarch64, "8@x31"),
        (Aarch64, "8@x07"),
        (Aarch64, "8@x+7"),
        (Aarch64, "8@[w0]"),
        (Aarch64, "8@[x0, w1, sxtw 2]"),
        (Aarch64, "8@[x0, x1, lsl 9]"),
        (Aarch64, "8@[x0, 8, lsl 1]"),
        (Aarch64, "8@[x0, 1, 2, 3]"),
        (Aarch64, "8@[x0"),
        (Aarch64, "8@[x0, :lo12:missing]"),
        (Aarch64, "8@counter"),
    ];
    for (machine, text) in table {
        let read = operand(machine, text);
        assert!(
            matches!(read, Operand::Unreadable(_)),
            "{machine:?} {text}: {read:?}"
        );
    }
}

#[test]
fn a_file_that_is_not_moved_has_absolute_addresses() {
    let table = [
        ("8@$counter", Operand::Constant(0x7010)),
        ("4@counter(%rax)", memory(80, 0x7010)),
        ("4@counter+4(,%rax,4)", indexed(None, 80, 2, 0x7014)),
        ("4@counter(%rip)", memory(128, 0x3010)),
    ];
    for (text, expected) in table {
        assert_eq!(only(X86_64, text, true).operand, expected, "{text}");
    }
    assert_eq!(
        only(Aarch64, "8@counter", true).operand,
        Operand::Constant(0x7010)
    );
}

#[test]
fn sizes_and_signs() {
    for (text, size, signed) in [
        ("-1@%al", 1, true),
        ("2@%ax", 2, false),
        ("-8@%rax", 8, true),
        ("%rax", 8, false),
    ] {
        let arg = only(X86_64, text, false);
        assert_eq!(
            (arg.size, arg.signed, arg.operand),
            (size, signed, register(80)),
            "{text}"
        );
    }
}

#[test]
fn arguments_are_split_outside_brackets() {
    assert_eq!(
        args(Aarch64, "-4@[sp, 96] 8@x1 4@[x0, x1, lsl 2]", false).len(),
        3
    );
    assert_eq!(
        args(X86_64, "-4@%eax 8@-8(%rbp,%rax,8) 8@$1", false).len(),
        3
    );
    assert_eq!(args(X86_64, "", false), []);
}
