//! The way to standard output that the verbs share.

use std::io::{self, BufWriter, Write};

use serde::Serialize;

/// Hands `write` standard output. Colours stay away from pipes and from those who set NO_COLOR.
///
/// # Errors
/// What `write` returns, except that a reader that has seen enough (`| head`) is no failure.
pub(super) fn print(write: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> io::Result<()> {
    let mut out = BufWriter::new(anstream::AutoStream::auto(io::stdout()).lock());
    match write(&mut out).and_then(|()| out.flush()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        written => written,
    }
}

/// Writes `value` as JSON that a person can read too.
///
/// # Errors
/// What `out` returns.
pub(super) fn json(out: &mut dyn Write, value: &impl Serialize) -> io::Result<()> {
    serde_json::to_writer_pretty(&mut *out, value)?;
    writeln!(out)
}
