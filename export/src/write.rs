//! Writes several files, none before all could be written. Knows nothing of what is in them.

use std::fs;
use std::io::Write;
use std::path::PathBuf;

use anyhow::{Context, Result};
use dmd_cli::files::{place, temporary};

/// A file to be written.
pub struct File {
    /// Where.
    pub path: PathBuf,
    /// What.
    pub bytes: Vec<u8>,
}

/// Writes all files under temporary names beside them, and moves them to their places when all are whole. If they are of use
/// only `together`, the last is away while the others are replaced: no model is better than one with another's weights.
pub fn write(files: &[File], replace: bool, together: bool) -> Result<()> {
    let named = |file: &File| format!("cannot write `{}`", file.path.display());
    let written = files.iter().map(|file| {
        let mut whole = temporary(&file.path).with_context(|| named(file))?;
        whole
            .write_all(&file.bytes)
            .and_then(|()| whole.as_file().sync_all())
            .with_context(|| named(file))?;
        Ok(whole)
    });
    let mut written = written.collect::<Result<Vec<_>>>()?;
    let (Some(whole), Some((last, others))) = (written.pop(), files.split_last()) else { return Ok(()) };
    let mut old = None;
    if replace && together && last.path.exists() {
        let away = temporary(&last.path).with_context(|| named(last))?;
        fs::rename(&last.path, away.path()).with_context(|| named(last))?;
        old = Some(away);
    }
    for (whole, file) in written.into_iter().zip(others) {
        if let Err(e) = place(whole, &file.path, replace) {
            if let Some(old) = old {
                old.persist(&last.path)?;
            }
            return Err(e).with_context(|| named(file));
        }
    }
    place(whole, &last.path, replace).with_context(|| named(last))
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn files(folder: &Path, bytes: &[u8]) -> [File; 2] {
        ["m.onnx.data", "m.onnx"].map(|name| File { path: folder.join(name), bytes: bytes.to_vec() })
    }

    #[test]
    fn files_of_one_model_are_replaced_together_or_not_at_all() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let path = folder.path();
        write(&files(path, b"old"), false, true)?;
        assert!(write(&files(path, b"new"), false, true).is_err(), "replaced unasked");
        write(&files(path, b"new"), true, true)?;
        for file in files(path, b"") {
            assert_eq!(fs::read(file.path)?, b"new");
        }
        // Nothing takes the place of a folder.
        fs::remove_file(path.join("m.onnx.data"))?;
        fs::create_dir(path.join("m.onnx.data"))?;
        let error = write(&files(path, b"newest"), true, true).unwrap_err();
        assert!(format!("{error:#}").contains("m.onnx.data"), "{error:#}");
        assert_eq!(fs::read(path.join("m.onnx"))?, b"new");
        assert_eq!(fs::read_dir(path)?.count(), 2, "something was left");
        Ok(())
    }
}
