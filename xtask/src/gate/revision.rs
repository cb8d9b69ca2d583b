//! The counting program of another revision of this project.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result};

use crate::artifacts::{self, Counter};
use crate::{command, paths};

/// Builds what counts of `revision`, as git names it, in a working tree of its own.
///
/// The programs are kept, by the revision's hash: the same one is built once.
///
/// # Errors
/// When git knows no such revision here, or when it does not build.
pub(super) fn build(revision: &str) -> Result<Counter> {
    let name = format!("{revision}^{{commit}}");
    let commit = command::output(git(&["rev-parse", "--verify", "--end-of-options"]).arg(name))
        .with_context(|| format!("git has no revision {revision:?} here"))?;
    let commit = commit.trim();
    let folder = paths::target().join("revisions");
    let kept = |name: &str| folder.join(commit).join(name);
    let counter = Counter {
        program: kept("bench-its"),
        guest: kept("blackout-guest"),
    };
    if counter.guest.is_file() {
        return Ok(counter);
    }
    eprintln!("building revision {revision}, {commit}");
    fs::create_dir_all(folder.join(commit))
        .with_context(|| format!("cannot create {}", folder.display()))?;
    let tree = Tree::of(commit, folder.join("tree"))?;
    let built = artifacts::build_counter_of(&tree.folder, &folder.join("target"))?;
    for (from, to) in [
        (&built.program, &counter.program),
        (&built.guest, &counter.guest),
    ] {
        fs::copy(from, to).with_context(|| format!("cannot write {}", to.display()))?;
    }
    Ok(counter)
}

/// A working tree of one commit, removed when dropped.
struct Tree {
    folder: PathBuf,
}

impl Tree {
    fn of(commit: &str, folder: PathBuf) -> Result<Self> {
        let tree = Tree { folder };
        // One that an interrupted run left.
        tree.remove();
        let mut git = git(&["worktree", "add", "--force", "--quiet", "--detach"]);
        command::run(git.arg(&tree.folder).arg(commit))?;
        Ok(tree)
    }

    fn remove(&self) {
        if !self.folder.exists() {
            return;
        }
        let _ = git(&["worktree", "remove", "--force"])
            .arg(&self.folder)
            .status();
    }
}

impl Drop for Tree {
    fn drop(&mut self) {
        self.remove();
    }
}

fn git(arguments: &[&str]) -> Command {
    let mut git = Command::new("git");
    git.arg("-C").arg(paths::workspace()).args(arguments);
    git
}
