//! Writes several files, none before all could be written. Knows nothing of what is in them.

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

/// Writes all files under temporary names beside them, and moves them to their places when all are whole.
pub fn write(files: &[File], replace: bool) -> Result<()> {
    let named = |file: &File| format!("cannot write `{}`", file.path.display());
    let written = files.iter().map(|file| {
        let mut whole = temporary(&file.path).with_context(|| named(file))?;
        whole
            .write_all(&file.bytes)
            .and_then(|()| whole.as_file().sync_all())
            .with_context(|| named(file))?;
        Ok(whole)
    });
    for (whole, file) in written.collect::<Result<Vec<_>>>()?.into_iter().zip(files) {
        place(whole, &file.path, replace).with_context(|| named(file))?;
    }
    Ok(())
}
