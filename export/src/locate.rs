//! Which checkpoint directory is meant: `--from`, or the newest run. Reads directory entries and `run.json`, no weights.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use dmd_core::card::Kind;

use serde_json::Value;

use crate::weights::{self, WEIGHT_FILES};
use crate::{Error, Result};

/// The checkpoint directory to export.
///
/// `from` is a checkpoint directory, or a run directory that holds `generator/` or `teacher/`; without it the newest
/// run under `runs` counts.
///
/// # Errors
/// If there is no run, or nothing of this kind in the directory.
pub fn locate(from: Option<&Path>, runs: &Path, kind: Kind) -> Result<PathBuf> {
    match from {
        Some(file) if file.is_file() && weights::is_pytorch(file) => Err(weights::pytorch(file)),
        Some(file) if file.is_file() => Err(Error::file(file, "it is a file, expected a directory")),
        Some(dir) if !dir.is_dir() => Err(Error::file(dir, "no such directory")),
        Some(dir) => in_directory(dir, kind),
        None => in_directory(&newest_run(runs, kind)?, kind),
    }
}

fn in_directory(dir: &Path, kind: Kind) -> Result<PathBuf> {
    if weights::find(dir, "config.json").is_some() {
        return Ok(dir.to_owned());
    }
    let (generator, teacher) = (dir.join("generator"), dir.join("teacher"));
    match kind {
        Kind::Generator if generator.is_dir() => Ok(generator),
        Kind::Teacher if teacher.is_dir() => Ok(teacher),
        Kind::Generator if command(dir).as_deref() == Some("distill") => Err(Error::Request(format!(
            "`{0}` is a distillation that has not finished and has no `generator/` yet\n\nhint: go on with `dmd-distill \
             --resume {0}`",
            dir.display()
        ))),
        Kind::Generator if teacher.is_dir() => Err(Error::Request(format!(
            "`{}` is a run that trained a base model and has no `generator/`\n\nhint: add --teacher to export the base \
             model, or distil it with `dmd-distill --base {}`",
            dir.display(),
            teacher.display()
        ))),
        _ => Err(Error::file(
            dir,
            "neither a checkpoint (config.json and weights) nor a run (with `generator/` or `teacher/`)",
        )),
    }
}

/// What `dmd-distill` was asked to do in a run.
fn command(run: &Path) -> Option<String> {
    let options: Value = serde_json::from_str(&fs::read_to_string(run.join("run.json")).ok()?).ok()?;
    options["command"].as_str().map(str::to_owned)
}

fn newest_run(runs: &Path, kind: Kind) -> Result<PathBuf> {
    let entries = fs::read_dir(runs).map_err(|_| no_run(runs))?;
    let newest = entries
        .flatten()
        .map(|entry| entry.path())
        .filter_map(|run| Some((finished(&run, kind)?, run)))
        .max_by(|a, b| a.cmp(b));
    newest.map(|(_, run)| run).ok_or_else(|| no_run(runs))
}

/// When the weights that `kind` needs were written into a run.
fn finished(run: &Path, kind: Kind) -> Option<SystemTime> {
    let parts: &[&str] = if kind == Kind::Generator { &["generator"] } else { &["generator", "teacher"] };
    let files = parts.iter().flat_map(|part| WEIGHT_FILES.map(|name| run.join(part).join(name)));
    files.filter_map(|file| fs::metadata(file).ok()?.modified().ok()).max()
}

fn no_run(runs: &Path) -> Error {
    Error::Request(format!(
        "no finished run in `{}`\n\nhint: name a run or checkpoint directory with --from, or make a run with `dmd-distill`",
        runs.display()
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn weights(dir: &Path, age_seconds: u64) {
        fs::create_dir_all(dir).unwrap();
        let file = fs::File::create(dir.join("model.safetensors")).unwrap();
        file.set_modified(SystemTime::now() - std::time::Duration::from_secs(age_seconds)).unwrap();
    }

    #[test]
    fn the_newest_run_of_the_kind_is_taken() {
        let dir = tempfile::tempdir().unwrap();
        let runs = dir.path().join("runs");
        assert!(locate(None, &runs, Kind::Generator).unwrap_err().to_string().contains("hint"));
        weights(&runs.join("b/generator"), 50);
        weights(&runs.join("a/generator"), 10);
        weights(&runs.join("c/teacher"), 1);
        fs::create_dir_all(runs.join("unfinished")).unwrap();
        assert_eq!(locate(None, &runs, Kind::Generator).unwrap(), runs.join("a/generator"));
        assert_eq!(locate(None, &runs, Kind::Teacher).unwrap(), runs.join("c/teacher"));
        let err = locate(Some(&runs.join("c")), &runs, Kind::Generator).unwrap_err().to_string();
        assert!(err.contains("--teacher"), "{err}");
        fs::write(runs.join("c/run.json"), r#"{"command":"teacher"}"#).unwrap();
        assert_eq!(locate(Some(&runs.join("c")), &runs, Kind::Generator).unwrap_err().to_string(), err);
        fs::write(runs.join("c/run.json"), r#"{"command":"distill"}"#).unwrap();
        let err = locate(Some(&runs.join("c")), &runs, Kind::Generator).unwrap_err().to_string();
        assert!(err.contains("not finished") && err.contains("--resume"), "{err}");
        let file = runs.join("model.pth");
        fs::write(&file, "").unwrap();
        let err = locate(Some(&file), &runs, Kind::Generator).unwrap_err().to_string();
        assert!(err.contains("model.pth") && err.contains("dmd-distill --base"), "{err}");
    }
}
