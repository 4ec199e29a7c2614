//! What README and documentation say is so: links and paths lead somewhere, every command is one that the program takes, and
//! what a newcomer types is executed, made small.

mod commands;

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use dmd_tests::{read_text, repository, run_bin};

use crate::commands::{Command, blocks, examples, in_text, replace};

/// Options of other programs that pages mention.
const FOREIGN_OPTIONS: &[&str] = &[
    "--bind-to",
    "--kill-on-bad-exit",
    "--map-by",
    "--mpi",
    "--oversubscribe",
    "--array",
    "--target-dir",
    "--locked",
    "--path",
    "--release",
    "--workspace",
    "--bin",
    "--bins",
    "--features",
    "--no-default-features",
    "--version",
    "--crate-type",
    "--target",
    "--example",
    "--use_xnnpack",
    "--help",
    "--all-features",
    "--resume",
    "--check",
    "--save-every",
    "--test",
    "--lib",
    "--json",
    "--no-verify",
];
/// Programs that pages call and that are not ours.
const FOREIGN_PROGRAMS: &[&str] = &[
    "srun",
    "mpirun",
    "kubectl",
    "sbatch",
    "cargo",
    "export",
    "npm",
    "rustup",
    "sudo",
    "scp",
    "ssh",
    "ffmpeg",
    "pip",
    "mdbook",
    "nvidia-smi",
];
/// Pages whose blocks are executed, with what they find: `model.onnx` and a run folder.
const EXECUTED: [(&str, &[&str]); 4] = [
    ("docs/getting-started.md", &[]),
    ("README.md", &[]),
    ("docs/run.md", &["model.onnx"]),
    ("docs/metrics.md", &["model.onnx", "runs/student"]),
];

/// All pages, by their path in the repository.
fn pages() -> Result<Vec<(String, String)>> {
    let mut names: Vec<String> = [
        "README.md",
        "ARCHITECTURE.md",
        "CONTRIBUTING.md",
        "SECURITY.md",
        "assets/README.md",
        "runtime-wasm/README.md",
    ]
    .map(str::to_owned)
    .to_vec();
    for folder in ["docs", "docs/decisions"] {
        for entry in fs::read_dir(repository().join(folder))? {
            let name = entry?.file_name().to_string_lossy().into_owned();
            if name.ends_with(".md") {
                names.push(format!("{folder}/{name}"));
            }
        }
    }
    names.sort();
    names.into_iter().map(|name| Ok((name.clone(), read_text(&repository().join(name))?))).collect()
}

/// Targets of the links of a page.
fn links(text: &str) -> Vec<&str> {
    text.split("](").skip(1).filter_map(|rest| rest.split([')', ' ']).next()).collect()
}

#[test]
fn every_page_is_a_chapter_and_links_lead_somewhere() -> Result<()> {
    let summary = read_text(&repository().join("docs/SUMMARY.md"))?;
    let chapters: BTreeSet<&str> = links(&summary).into_iter().collect();
    let pages = pages()?;
    let in_book: BTreeSet<&str> =
        pages.iter().filter_map(|(n, _)| n.strip_prefix("docs/")).filter(|n| *n != "SUMMARY.md").collect();
    ensure!(chapters == in_book, "SUMMARY.md lists {chapters:?}, docs/ has {in_book:?}");
    for (page, text) in &pages {
        let folder = repository().join(page).parent().context("no folder")?.to_owned();
        for link in links(text).into_iter().filter(|link| !link.contains("://") && !link.starts_with('#')) {
            let target = folder.join(link.split('#').next().unwrap_or_default());
            ensure!(target.exists(), "{page}: there is no `{link}`");
        }
        for included in text.split("{{#include ").skip(1).filter_map(|rest| rest.split("}}").next()) {
            ensure!(folder.join(included).is_file(), "{page}: there is no `{included}`");
        }
    }
    Ok(())
}

/// Whether a word is a path in the repository: begins with one of its folders, and has no placeholder.
fn is_path(word: &str, folders: &BTreeSet<String>) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || "_-./".contains(c);
    word.split_once('/').is_some_and(|(first, rest)| folders.contains(first) && !rest.is_empty())
        && word.chars().all(plain)
        && !word.split(['/', '.']).any(|part| part.len() > 1 && part.chars().all(|c| c.is_ascii_uppercase()))
}

#[test]
fn paths_that_pages_name_exist() -> Result<()> {
    let mut folders = BTreeSet::new();
    for entry in fs::read_dir(repository())? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            folders.insert(entry.file_name().to_string_lossy().into_owned());
        }
    }
    for unkept in ["runs", "pairs", "eval", "target", "demo-output"] {
        folders.remove(unkept);
    }
    let mut seen = 0;
    for (page, text) in pages()? {
        for code in in_text(&text) {
            for word in code.split_whitespace().filter(|word| is_path(word, &folders)) {
                ensure!(repository().join(word).exists(), "{page}: there is no `{word}`");
                seen += 1;
            }
        }
    }
    ensure!(seen > 100, "only {seen} paths");
    Ok(())
}

/// What a program says to the arguments with one more that it cannot know: a complaint about any other means that it
/// does not take them. Nothing is run. (A value is looked at when the next option comes, hence one more that it knows.)
fn taken(command: &Command) -> Result<()> {
    let folder = tempfile::tempdir()?;
    if command.arguments.iter().any(|argument| argument == "--help") {
        let done = run_bin(&command.program, folder.path(), &command.arguments)?;
        ensure!(done.code == Some(0), "`{command}` is not taken: {}", done.stderr);
        return Ok(());
    }
    let arguments =
        command.arguments.iter().map(String::as_str).chain(["--generate", "man", "--no-such-option"]);
    let done = run_bin(&command.program, folder.path(), arguments)?;
    let right = done.code == Some(2) && done.stderr.contains("unexpected argument '--no-such-option'");
    ensure!(right, "`{command}` is not taken: {}", done.stderr);
    Ok(())
}

/// A script exists, and its text knows the options.
fn script(command: &Command) -> Result<()> {
    let path = repository().join(&command.program);
    let mut text = fs::read_to_string(&path).with_context(|| format!("`{command}`"))?;
    let stem = command.program.replace('-', "_") + ".py";
    text += &fs::read_to_string(repository().join(stem)).unwrap_or_default();
    for option in command.arguments.iter().filter(|argument| argument.starts_with("--")) {
        ensure!(text.contains(option.as_str()), "`{command}`: {} does not know `{option}`", command.program);
    }
    Ok(())
}

#[test]
fn commands_in_pages_are_taken_by_the_programs() -> Result<()> {
    let mut all: Vec<(String, Command)> = Vec::new();
    for (page, text) in pages()? {
        let spans = in_text(&text).into_iter().map(Command::parse);
        let spans = spans.filter(|c| c.is_ours() && !c.arguments.is_empty());
        for command in blocks(&text).into_iter().chain(spans) {
            ensure!(
                command.is_ours() || FOREIGN_PROGRAMS.contains(&command.program.as_str()),
                "{page}: `{command}` is a program that nobody knows"
            );
            all.push((page.clone(), command));
        }
    }
    for program in ["dmd-distill", "dmd-export"] {
        let help = run_bin(program, Path::new("."), ["--help"])?.stdout;
        let found = examples(&help);
        ensure!(!found.is_empty(), "{program} --help has no examples");
        all.extend(found.into_iter().map(|command| (format!("{program} --help"), command)));
    }
    let mut checked = 0;
    for (page, command) in all.into_iter().filter(|(_, command)| command.is_ours()) {
        let result = if command.program.starts_with("scripts/") { script(&command) } else { taken(&command) };
        result.with_context(|| page)?;
        checked += 1;
    }
    ensure!(checked > 60, "only {checked} commands");
    Ok(())
}

#[test]
fn options_that_pages_name_exist() -> Result<()> {
    let mut known: BTreeSet<String> = FOREIGN_OPTIONS.iter().map(|option| (*option).to_owned()).collect();
    let mut add = |text: &str| known.extend(options(text));
    for (program, parts) in [
        ("dmd-distill", &["", "bases", "teacher", "pairs", "sample", "classifier", "eval"][..]),
        ("dmd-export", &[""]),
        ("dmd-run", &["", "info", "providers", "verify", "bench"]),
    ] {
        for part in parts {
            let arguments = [*part, "--help"].into_iter().filter(|argument| !argument.is_empty());
            add(&run_bin(program, Path::new("."), arguments)?.stdout);
        }
    }
    for entry in fs::read_dir(repository().join("scripts"))? {
        let path = entry?.path();
        if path.is_file() {
            add(&fs::read_to_string(path)?);
        }
    }
    for (page, text) in pages()? {
        for code in in_text(&text) {
            for option in options(code) {
                ensure!(known.contains(&option), "{page}: no program has the option `{option}`");
            }
        }
    }
    Ok(())
}

/// Words that begin with two dashes.
fn options(text: &str) -> Vec<String> {
    let word = |rest: &str| -> String {
        rest.chars().take_while(|c| c.is_ascii_alphanumeric() || "-_".contains(*c)).collect()
    };
    let starts = text.match_indices("--").filter(|(at, _)| {
        let before = text[..*at].chars().next_back();
        before.is_none_or(|c| c.is_whitespace() || "`[('\"|=".contains(c))
    });
    starts
        .map(|(at, _)| format!("--{}", word(&text[at + 2..])))
        .filter(|option| option.len() > 3 && !option.starts_with("---"))
        .collect()
}

/// The same command, with work for a second.
fn small(command: &Command) -> Command {
    let mut command = command.clone();
    let arguments = &mut command.arguments;
    let first = arguments.first().cloned().unwrap_or_default();
    let sets: &[(&str, &str)] = match command.program.as_str() {
        "dmd-distill" if first.starts_with("--") && !arguments.iter().any(|a| a == "--dry-run") => &[
            ("--train-steps", "2"),
            ("--reg-steps", "1"),
            ("--pairs", "8"),
            ("--pair-steps", "2"),
            ("--batch", "4"),
            ("--fake-updates", "1"),
            ("--warmup", "1"),
            ("--save-every", "2"),
            ("--sample-every", "2"),
            ("--eval-count", "0"),
            ("--gan-weight", "0"),
            ("--dm-draws", "1"),
            ("--pairs-dir", "pairs"),
            ("--samples", "2"),
        ],
        "dmd-distill" if first == "eval" && arguments.iter().any(|a| a == "--images") => &[("--count", "70")],
        "dmd-distill" if first == "eval" => &[("--count", "70"), ("--steps", "2")],
        "dmd-run" if arguments.iter().any(|a| a.ends_with(".npy")) => &[("--count", "70")],
        _ => &[],
    };
    for (option, value) in sets {
        replace(arguments, option, value);
    }
    command
}

#[test]
fn what_a_newcomer_types_works() -> Result<()> {
    let prepared = tempfile::tempdir()?;
    let step = |folder: &Path, line: &str| -> Result<()> {
        let command = small(&Command::parse(line));
        let done = run_bin(&command.program, folder, &command.arguments)?;
        ensure!(done.code == Some(0), "`{command}`: {}", done.stderr);
        Ok(())
    };
    step(prepared.path(), "dmd-distill --base ddpm-fashion --out runs/student")?;
    step(prepared.path(), "dmd-export model.onnx --from runs/student")?;
    for (page, needs) in EXECUTED {
        let folder = tempfile::tempdir()?;
        copy(&repository().join("assets/one-step-fashion"), &folder.path().join("assets/one-step-fashion"))?;
        for name in needs {
            copy(&prepared.path().join(name), &folder.path().join(name))?;
        }
        let ours = blocks(&read_text(&repository().join(page))?).into_iter().filter(Command::is_program);
        let mut count = 0;
        for command in ours {
            let command = small(&command);
            let done = run_bin(&command.program, folder.path(), &command.arguments)?;
            ensure!(done.code == Some(0), "{page}: `{command}` ended with {:?}: {}", done.code, done.stderr);
            count += 1;
        }
        ensure!(count > 0, "{page} has no commands");
    }
    Ok(())
}

/// A file or a folder with all that is in it.
fn copy(from: &Path, to: &PathBuf) -> Result<()> {
    fs::create_dir_all(to.parent().context("no folder")?)?;
    if from.is_file() {
        fs::copy(from, to)?;
        return Ok(());
    }
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        copy(&entry.path(), &to.join(entry.file_name()))?;
    }
    Ok(())
}

#[test]
fn a_wrong_command_would_be_noticed() -> Result<()> {
    for right in
        ["dmd-run model.onnx --count 3", "dmd-distill eval runs/student --json", "dmd-export --golden"]
    {
        taken(&Command::parse(right))?;
    }
    for wrong in [
        "dmd-run --cuont 3",
        "dmd-run --count many",
        "dmd-distill evil --json",
        "dmd-export a.onnx --dtype f8",
    ] {
        ensure!(taken(&Command::parse(wrong)).is_err(), "`{wrong}` is taken");
    }
    ensure!(script(&Command::parse("scripts/demo --fast")).is_err(), "scripts/demo --fast is taken");
    Ok(())
}
