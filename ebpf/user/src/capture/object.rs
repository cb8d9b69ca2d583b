//! The eBPF object: the one inside the program, or a file in its place.

use std::borrow::Cow;
use std::fs;
use std::path::Path;

use aya::include_bytes_aligned;

use super::Error;

/// What `build.rs` found: nothing, or the object.
static EMBEDDED: &[u8] = include_bytes_aligned!(concat!(env!("OUT_DIR"), "/blackout.bpf.o"));

/// The bytes of `file`, or of the object that the program carries.
///
/// # Errors
/// [`Error::NoObject`] and [`Error::Read`].
pub fn object(file: Option<&Path>) -> Result<Cow<'static, [u8]>, Error> {
    match file {
        Some(path) => fs::read(path)
            .map(Cow::Owned)
            .map_err(|source| Error::Read {
                path: path.to_path_buf(),
                source,
            }),
        None if EMBEDDED.is_empty() => Err(Error::NoObject),
        None => Ok(Cow::Borrowed(EMBEDDED)),
    }
}
