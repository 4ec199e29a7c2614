//! Writes files so that each is either absent, old or whole. Knows nothing of what is in them.

use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use tempfile::NamedTempFile;

/// A file to be written.
pub struct File {
    /// Where.
    pub path: PathBuf,
    /// What.
    pub bytes: Vec<u8>,
}

/// Writes all files under temporary names beside them, and moves them to their places when all are whole.
pub fn write(files: &[File], replace: bool) -> Result<()> {
    let named = |file: &File| format!("cannot write `{}`", file.path.display());
    let written = files.iter().map(|file| temporary(file).with_context(|| named(file)));
    for (temporary, file) in written.collect::<Result<Vec<_>>>()?.into_iter().zip(files) {
        let path = &file.path;
        let moved = if replace { temporary.persist(path) } else { temporary.persist_noclobber(path) };
        moved.map_err(|e| e.error).with_context(|| named(file))?;
    }
    Ok(())
}

fn temporary(file: &File) -> Result<NamedTempFile> {
    let parent = match file.path.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    };
    if !parent.is_dir() {
        bail!("there is no directory `{}`", parent.display());
    }
    let mut builder = tempfile::Builder::new();
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        builder.permissions(std::fs::Permissions::from_mode(0o666));
    }
    let mut temporary = builder.prefix(".dmd-export-").tempfile_in(parent)?;
    temporary.write_all(&file.bytes)?;
    temporary.as_file().sync_all()?;
    Ok(temporary)
}
