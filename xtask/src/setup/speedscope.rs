//! speedscope, which tests have import what the tool exports for it.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result};

use super::Need;
use crate::{command, paths};

const VERSION: &str = "1.25.0";

/// Its page, as npm has it.
pub(super) struct Speedscope;

/// The page, which needs no server.
pub(crate) fn page() -> Result<PathBuf> {
    Ok(folder()?.join("package/dist/release/index.html"))
}

fn folder() -> Result<PathBuf> {
    Ok(paths::cache()?.join(format!("speedscope-{VERSION}")))
}

impl Need for Speedscope {
    fn name(&self) -> String {
        format!("speedscope {VERSION}")
    }

    fn found(&self) -> Result<Option<String>> {
        let page = page()?;
        Ok(page.exists().then(|| page.display().to_string()))
    }

    fn packages(&self) -> Vec<String> {
        match command::probe(Command::new("npm").arg("--version")) {
            Some(_) => Vec::new(),
            None => vec!["npm".to_owned()],
        }
    }

    fn install(&self) -> Result<()> {
        let folder = folder()?;
        fs::create_dir_all(&folder)
            .with_context(|| format!("cannot create {}", folder.display()))?;
        // The archive alone: what it depends on is for its own build.
        let mut pack = Command::new("npm");
        pack.args(["pack", "--silent", &format!("speedscope@{VERSION}")]);
        command::run(pack.current_dir(&folder))?;
        let mut unpack = Command::new("tar");
        unpack.args(["-xzf", &format!("speedscope-{VERSION}.tgz")]);
        command::run(unpack.current_dir(&folder))
    }
}
