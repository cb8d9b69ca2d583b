//! The README's list of probes, generated from the probe table.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use blackout_abi::probes::{Arg, Edge, PROBES, Probe};

use super::Finding;
use crate::paths;

const BEGIN: &str = "<!-- probes: written by `cargo xtask tidy --write` -->";
const END: &str = "<!-- /probes -->";

/// Reports a list that differs from the table.
pub(super) fn check() -> Option<Finding> {
    let text = fs::read_to_string(file()).unwrap_or_default();
    let message = match replace_list(&text) {
        Ok(new) if new == text => return None,
        Ok(_) => "the list of probes is out of date: run `cargo xtask tidy --write`".to_owned(),
        Err(error) => error.to_string(),
    };
    Some(Finding {
        path: "README.md".to_owned(),
        line: 1,
        message,
    })
}

/// Replaces the list by that of the table.
pub(super) fn write() -> Result<()> {
    let text = fs::read_to_string(file()).context("cannot read README.md")?;
    let new = replace_list(&text)?;
    if new != text {
        fs::write(file(), new).context("cannot write README.md")?;
    }
    Ok(())
}

fn file() -> PathBuf {
    paths::workspace().join("README.md")
}

/// `text` with what stands between the two markers replaced.
fn replace_list(text: &str) -> Result<String> {
    let parts = text
        .split_once(BEGIN)
        .and_then(|(before, rest)| Some((before, rest.split_once(END)?.1)));
    let Some((before, after)) = parts else {
        bail!("the list of probes has to stand between `{BEGIN}` and `{END}`");
    };
    Ok(format!("{before}{BEGIN}\n{}{END}{after}", list()))
}

/// One row a span or point, in the table's order.
fn list() -> String {
    let mut list = String::from("| hop | probes | what |\n|---|---|---|\n");
    for begin in PROBES.iter().filter(|probe| probe.edge != Edge::End) {
        let mut probes = signature(begin);
        let end = PROBES
            .iter()
            .find(|probe| probe.row == begin.row && probe.edge == Edge::End);
        if let Some(end) = end {
            probes += &format!("<br>{}", signature(end));
        }
        let hop = if begin.hop > 7 {
            "after".to_owned()
        } else {
            begin.hop.to_string()
        };
        list += &format!("| {hop} | {probes} | {} |\n", begin.doc);
    }
    list
}

fn signature(probe: &Probe) -> String {
    let arguments: Vec<_> = probe.args.iter().map(|Arg { name, .. }| *name).collect();
    format!("`{}({})`", probe.name, arguments.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_stands_between_the_markers_changes() {
        let text = format!("# Title\n{BEGIN}\nold\n{END}\nrest\n");
        let new = replace_list(&text).unwrap();
        assert!(new.starts_with("# Title\n") && new.ends_with("\nrest\n"));
        assert!(!new.contains("old") && new.contains("`vm_stop_end(rc)`"));
        assert_eq!(replace_list(&new).unwrap(), new);
        assert!(replace_list("# Title\n").is_err());
    }

    #[test]
    fn every_probe_is_listed_once() {
        let list = list();
        for probe in PROBES {
            assert_eq!(
                list.matches(&format!("`{}(", probe.name)).count(),
                1,
                "{}",
                probe.name
            );
        }
    }
}
