//! The VMM's modules import one way only, downwards.

use super::{Finding, Source};

/// The modules, each of which may import those after it. `vmm/ARCHITECTURE.md` has the same order
/// and says what each is for.
const ORDER: [&str; 22] = [
    "main",
    "console",
    "logging",
    "signals",
    "args",
    "qmp",
    "migration",
    "control",
    "check",
    "machine",
    "vcpu",
    "arch",
    "payload",
    "devices",
    "memory",
    "kvm",
    "runstate",
    "probes",
    "costs",
    "spanlog",
    "socket",
    "lib",
];

/// Reports imports against the order in a file of the VMM; tests may import what they like.
pub(super) fn check(source: &Source, findings: &mut Vec<Finding>) {
    let Some(path) = source.path.strip_prefix("vmm/src/") else {
        return;
    };
    let module = path.split(['/', '.']).next().unwrap_or_default();
    if path.ends_with("tests.rs") || module == "lib" {
        return;
    }
    let Some(own) = place(module) else {
        findings.push(source.finding(1, format!("{module} has no place in the order of imports")));
        return;
    };
    let code = source.text.split("#[cfg(test)]").next().unwrap_or_default();
    for (line, imported) in imported_modules(code) {
        if place(imported).is_some_and(|other| other < own) {
            let message = format!("{module} is below {imported} and must not import it");
            findings.push(source.finding(line, message));
        }
    }
}

fn place(module: &str) -> Option<usize> {
    ORDER.iter().position(|name| *name == module)
}

/// The names that follow `crate::` outside comments, with the number of their line.
fn imported_modules(code: &str) -> Vec<(usize, &str)> {
    let mut modules = Vec::new();
    // Depth of braces inside a `crate::{…}` list; 0 outside of one.
    let mut depth = 0usize;
    for (index, line) in code.lines().enumerate() {
        let line = line.split("//").next().unwrap_or_default();
        let mut rest = line;
        if depth == 0 {
            while let Some((_, after)) = rest.split_once("crate::") {
                rest = after;
                if after.starts_with('{') {
                    break;
                }
                modules.push((index + 1, identifier(after)));
            }
            if !rest.starts_with('{') {
                continue;
            }
        }
        for (place, character) in rest.char_indices() {
            match character {
                '{' => depth += 1,
                '}' => depth = depth.saturating_sub(1),
                _ => {}
            }
            let before = rest[..place].chars().next_back();
            let starts = character.is_alphabetic() && !before.is_some_and(is_identifier);
            if depth == 1 && starts && before != Some(':') {
                modules.push((index + 1, identifier(&rest[place..])));
            }
            if depth == 0 && place > 0 {
                break;
            }
        }
    }
    modules
}

fn identifier(text: &str) -> &str {
    text.split(|character| !is_identifier(character))
        .next()
        .unwrap_or_default()
}

fn is_identifier(character: char) -> bool {
    character.is_alphanumeric() || character == '_'
}

#[cfg(test)]
mod tests {
    use super::*;

    fn findings(path: &str, text: &str) -> Vec<String> {
        let mut findings = Vec::new();
        check(
            &Source {
                path: path.to_owned(),
                text: text.to_owned(),
            },
            &mut findings,
        );
        findings.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn modules_are_found_alone_and_in_lists() {
        let code = "use crate::kvm::{Vm, Vcpu};\n// crate::qmp\n\
                    use crate::{\n    devices::{bus, serial},\n    memory,\n};\n\
                    fn f(x: crate::arch::A, y: crate::probes::B) {}\n";
        let modules: Vec<_> = imported_modules(code);
        assert_eq!(
            modules,
            [
                (1, "kvm"),
                (4, "devices"),
                (5, "memory"),
                (7, "arch"),
                (7, "probes")
            ]
        );
    }

    #[test]
    fn imports_against_the_order_are_reported() {
        let found = findings(
            "vmm/src/kvm/vm.rs",
            "use crate::probes;\nuse crate::{machine, kvm};\n",
        );
        assert_eq!(
            found,
            ["vmm/src/kvm/vm.rs:2: kvm is below machine and must not import it"]
        );
    }

    #[test]
    fn tests_import_what_they_like() {
        let text = "#[cfg(test)]\nmod tests {\n    use crate::qmp;\n}\n";
        assert!(findings("vmm/src/kvm/vm.rs", text).is_empty());
        assert!(findings("vmm/src/kvm/tests.rs", "use crate::qmp;").is_empty());
    }

    #[test]
    fn a_module_without_a_place_is_reported() {
        assert_eq!(findings("vmm/src/helpers.rs", "").len(), 1);
    }
}
