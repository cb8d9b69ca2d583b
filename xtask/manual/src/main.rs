//! Writes manual pages and shell completions of both programs, from the definitions that parse their
//! command lines: `blackout-manual FOLDER`. `cargo xtask dist` runs it; it is a program of its own so
//! that `cargo xtask` need not be built with the monitor and the tool in it.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use blackout::cli::Cli;
use clap::CommandFactory;
use clap_complete::Shell;
use vmm::args::Args;

fn main() -> Result<()> {
    let folder = env::args_os().nth(1).context("want the folder to write")?;
    write(&PathBuf::from(folder))
}

fn write(folder: &Path) -> Result<()> {
    let pages = folder.join("man");
    let completions = folder.join("completions");
    for folder in [&pages, &completions] {
        fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
    }
    for mut program in [Cli::command().name("blackout"), Args::command()] {
        // Pages of verbs are called `blackout-record.1`, and name each other.
        clap_mangen::generate_to(program.clone(), &pages)
            .with_context(|| format!("cannot write into {}", pages.display()))?;
        let name = program.get_name().to_owned();
        for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
            clap_complete::generate_to(shell, &mut program, &name, &completions)
                .with_context(|| format!("cannot write into {}", completions.display()))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use clap::Command;

    use super::*;

    #[test]
    fn every_verb_has_a_page() {
        let folder = env::temp_dir().join(format!("blackout-manual-{}", std::process::id()));
        write(&folder).unwrap();
        let verbs = Cli::command();
        let verbs = verbs.get_subcommands().map(Command::get_name);
        let pages = verbs.map(|verb| format!("blackout-{verb}.1"));
        let all = pages.chain(["blackout", "blackout-vmm"].map(|name| format!("{name}.1")));
        for page in all {
            let text = fs::read_to_string(folder.join("man").join(&page)).unwrap_or_default();
            assert!(text.contains(".SH NAME"), "{page}: {text}");
        }
        let bash = fs::read_to_string(folder.join("completions/blackout.bash")).unwrap();
        assert!(bash.contains("--baseline"));
        fs::remove_dir_all(folder).unwrap();
    }
}
