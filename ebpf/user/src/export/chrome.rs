//! Chrome's trace format, which chrome://tracing, Perfetto and speedscope read. What it holds is in
//! [`super::trace`]; `otherData` says when the trace's zero was, how other hosts' clocks were laid
//! over it, and what was lost.

use std::io::{self, Write};

use serde::Serialize;
use serde_json::Value;

use super::trace::event::Event;
use super::trace::{self, Sink};
use crate::analysis::{Loaded, Migration};

/// Writes the trace of `recordings`, among which `migrations` were found.
///
/// # Errors
/// What `out` returns.
pub fn write(
    out: &mut impl Write,
    recordings: &[Loaded],
    migrations: &[Migration<'_>],
) -> io::Result<()> {
    trace::write(&mut Json { out, any: false }, recordings, migrations)
}

/// The list of events, as it is written.
struct Json<'w, W> {
    out: &'w mut W,
    any: bool,
}

impl<W: Write> Sink for Json<'_, W> {
    fn begin(&mut self, _: i64, other: &Value) -> io::Result<()> {
        write!(
            self.out,
            "{{\"displayTimeUnit\":\"ns\",\"otherData\":{other},\"traceEvents\":["
        )
    }

    fn put(&mut self, event: &Event<'_>) -> io::Result<()> {
        self.out.write_all(if self.any { b",\n" } else { b"\n" })?;
        self.any = true;
        event.serialize(&mut serde_json::Serializer::new(&mut *self.out))?;
        Ok(())
    }

    fn end(&mut self) -> io::Result<()> {
        writeln!(self.out, "\n]}}")
    }
}
