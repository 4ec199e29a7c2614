//! `dmd-distill`: parses the command line, runs the command, turns errors into exit codes.

use std::process::ExitCode;

use dmd_distill::commands;
use dmd_distill::device::quiet_candle_threads;
use dmd_distill::error::Result;
use dmd_distill::options::{Cli, Command};
use dmd_distill::parallel::{self, Team, Use};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    quiet_candle_threads();
    let cli: Cli = dmd_cli::parse();
    let session = match parallel::start(use_of(&cli)) {
        Ok(session) => session,
        Err(error) => {
            dmd_cli::say!("error: {error}");
            return ExitCode::from(2);
        }
    };
    match run(cli, &session.team) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(1),
        Err(error) => ExitCode::from(session.fail(&error)),
    }
}

/// What a command does where a launcher has started several processes.
fn use_of(cli: &Cli) -> Use {
    match &cli.command {
        None | Some(Command::Teacher(_)) => Use::Together,
        Some(Command::Pairs(args)) if args.check => Use::Alone,
        Some(Command::Pairs(args)) if args.shard.is_some() => Use::Apart,
        Some(Command::Pairs(_)) => Use::Together,
        Some(Command::Eval(args)) if args.shard.is_some() => Use::Apart,
        Some(_) => Use::Alone,
    }
}

/// False if a check has found a difference.
fn run(cli: Cli, team: &Team) -> Result<bool> {
    let done = match cli.command {
        None => commands::distill(cli.distill, team),
        Some(Command::Bases { json }) => commands::bases(json),
        Some(Command::Teacher(args)) => commands::teacher(&args, team),
        Some(Command::Pairs(args)) => return commands::pairs(&args, team),
        Some(Command::Sample(args)) => commands::sample(&args),
        Some(Command::Classifier(args)) => dmd_distill::classifier::run(&args),
        Some(Command::Eval(args)) => dmd_distill::eval::run(&args),
    };
    done.map(|()| true)
}
