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
