//! Root file systems of testbeds and guests: an initramfs put together anew for each run.
//!
//! The kernel unpacks a cpio archive in `newc` form (Linux, Documentation/driver-api/early-userspace/
//! buffer-format.rst) into a tmpfs, so a run leaves nothing behind and needs no root to prepare.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Component, Path};

use anyhow::{Context, Result, bail};
use cpio::newc::{Builder, trailer};

/// An initramfs being written. Parent folders are made as files need them.
pub(crate) struct Initramfs {
    archive: BufWriter<File>,
    folders: BTreeSet<String>,
    inode: u32,
}

impl Initramfs {
    /// Starts an empty archive at `path`.
    pub(crate) fn create(path: &Path) -> Result<Self> {
        let file =
            File::create(path).with_context(|| format!("cannot create {}", path.display()))?;
        Ok(Self {
            archive: BufWriter::new(file),
            folders: BTreeSet::new(),
            inode: 0,
        })
    }

    /// Adds the file `host` of this machine as `guest`, an absolute path in the archive.
    pub(crate) fn copy(&mut self, host: &Path, guest: &str) -> Result<()> {
        let contents =
            std::fs::read(host).with_context(|| format!("cannot read {}", host.display()))?;
        self.file(guest, &contents)
    }

    /// Adds an executable file with the given contents as `guest`, an absolute path in the archive.
    pub(crate) fn file(&mut self, guest: &str, contents: &[u8]) -> Result<()> {
        let name = self.entry_name(guest)?;
        self.entry(&name, 0o100_755, contents)
    }

    /// Writes the archive's end. Without it the kernel refuses the archive.
    pub(crate) fn finish(self) -> Result<()> {
        trailer(self.archive)?.flush()?;
        Ok(())
    }

    /// Checks that `guest` is absolute and plain, and adds the folders on the way to it.
    fn entry_name(&mut self, guest: &str) -> Result<String> {
        let mut components = Path::new(guest).components();
        let plain = components.next() == Some(Component::RootDir)
            && components.all(|part| matches!(part, Component::Normal(_)));
        if !plain {
            bail!("{guest} is not an absolute path without '..': an initramfs cannot hold it");
        }
        let name = guest.trim_start_matches('/');
        for (end, _) in name.match_indices('/') {
            let folder = &name[..end];
            if self.folders.insert(folder.to_owned()) {
                self.entry(folder, 0o040_755, &[])?;
            }
        }
        Ok(name.to_owned())
    }

    fn entry(&mut self, name: &str, mode: u32, contents: &[u8]) -> Result<()> {
        self.inode += 1;
        let size = u32::try_from(contents.len())
            .with_context(|| format!("{name} is larger than an initramfs can hold"))?;
        let mut writer = Builder::new(name)
            .ino(self.inode)
            .mode(mode)
            .nlink(1)
            .write(&mut self.archive, size);
        writer.write_all(contents)?;
        writer.finish()?;
        Ok(())
    }
}
