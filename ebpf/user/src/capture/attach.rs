//! Attaches the programs: for each source the first way that the kernel takes.

use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use aya::programs::{Program, ProgramError};
use aya::{Btf, BtfError};

use super::sources::{Coverage, Hook, Refusal, Source, Way};
use super::{Error, Programs, kernel};

/// The program for USDT sites, by the way in which it can be attached.
pub(super) enum UsdtProgram<'a> {
    /// By one link for all sites of a process.
    Multi(BorrowedFd<'a>),
    /// Site by site.
    Single(BorrowedFd<'a>),
}

impl Programs {
    /// Attaches what the kernel takes, and says what it took. Without a process to trace this costs
    /// the host next to nothing.
    ///
    /// # Errors
    /// [`Error::Foreign`], if the object lacks a program. What the kernel refuses is no error here.
    pub fn attach(&mut self) -> Result<Vec<Coverage>, Error> {
        kernel::mount_tracefs();
        let btf = kernel::btf(self.backend);
        Source::all()
            .into_iter()
            .map(|source| self.cover(source, &btf))
            .collect()
    }

    /// The program for USDT sites, once [`attach`](Self::attach) found one.
    pub(super) fn usdt(&self) -> Option<UsdtProgram<'_>> {
        if let Ok(program) = &self.multi {
            return Some(UsdtProgram::Multi(program.as_fd()));
        }
        let ways = Source::Usdt.ways(self.backend);
        let ways = ways.into_iter().flat_map(|way| way.programs);
        let mut loaded = ways.filter_map(|(name, _)| self.ebpf.program(name)?.fd().ok());
        loaded
            .next()
            .map(|program| UsdtProgram::Single(program.as_fd()))
    }

    /// Runs of all programs so far and the time they took, ns, if the kernel counts them.
    pub(super) fn cost(&self) -> io::Result<(u64, u64)> {
        let programs = self
            .ebpf
            .programs()
            .filter_map(|(_, program)| program.fd().ok());
        let programs = programs.map(|fd| fd.as_fd());
        let mut cost = (0, 0);
        for fd in programs.chain(self.multi.iter().map(OwnedFd::as_fd)) {
            let text = fs::read_to_string(format!("/proc/self/fdinfo/{}", fd.as_raw_fd()))?;
            cost.0 += field(&text, "run_cnt:");
            cost.1 += field(&text, "run_time_ns:");
        }
        Ok(cost)
    }

    fn cover(&mut self, source: Source, btf: &Result<Btf, BtfError>) -> Result<Coverage, Error> {
        let mut coverage = Coverage {
            source,
            way: None,
            refused: Vec::new(),
        };
        for way in source.ways(self.backend) {
            match self.try_way(source, way, btf)? {
                Ok(()) => {
                    coverage.way = Some(way.name);
                    break;
                }
                Err(why) => coverage.refused.push(Refusal { way: way.name, why }),
            }
        }
        Ok(coverage)
    }

    /// Attaches all programs of a way, or none.
    fn try_way(
        &mut self,
        source: Source,
        way: &Way,
        btf: &Result<Btf, BtfError>,
    ) -> Result<Result<(), String>, Error> {
        for (index, (name, hook)) in way.programs.iter().enumerate() {
            if let Hook::Multi = hook {
                return Ok(self.multi.as_ref().map(drop).map_err(|error| chain(error)));
            }
            let program = self.ebpf.program_mut(name).ok_or(Error::Foreign(name))?;
            if let Err(error) = attach(program, source, *hook, btf) {
                for (name, _) in &way.programs[..=index] {
                    if let Some(program) = self.ebpf.program_mut(name) {
                        unload(program);
                    }
                }
                return Ok(Err(error));
            }
        }
        Ok(Ok(()))
    }
}

fn attach(
    program: &mut Program,
    source: Source,
    hook: Hook,
    btf: &Result<Btf, BtfError>,
) -> Result<(), String> {
    let symbol = match source {
        Source::Function(function) => function.symbol(),
        _ => match hook {
            Hook::Symbols([symbol]) => symbol,
            _ => "",
        },
    };
    let btf = || btf.as_ref().map_err(|error| chain(error));
    let attached = match (program, hook) {
        (Program::UProbe(program), Hook::Sites) => program.load(),
        (Program::RawTracePoint(program), Hook::RawTracepoint(name)) => {
            program.load().and_then(|()| program.attach(name).map(drop))
        }
        (Program::TracePoint(program), Hook::Tracepoint(category, name)) => program
            .load()
            .and_then(|()| program.attach(category, name).map(drop)),
        (Program::FEntry(program), Hook::Function | Hook::Symbols(_)) => program
            .load(symbol, btf()?)
            .and_then(|()| program.attach().map(drop)),
        (Program::FExit(program), Hook::Function | Hook::Symbols(_)) => program
            .load(symbol, btf()?)
            .and_then(|()| program.attach().map(drop)),
        (Program::KProbe(program), Hook::Function) => program
            .load()
            .and_then(|()| program.attach(symbol, 0).map(drop)),
        (Program::KProbe(program), Hook::Symbols(symbols)) => program.load().and_then(|()| {
            let mut symbols = symbols.iter();
            symbols.try_for_each(|symbol| program.attach(symbol, 0).map(drop))
        }),
        _ => Err(ProgramError::UnexpectedProgramType),
    };
    attached.map_err(|error| why(&error))
}

/// Detaches the program and takes it out of the kernel. One that was not loaded needs nothing.
fn unload(program: &mut Program) {
    let _ = match program {
        Program::TracePoint(program) => program.unload(),
        Program::RawTracePoint(program) => program.unload(),
        Program::FEntry(program) => program.unload(),
        Program::FExit(program) => program.unload(),
        Program::KProbe(program) => program.unload(),
        Program::UProbe(program) => program.unload(),
        _ => Ok(()),
    };
}

/// The reason in one line: the system's error, and the last thing that the verifier said.
fn why(error: &ProgramError) -> String {
    if let ProgramError::LoadError {
        io_error,
        verifier_log,
    } = error
    {
        let log = verifier_log.to_string();
        let mut said = log.lines().map(str::trim).filter(|line| {
            !line.is_empty() && !line.starts_with("processed ") && !line.starts_with("verification")
        });
        return match said.next_back() {
            Some(said) => format!("{io_error}: {said}"),
            None => io_error.to_string(),
        };
    }
    // The kernel's own number for "not supported", of which a C library knows no text.
    chain(error)
        .replace(
            "No error information (os error 524)",
            "not supported (ENOTSUPP)",
        )
        .replace(
            "Unknown error 524 (os error 524)",
            "not supported (ENOTSUPP)",
        )
}

/// An error and its causes in one line. aya's repeat their causes at places.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let more = error.to_string();
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        cause = error.source();
    }
    text
}

fn field(text: &str, name: &str) -> u64 {
    let value = text.lines().find_map(|line| line.strip_prefix(name));
    value
        .and_then(|value| value.trim().parse().ok())
        .unwrap_or(0)
}
