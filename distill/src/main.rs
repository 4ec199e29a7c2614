//! `dmd-distill`: parses the command line, runs the command, turns errors into exit codes.

use std::process::ExitCode;

use dmd_distill::commands;
use dmd_distill::device::quiet_candle_threads;
use dmd_distill::error::{Error, Result};
use dmd_distill::options::{Cli, Command};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    quiet_candle_threads();
    match run(dmd_cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::from(if matches!(error, Error::Interrupted(_)) { 130 } else { 2 })
        }
    }
}

fn run(cli: Cli) -> Result<()> {
    match cli.command {
        None => commands::distill(cli.distill),
        Some(Command::Bases { json }) => commands::bases(json),
        Some(Command::Teacher(args)) => commands::teacher(&args),
        Some(Command::Pairs(args)) => commands::pairs(&args),
        Some(Command::Sample(args)) => commands::sample(&args),
        Some(Command::Classifier(args)) => dmd_distill::classifier::run(&args),
        Some(Command::Eval(args)) => dmd_distill::eval::run(&args),
    }
}
