//! Folded stacks, one a line with its own time in ns, and the flame graph that inferno draws of
//! them. Only the downtime counts, so that a frame's width is its share of it; a migration without
//! one counts whole.

use std::collections::BTreeMap;
use std::io::{self, Write};

use inferno::flamegraph::{self, Options};

use super::stacks::{self, Frame};
use crate::analysis::Migration;

/// Writes the stacks of all `migrations` together.
///
/// # Errors
/// What `out` returns.
pub fn write(out: &mut impl Write, migrations: &[Migration<'_>]) -> io::Result<()> {
    for line in lines(migrations) {
        writeln!(out, "{line}")?;
    }
    Ok(())
}

/// Draws them, as SVG.
///
/// # Errors
/// What `out` returns, or why there is nothing to draw.
pub fn flamegraph(out: &mut impl Write, migrations: &[Migration<'_>]) -> io::Result<()> {
    let mut options = Options::default();
    "Where the blackout went".clone_into(&mut options.title);
    "ns".clone_into(&mut options.count_name);
    "Span:".clone_into(&mut options.name_type);
    options.min_width = 0.01;
    let lines = lines(migrations);
    if lines.is_empty() {
        let why = "no migration in the recording spent time in a span";
        return Err(io::Error::new(io::ErrorKind::InvalidData, why));
    }
    flamegraph::from_lines(&mut options, lines.iter().map(String::as_str), out)
        .map_err(io::Error::other)
}

fn lines(migrations: &[Migration<'_>]) -> Vec<String> {
    let mut own: BTreeMap<String, u64> = BTreeMap::new();
    for migration in migrations {
        let bounds = migration.downtime.bounds;
        let range = bounds.map_or((0, migration.end_ns), |bounds| {
            (bounds.start_ns, bounds.end_ns)
        });
        for (thread, frames) in stacks::threads(migration, range) {
            add(&mut own, &thread, &frames);
        }
    }
    own.into_iter()
        .filter(|(_, ns)| *ns > 0)
        .map(|(stack, ns)| format!("{stack} {ns}"))
        .collect()
}

/// Adds each frame's own time: what no frame inside of it takes.
fn add(own: &mut BTreeMap<String, u64>, thread: &str, frames: &[Frame]) {
    let mut times: Vec<u64> = frames.iter().map(length).collect();
    let mut around: Vec<usize> = Vec::new();
    for (index, frame) in frames.iter().enumerate() {
        around.truncate(frame.depth);
        if let Some(time) = around.last().and_then(|parent| times.get_mut(*parent)) {
            *time = time.saturating_sub(length(frame));
        }
        around.push(index);
    }
    let mut path: Vec<String> = vec![word(thread)];
    for (frame, time) in frames.iter().zip(times) {
        path.truncate(frame.depth + 1);
        path.push(word(&frame.name));
        let ns = own.entry(path.join(";")).or_default();
        *ns = ns.saturating_add(time);
    }
}

fn length(frame: &Frame) -> u64 {
    u64::try_from(frame.end_ns.saturating_sub(frame.start_ns)).unwrap_or(0)
}

/// A name that does not end its frame.
fn word(name: &str) -> String {
    name.replace(';', ",")
}
