//! What the three programs have in common: they write their own completions and manual pages, messages, and files that are whole.
//! Must not contain anything that one program alone needs.

pub mod files;

use std::io::Write;
use std::process::exit;

use clap::{Arg, ArgMatches, Command, Parser};
use clap_complete::Shell;
use clap_mangen::Man;

/// Writes a line to stderr as `eprintln!` does, but goes on where that fails: a full disk behind a log, or a reader that has
/// ended, is no reason to lose the work.
#[macro_export]
macro_rules! say {
    ($($text:tt)*) => {{
        use std::io::Write as _;
        let _ = writeln!(std::io::stderr(), $($text)*);
    }};
}

const OPTION: &str = "generate";
const MANUAL: &str = "man";
const SHELLS: [(&str, Shell); 5] = [
    ("complete-bash", Shell::Bash),
    ("complete-elvish", Shell::Elvish),
    ("complete-fish", Shell::Fish),
    ("complete-powershell", Shell::PowerShell),
    ("complete-zsh", Shell::Zsh),
];

/// Parses the command line. Ends the program with usage, help or version, and, for `--generate`, with completions or a
/// manual page on stdout.
pub fn parse<P: Parser>() -> P {
    let mut command = with_generate(P::command());
    let matches = command.get_matches_mut();
    if let Some(text) = generated(&mut command, &matches) {
        exit(match std::io::stdout().write_all(&text) {
            Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => {
                say!("error: cannot write to stdout: {error}");
                2
            }
            _ => 0,
        });
    }
    P::from_arg_matches(&matches).unwrap_or_else(|error| error.exit())
}

/// Adds the option `--generate` to a program, and `--generate man` to its subcommands, where `--help` does not show it.
fn with_generate(command: Command) -> Command {
    let option = Arg::new(OPTION).long(OPTION).value_name("KIND").exclusive(true);
    let kinds = SHELLS.map(|(name, _)| name).into_iter().chain([MANUAL]);
    let help = "Print completions for a shell, or the manual page (also of a subcommand)";
    let whole = option.clone().help(help).value_parser(kinds.collect::<Vec<_>>());
    let part = option.hide(true).value_parser([MANUAL]);
    command.arg(whole).mut_subcommands(|subcommand| subcommand.arg(part.clone()))
}

/// What `--generate` asks for, if it is there.
fn generated(command: &mut Command, matches: &ArgMatches) -> Option<Vec<u8>> {
    let mut text = Vec::new();
    if let Some((name, inner)) = matches.subcommand() {
        inner.get_one::<String>(OPTION)?;
        manual(command.find_subcommand(name)?, &mut text);
        return Some(text);
    }
    let kind = matches.get_one::<String>(OPTION)?;
    match SHELLS.iter().find(|(name, _)| name == kind) {
        Some((_, shell)) => {
            let program = command.get_name().to_owned();
            clap_complete::generate(*shell, command, program, &mut text);
        }
        None => manual(command, &mut text),
    }
    Some(text)
}

/// Writing into memory does not fail.
fn manual(command: &Command, text: &mut Vec<u8>) {
    let _written = Man::new(command.clone()).render(text);
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[derive(Parser)]
    #[command(name = "tool", version, args_conflicts_with_subcommands = true)]
    struct Tool {
        #[command(subcommand)]
        command: Option<Part>,
        /// File to write
        out: Option<String>,
    }

    #[derive(clap::Subcommand)]
    enum Part {
        /// Draw images
        Draw {
            /// How many images
            #[arg(long)]
            count: u32,
        },
    }

    fn text(arguments: &[&str]) -> Result<Option<String>, clap::Error> {
        let mut command = with_generate(Tool::command());
        let matches = command.try_get_matches_from_mut(arguments)?;
        Ok(generated(&mut command, &matches).map(|text| String::from_utf8_lossy(&text).into_owned()))
    }

    #[test]
    fn programs_and_their_parts_have_manuals_and_completions() -> Result<(), clap::Error> {
        for (arguments, contains) in [
            (&["tool", "--generate", "man"][..], &[".TH tool 1", "File to write", "tool\\-draw(1)"][..]),
            (&["tool", "draw", "--generate", "man"], &[".TH tool-draw 1", "How many images"]),
            (&["tool", "--generate", "complete-bash"], &["complete -F _tool", "--count"]),
            (&["tool", "--generate", "complete-zsh"], &["#compdef tool"]),
            (&["tool", "--generate", "complete-fish"], &["complete -c tool"]),
            (&["tool", "--generate", "complete-elvish"], &["edit:completion:arg-completer[tool]"]),
            (&["tool", "--generate", "complete-powershell"], &["-CommandName 'tool'"]),
        ] {
            let text = text(arguments)?.unwrap_or_default();
            for part in contains {
                assert!(text.contains(part), "{arguments:?}: `{part}` is not in: {text}");
            }
        }
        Ok(())
    }

    #[test]
    fn other_command_lines_are_left_alone() -> Result<(), clap::Error> {
        assert_eq!(text(&["tool", "file"])?, None);
        assert_eq!(text(&["tool", "draw", "--count", "3"])?, None);
        for wrong in
            [&["tool", "file", "--generate", "man"][..], &["tool", "--generate", "html"], &["tool", "draw"]]
        {
            assert!(text(wrong).is_err(), "{wrong:?}");
        }
        Ok(())
    }
}
