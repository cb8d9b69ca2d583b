//! The uncompressed kernel inside a bzImage: the one that x86-64 monitors enter by PVH.

use std::fs::{self, File};
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result};

use crate::command;

/// Of the boot protocol's header (`Documentation/arch/x86/boot.rst`): how many sectors the real-mode
/// code has after its first, where the payload is behind them, and its length.
const SETUP_SECTS: usize = 0x1f1;
const PAYLOAD_OFFSET: usize = 0x248;
const PAYLOAD_LENGTH: usize = 0x24c;

/// Writes the kernel in `image` to `target`. Debian's kernels are compressed by zstd.
pub(super) fn extract(image: &Path, target: &Path) -> Result<()> {
    let bytes = fs::read(image).with_context(|| format!("cannot read {}", image.display()))?;
    let payload = payload(&bytes).with_context(|| format!("{} is no bzImage", image.display()))?;
    let compressed = target.with_extension("zst");
    fs::write(&compressed, payload)
        .with_context(|| format!("cannot write {}", compressed.display()))?;
    let output =
        File::create(target).with_context(|| format!("cannot write {}", target.display()))?;
    let mut zstd = Command::new("zstd");
    zstd.arg("-qdc")
        .arg(&compressed)
        .stdout(Stdio::from(output));
    command::run(&mut zstd)?;
    fs::remove_file(&compressed).with_context(|| format!("cannot remove {}", compressed.display()))
}

/// The compressed kernel, without the length of what is in it, which the kernel's build appends.
fn payload(image: &[u8]) -> Option<&[u8]> {
    let field = |at: usize| {
        let bytes = image.get(at..at + 4)?.try_into().ok()?;
        usize::try_from(u32::from_le_bytes(bytes)).ok()
    };
    let sectors = usize::from(*image.get(SETUP_SECTS)?) + 1;
    let start = (sectors * 512).checked_add(field(PAYLOAD_OFFSET)?)?;
    let length = field(PAYLOAD_LENGTH)?.checked_sub(4)?;
    image.get(start..start.checked_add(length)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_payload_is_where_the_header_says() {
        let mut image = vec![0; 2048];
        image[SETUP_SECTS] = 1;
        image[PAYLOAD_OFFSET] = 0x10;
        image[PAYLOAD_LENGTH] = 12;
        image[1040..1048].copy_from_slice(b"a kernel");
        assert_eq!(payload(&image), Some(&b"a kernel"[..]));
        image[PAYLOAD_LENGTH + 1] = 0xff;
        assert_eq!(payload(&image), None);
        assert_eq!(payload(&image[..512]), None);
    }
}
