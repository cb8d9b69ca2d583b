//! Monitors by git revision: each is built once, in a working tree of its own, and kept.

use std::env;
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::Error;

/// The monitor's package and program.
const MONITOR: &str = "blackout-vmm";

/// The program called `name`, or that of the revision `name` of the current folder's repository, which
/// is built if it was not before.
///
/// # Errors
/// When there is neither, or the revision does not build.
pub fn monitor(name: &OsStr) -> Result<PathBuf, Error> {
    if Path::new(name).is_file() {
        return Ok(PathBuf::from(name));
    }
    let no = |why: String| Error::Revision {
        name: name.to_string_lossy().into_owned(),
        why,
    };
    let repository = git(Path::new("."), &["rev-parse", "--show-toplevel"]).map_err(no)?;
    let repository = Path::new(&repository);
    let wanted = format!("{}^{{commit}}", name.to_string_lossy());
    let commit = git(
        repository,
        &["rev-parse", "--verify", "--end-of-options", &wanted],
    )
    .map_err(no)?;
    let folder = cache()
        .ok_or_else(|| no("neither XDG_CACHE_HOME nor HOME is set".to_owned()))?
        .join("revisions");
    let kept = folder.join(&commit).join(MONITOR);
    if kept.is_file() {
        return Ok(kept);
    }
    eprintln!("blackout: building {} of {commit}", name.to_string_lossy());
    build(repository, &commit, &folder, &kept).map_err(no)?;
    Ok(kept)
}

/// Counts the instructions of two revisions, or of one and the working tree, in the arm64 testbed of
/// the project's clone that is the current folder; what was found is printed. Whether nothing costs
/// more.
///
/// # Errors
/// When it could not be counted.
pub fn count(baseline: &OsStr, current: Option<&OsStr>) -> Result<bool, Error> {
    let mut cargo = Command::new("cargo");
    cargo.args(["xtask", "gate", "--against"]).arg(baseline);
    if let Some(current) = current {
        cargo.arg("--current").arg(current);
    }
    let status = cargo.status().map_err(|source| Error::System {
        what: "start cargo, which --testbed needs".to_owned(),
        source,
    })?;
    match status.code() {
        Some(0) => Ok(true),
        Some(1) => Ok(false),
        _ => Err(Error::Ended {
            program: PathBuf::from("cargo xtask gate"),
            status,
            said: "--testbed has to be run in a clone of the project".to_owned(),
        }),
    }
}

fn build(repository: &Path, commit: &str, folder: &Path, kept: &Path) -> Result<(), String> {
    let place = kept.parent().unwrap_or(folder);
    fs::create_dir_all(place).map_err(|error| format!("{}: {error}", place.display()))?;
    // By process: two builds at a time are in each other's way in cargo's folder only, which waits.
    let tree = folder.join(format!("tree-{}", std::process::id()));
    let at = tree.to_string_lossy().into_owned();
    git(
        repository,
        &["worktree", "add", "--force", "--detach", &at, commit],
    )?;
    let built = cargo(&tree, &folder.join("target"));
    let removed = git(repository, &["worktree", "remove", "--force", &at]);
    let program = built?;
    removed?;
    // A name that is there is whole.
    let partial = kept.with_extension("partial");
    fs::copy(&program, &partial)
        .and_then(|_| fs::rename(&partial, kept))
        .map_err(|error| format!("{}: {error}", kept.display()))
}

fn cargo(tree: &Path, target: &Path) -> Result<PathBuf, String> {
    let status = Command::new("cargo")
        .current_dir(tree)
        .env("CARGO_TARGET_DIR", target)
        .args(["build", "--release", "--package", MONITOR])
        .stdout(Stdio::null())
        .status()
        .map_err(|error| format!("cargo can't be started: {error}"))?;
    match status.success() {
        true => Ok(target.join("release").join(MONITOR)),
        false => Err(format!("as a revision it does not build: {status}")),
    }
}

/// What git answers, without the line's end.
fn git(folder: &Path, arguments: &[&str]) -> Result<String, String> {
    let output = Command::new("git")
        .arg("-C")
        .arg(folder)
        .args(arguments)
        .output()
        .map_err(|error| format!("git can't be started: {error}"))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        return Err(format!("git says: {}", said.trim()));
    }
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// Where this user's programs keep what they can make again.
fn cache() -> Option<PathBuf> {
    let base = env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
    let base = base.or_else(|| Some(PathBuf::from(env::var_os("HOME")?).join(".cache")))?;
    Some(base.join("blackout"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_a_program() {
        let own = env::current_exe().unwrap();
        assert_eq!(monitor(own.as_os_str()).unwrap(), own);
    }

    #[test]
    fn what_is_neither_is_named() {
        let error = monitor(OsStr::new("no-such-thing"))
            .unwrap_err()
            .to_string();
        assert!(
            error.starts_with("no-such-thing: no such file, and git"),
            "{error}"
        );
        // What looks like an option of git's is none.
        assert!(monitor(OsStr::new("--exec-path")).is_err());
    }
}
