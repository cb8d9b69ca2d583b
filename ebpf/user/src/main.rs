//! `blackout`: measures what a live migration's blackout is made of.

use std::process::ExitCode;

use blackout::cli::{self, Cli, Outcome};
use clap::Parser;

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // Help and version go to standard output and are no failure. Where the message
            // itself cannot be written there is nobody left to tell.
            let _ = error.print();
            return if error.use_stderr() {
                Outcome::CannotRun.into()
            } else {
                ExitCode::SUCCESS
            };
        }
    };
    match cli::run(cli) {
        Ok(outcome) => outcome.into(),
        Err(error) => {
            eprintln!("blackout: {error:#}");
            Outcome::CannotRun.into()
        }
    }
}
