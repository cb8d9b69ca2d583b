//! The bpftrace scripts under `ebpf/scripts/`, generated from the probe table: a probe or argument
//! that the table does not have can't stand in one.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result};
use blackout_abi::probes::{ArgKind, PROBES, Probe, SPANS, Span};

use super::Finding;
use crate::paths;

/// Reports each script that differs from what the table gives.
pub(super) fn check() -> Vec<Finding> {
    let finding = |name: &str, message: String| Finding {
        path: format!("ebpf/scripts/{name}"),
        line: 1,
        message,
    };
    let scripts = match scripts() {
        Ok(scripts) => scripts,
        Err(error) => return vec![finding("", error.to_string())],
    };
    let outdated = scripts
        .into_iter()
        .filter(|(name, text)| fs::read_to_string(folder().join(name)).ok().as_ref() != Some(text));
    let message = "out of date: run `cargo xtask tidy --write`";
    outdated
        .map(|(name, _)| finding(name, message.to_owned()))
        .collect()
}

/// Writes the scripts.
pub(super) fn write() -> Result<()> {
    fs::create_dir_all(folder()).context("cannot create ebpf/scripts")?;
    for (name, text) in scripts()? {
        fs::write(folder().join(name), text).with_context(|| format!("cannot write {name}"))?;
    }
    Ok(())
}

fn folder() -> PathBuf {
    paths::workspace().join("ebpf/scripts")
}

fn scripts() -> Result<[(&'static str, String); 4]> {
    Ok([
        ("downtime.bt", downtime()?),
        ("handlers.bt", handlers()?),
        ("its.bt", its()?),
        ("pause.bt", pause()?),
    ])
}

fn head(name: &str, what: &str) -> String {
    format!(
        "#!/usr/bin/env bpftrace\n\
         // {what}\n//\n\
         //   bpftrace -p PID ebpf/scripts/{name} /path/to/blackout-vmm\n//\n\
         // Written by `cargo xtask tidy --write` from the probe table.\n\n"
    )
}

/// Every span as it ends, with its depth: the children of a span stand above it.
///
/// Each probe is attached once: bpftrace before 0.18 mixes up the programs of one probe's two actions.
fn downtime() -> Result<String> {
    let mut text = head(
        "downtime.bt",
        "What a migration does, span by span, and how long each takes.",
    );
    text += "BEGIN { printf(\"depth      took us  span\\n\"); }\n\n";
    let is_named = |span: &&Span| {
        let first = span.begin.first();
        first.is_some_and(|arg| matches!(arg.kind, ArgKind::Str) && arg.name == "name")
    };
    let begin = |spans: Vec<&Span>, more: &str| {
        let begins = spans
            .iter()
            .map(|span| attach(&format!("{}_begin", span.name)));
        let begins = begins.collect::<Result<Vec<_>>>()?.join(",\n");
        anyhow::Ok(format!(
            "{begins}\n{{\n  @depth[tid]++;\n  @from[tid, @depth[tid]] = nsecs;\n{more}}}\n\n"
        ))
    };
    let (named, unnamed): (Vec<_>, Vec<_>) = SPANS.iter().partition(is_named);
    // What tells spans of one name apart has to be kept from begin to end.
    text += &begin(named, "  @name[tid, @depth[tid]] = str(arg0);\n")?;
    text += &begin(unnamed, "")?;
    for span in SPANS {
        let end = attach(&format!("{}_end", span.name))?;
        let (format, value) = match is_named(&span) {
            true => (" %s", ", @name[tid, @depth[tid]]"),
            false => ("", ""),
        };
        text += &format!(
            "{end} /@depth[tid] > 0/ {{\n  \
             printf(\"%5d %12d  {}{format}\\n\", @depth[tid], (nsecs - @from[tid, @depth[tid]]) / 1000{value});\n  \
             delete(@from[tid, @depth[tid]]);\n  @depth[tid]--;\n}}\n",
            span.name
        );
    }
    text += "\nEND { clear(@depth); clear(@from); clear(@name); }\n";
    Ok(text)
}

fn handlers() -> Result<String> {
    let (begin, end) = ("vm_state_handler_begin", "vm_state_handler_end");
    Ok(format!(
        "{head}{at_begin} {{\n  @name[tid] = {name};\n  @phase[tid] = {phase};\n  @from[tid] = nsecs;\n}}\n\n\
         {at_end} /@from[tid]/ {{\n  \
         @us[@name[tid], @phase[tid]] = hist((nsecs - @from[tid]) / 1000);\n  delete(@from[tid]);\n}}\n\n\
         END {{ clear(@name); clear(@phase); clear(@from); }}\n",
        head = head(
            "handlers.bt",
            "Each state handler's time, as a histogram in us."
        ),
        at_begin = attach(begin)?,
        name = argument(begin, "name")?,
        phase = argument(begin, "phase")?,
        at_end = attach(end)?,
    ))
}

fn its() -> Result<String> {
    let (begin, end, mapped) = ("its_save_tables_begin", "its_save_tables_end", "its_mapped");
    Ok(format!(
        "{head}BEGIN {{ printf(\"  its  devices   events      save us\\n\"); }}\n\n\
         {at_begin} {{\n  @its[tid] = {its};\n  @from[tid] = nsecs;\n}}\n\n\
         {at_end} /@from[tid]/ {{\n  @took[pid, @its[tid]] = nsecs - @from[tid];\n  delete(@from[tid]);\n}}\n\n\
         {at_mapped} /@took[pid, {which}]/ {{\n  \
         printf(\"%5d %8d %8d %12d\\n\", {which}, {devices}, {events}, @took[pid, {which}] / 1000);\n  \
         delete(@took[pid, {which}]);\n}}\n\n\
         END {{ clear(@its); clear(@from); clear(@took); }}\n",
        head = head(
            "its.bt",
            "What a save of the ITS's tables takes, over what the ITS maps (arm64)."
        ),
        at_begin = attach(begin)?,
        its = argument(begin, "its")?,
        at_end = attach(end)?,
        at_mapped = attach(mapped)?,
        which = argument(mapped, "its")?,
        devices = argument(mapped, "devices")?,
        events = argument(mapped, "events")?,
    ))
}

fn pause() -> Result<String> {
    let (all, kicked, paused) = ("pause_all_vcpus_begin", "vcpu_kicked", "vcpu_paused");
    Ok(format!(
        "{head}BEGIN {{ printf(\" vcpu  after kick us  after all us\\n\"); }}\n\n\
         {at_all} {{ @all[pid] = nsecs; }}\n\n\
         {at_kicked} {{ @kick[pid, {kick}] = nsecs; }}\n\n\
         {at_paused} /@kick[pid, {pause}]/ {{\n  \
         printf(\"%5d %14d %13d\\n\", {pause}, (nsecs - @kick[pid, {pause}]) / 1000, (nsecs - @all[pid]) / 1000);\n  \
         @us = hist((nsecs - @kick[pid, {pause}]) / 1000);\n  delete(@kick[pid, {pause}]);\n}}\n\n\
         END {{ clear(@all); clear(@kick); }}\n",
        head = head(
            "pause.bt",
            "How long after its kick each vCPU was paused, and how far the last lags."
        ),
        at_all = attach(all)?,
        at_kicked = attach(kicked)?,
        kick = argument(kicked, "i")?,
        at_paused = attach(paused)?,
        pause = argument(paused, "i")?,
    ))
}

/// Where a probe is attached; the program's path is the script's argument.
fn attach(name: &str) -> Result<String> {
    Ok(format!("usdt:$1:vmm:{}", probe(name)?.name))
}

/// How a script reads a probe's argument.
fn argument(name: &str, argument: &str) -> Result<String> {
    let probe = probe(name)?;
    let place = probe.args.iter().position(|arg| arg.name == argument);
    let place = place.with_context(|| format!("{name} has no argument {argument}"))?;
    let kind = probe.args.get(place).map(|arg| arg.kind);
    Ok(match kind {
        Some(ArgKind::Str) => format!("str(arg{place})"),
        _ => format!("arg{place}"),
    })
}

fn probe(name: &str) -> Result<&'static Probe> {
    let found = PROBES.iter().find(|probe| probe.name == name);
    found.with_context(|| format!("the table has no probe {name}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_span_is_in_the_tree() {
        let text = downtime().unwrap();
        for span in SPANS {
            assert!(
                text.contains(&format!("vmm:{}_end ", span.name)),
                "{}",
                span.name
            );
        }
    }

    #[test]
    fn what_the_table_lacks_is_refused() {
        assert!(attach("no_such_probe").is_err());
        assert!(argument("its_mapped", "no such argument").is_err());
        assert_eq!(
            argument("vm_state_handler_begin", "name").unwrap(),
            "str(arg0)"
        );
    }
}
