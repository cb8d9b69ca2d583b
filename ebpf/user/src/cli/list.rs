//! `blackout list`.

use std::io::{self, Write};
use std::path::PathBuf;

use anyhow::bail;
use serde::Serialize;

use super::Outcome;
use crate::capture::sites::{Pattern, arguments};
use crate::recording::{ArgDef, ValueKind};
use crate::usdt::{Arg, Binary, Dangling, Operand, Site};

/// List the USDT probes of a program or process, with their arguments
#[derive(Debug, clap::Args)]
#[command(after_help = super::EXIT_CODES)]
pub(super) struct Args {
    /// The program's file
    #[arg(
        value_name = "FILE",
        required_unless_present = "pid",
        conflicts_with = "pid"
    )]
    file: Option<PathBuf>,

    /// A process whose program to list
    #[arg(short, long, value_name = "PID")]
    pid: Option<u32>,

    /// Only these probes, `*` standing for anything; may be repeated
    #[arg(long = "probe", value_name = "PROVIDER:NAME")]
    probes: Vec<Pattern>,

    /// Also print where each site is and where its arguments are
    #[arg(short, long)]
    verbose: bool,

    /// Print JSON, schema `blackout.probes/1`
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Listing {
    schema: &'static str,
    probes: Vec<Probe>,
    /// Notes whose probes the linker dropped.
    dangling: Vec<Note>,
}

/// A note without a probe.
#[derive(Serialize)]
struct Note {
    provider: String,
    name: String,
    why: &'static str,
}

/// One site.
#[derive(Serialize)]
struct Probe {
    provider: String,
    name: String,
    offset: u64,
    semaphore: Option<u64>,
    /// The semaphore may be raised in the wrong mapping; see `Site::semaphore_hazard`.
    semaphore_hazard: bool,
    args: Vec<Argument>,
}

#[derive(Serialize)]
struct Argument {
    name: String,
    kind: ValueKind,
    /// As the note has it.
    operand: String,
    /// Why no program can read it.
    #[serde(skip_serializing_if = "Option::is_none")]
    unreadable: Option<&'static str>,
}

pub(super) fn run(args: &Args) -> anyhow::Result<Outcome> {
    let path = match (&args.file, args.pid) {
        (Some(file), _) => file.clone(),
        (None, Some(pid)) => PathBuf::from(format!("/proc/{pid}/exe")),
        (None, None) => bail!("give a FILE, or --pid PID"),
    };
    let binary = Binary::open(&path)?;
    let chosen = |provider: &str, name: &str| {
        let matches = |pattern: &Pattern| pattern.matches(provider, name);
        args.probes.is_empty() || args.probes.iter().any(matches)
    };
    let sites = binary
        .sites
        .iter()
        .filter(|site| chosen(&site.provider, &site.name));
    let probes: Vec<_> = sites.map(Probe::from).collect();
    let dangling = binary
        .dangling
        .into_iter()
        .filter(|note| chosen(&note.provider, &note.name));
    let dangling: Vec<_> = dangling.map(Note::from).collect();
    let mut out = io::stdout().lock();
    if args.json {
        let listing = Listing {
            schema: "blackout.probes/1",
            probes,
            dangling,
        };
        serde_json::to_writer_pretty(&mut out, &listing)?;
        writeln!(out)?;
        return Ok(Outcome::Done);
    }
    if probes.is_empty() {
        eprintln!("blackout: {} has no such probes", path.display());
    }
    print(&mut out, &probes, args.verbose)?;
    for Note {
        provider,
        name,
        why,
    } in &dangling
    {
        eprintln!("blackout: {provider}:{name} cannot be attached: {why}");
    }
    Ok(Outcome::Done)
}

fn print(out: &mut impl Write, probes: &[Probe], verbose: bool) -> io::Result<()> {
    let mut told: Vec<String> = Vec::new();
    for probe in probes {
        let args: Vec<_> = probe
            .args
            .iter()
            .map(|arg| format!("{}: {}", arg.name, kind(arg.kind)))
            .collect();
        let line = format!("{}:{}({})", probe.provider, probe.name, args.join(", "));
        if verbose {
            writeln!(out, "{line}")?;
            print_site(out, probe)?;
        } else if !told.contains(&line) {
            // A probe with several sites is told once.
            writeln!(out, "{line}")?;
            told.push(line);
        }
    }
    Ok(())
}

fn print_site(out: &mut impl Write, probe: &Probe) -> io::Result<()> {
    write!(out, "    at {:#x}", probe.offset)?;
    if let Some(semaphore) = probe.semaphore {
        write!(out, ", semaphore at {semaphore:#x}")?;
    }
    if probe.semaphore_hazard {
        write!(
            out,
            " (in a page that is mapped twice: may never fire; link with \
             -Wl,-z,separate-loadable-segments)"
        )?;
    }
    writeln!(out)?;
    for arg in &probe.args {
        write!(out, "    {} = {}", arg.name, arg.operand)?;
        match arg.unreadable {
            Some(why) => writeln!(out, " (unreadable: {why})")?,
            None => writeln!(out)?,
        }
    }
    Ok(())
}

fn kind(kind: ValueKind) -> &'static str {
    match kind {
        ValueKind::U64 => "u64",
        ValueKind::I64 => "i64",
        ValueKind::Str => "str",
    }
}

impl From<Dangling> for Note {
    fn from(note: Dangling) -> Self {
        let Dangling {
            provider,
            name,
            why,
        } = note;
        Self {
            provider,
            name,
            why,
        }
    }
}

impl From<&Site> for Probe {
    fn from(site: &Site) -> Self {
        let argument = |(def, arg): (ArgDef, &Arg)| Argument {
            name: def.name,
            kind: def.kind,
            operand: arg.text.clone(),
            unreadable: match arg.operand {
                Operand::Unreadable(why) => Some(why),
                _ => None,
            },
        };
        Self {
            provider: site.provider.clone(),
            name: site.name.clone(),
            offset: site.offset,
            semaphore: site.semaphore,
            semaphore_hazard: site.semaphore_hazard,
            args: arguments(site)
                .into_iter()
                .zip(&site.args)
                .map(argument)
                .collect(),
        }
    }
}
