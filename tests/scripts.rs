//! Scripts that refuse before they install or build anything.

#![cfg(unix)]

use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Result, ensure};
use dmd_tests::repository;

/// Runs a script in `cwd`; it must end with exit code 2 and say this.
fn refused(cwd: &Path, script: &str, arguments: &[&str], says: &[&str]) -> Result<()> {
    let script = repository().join("scripts").join(script);
    let output = Command::new(script).args(arguments).current_dir(cwd).stdin(Stdio::null()).output()?;
    let stderr = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.code() == Some(2), "{arguments:?}: {:?} {stderr}", output.status);
    for text in says {
        ensure!(stderr.contains(text), "{arguments:?}: `{text}` is not in: {stderr}");
    }
    Ok(())
}

#[test]
fn the_demo_keeps_what_is_in_the_callers_folder() -> Result<()> {
    let cwd = tempfile::tempdir()?;
    let mine = cwd.path().join("mine");
    std::fs::create_dir(&mine)?;
    std::fs::write(mine.join("precious"), "mine")?;
    let path = mine.display().to_string();
    for argument in ["mine", path.as_str()] {
        refused(cwd.path(), "demo", &[argument], &["/mine` exists already", "hint: "])?;
    }
    refused(cwd.path(), "demo", &["--help"], &["got `--help`", "usage: scripts/demo"])?;
    refused(cwd.path(), "demo", &["one", "two"], &["got 2 arguments"])?;
    ensure!(std::fs::read(mine.join("precious"))? == b"mine" && std::fs::read_dir(cwd.path())?.count() == 1);
    Ok(())
}

#[test]
fn the_web_demo_keeps_what_is_in_the_callers_folder() -> Result<()> {
    let cwd = tempfile::tempdir()?;
    std::fs::create_dir(cwd.path().join("mine"))?;
    std::fs::write(cwd.path().join("mine/precious"), "mine")?;
    refused(cwd.path(), "web-demo", &["--build", "mine"], &["/mine` is not empty", "hint: "])?;
    refused(cwd.path(), "web-demo", &["--model", "none.onnx"], &["no model", "none.onnx", "hint: "])?;
    refused(cwd.path(), "web-demo", &["--fast", "yes"], &["got `--fast`", "usage: scripts/web-demo"])?;
    ensure!(std::fs::read(cwd.path().join("mine/precious"))? == b"mine");
    Ok(())
}

#[test]
fn the_archive_says_how_it_is_called() -> Result<()> {
    let cwd = tempfile::tempdir()?;
    refused(cwd.path(), "archive", &["--fast"], &["got `--fast`", "usage: scripts/archive"])?;
    refused(cwd.path(), "archive", &["one", "two"], &["got 2 arguments"])?;
    Ok(())
}

#[test]
fn the_web_scripts_say_how_they_are_called() -> Result<()> {
    let cwd = tempfile::tempdir()?;
    refused(
        cwd.path(),
        "wasm-package",
        &[],
        &["got 0 arguments", "usage: scripts/wasm-package [--all-operators] FOLDER"],
    )?;
    refused(cwd.path(), "bench-web", &["--fast"], &["got `--fast`", "usage: scripts/bench-web"])?;
    refused(cwd.path(), "bench-web", &["--json"], &["got `--json`", "hint: "])?;
    Ok(())
}

/// A copy of what `scripts/figures` reads.
fn pages(folder: &Path) -> Result<()> {
    for part in ["scripts", "docs", "docs/results", "docs/decisions", "assets", "runtime-wasm"] {
        std::fs::create_dir(folder.join(part))?;
        for entry in std::fs::read_dir(repository().join(part))? {
            let path = entry?.path();
            let text = path.extension().is_none_or(|e| e == "md" || e == "toml" || e == "json");
            if let (true, true, Some(name)) = (path.is_file(), text, path.file_name()) {
                std::fs::copy(&path, folder.join(part).join(name))?;
            }
        }
    }
    std::fs::copy(repository().join("README.md"), folder.join("README.md"))?;
    Ok(())
}

#[test]
fn documented_figures_are_those_of_the_results() -> Result<()> {
    let figures = |folder: &Path, args: &[&str]| -> Result<(Option<i32>, String)> {
        let done = Command::new(folder.join("scripts/figures")).args(args).output()?;
        Ok((done.status.code(), String::from_utf8_lossy(&done.stderr).into_owned()))
    };
    let (code, stderr) = figures(&repository(), &["--check"])?;
    ensure!(code == Some(0), "{stderr}");
    let copy = tempfile::tempdir()?;
    pages(copy.path())?;
    ensure!(figures(copy.path(), &["--check"])? == (Some(0), String::new()), "the copy differs");
    let change = |file: &str, from: &str, to: &str, says: &str| -> Result<()> {
        let path = copy.path().join(file);
        let text = std::fs::read_to_string(&path)?;
        ensure!(text.contains(from), "{file} has no `{from}`");
        std::fs::write(&path, text.replacen(from, to, 1))?;
        let (code, stderr) = figures(copy.path(), &["--check"])?;
        ensure!(code == Some(1) && stderr.contains(says), "{file}, `{from}`: {code:?} {stderr}");
        std::fs::write(&path, text)?;
        Ok(())
    };
    let row = "| generator, 1 step | 0.51 |";
    change("README.md", row, "| generator, 1 step | 0.50 |", "README.md: its figures are not those of")?;
    change("README.md", "## More", "It takes 3 ms.\n\n## More", "README.md: `3 ms` has no source")?;
    change("docs/results/precisions.json", "\"machine\"", "\"computer\"", "`precisions` has no `machine`")?;
    change("docs/results/precisions.json", "2680294", "9680294", "docs/onnx.md: its figures")?;
    change("docs/figures.toml", "student-time =", "other-time =", "no text `student-time`")?;
    ensure!(figures(copy.path(), &["--fast"])?.0 == Some(2), "`--fast` was taken");
    Ok(())
}

#[test]
fn fuzzing_takes_a_number_of_seconds() -> Result<()> {
    let cwd = tempfile::tempdir()?;
    for argument in ["soon", "-1", "0"] {
        refused(cwd.path(), "fuzz", &[argument], &[&format!("got `{argument}`"), "hint: scripts/fuzz 60"])?;
    }
    Ok(())
}
