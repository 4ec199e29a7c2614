//! Writing so that a file is absent, the old one or the whole new one, at every moment.

use std::fs::File;
use std::io::{Error, ErrorKind, Result};
use std::path::Path;

use tempfile::{NamedTempFile, TempDir};

/// How the names of files begin that are being written.
pub const TEMPORARY: &str = ".dmd-";

/// The folder that a file is in.
pub fn folder(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// An empty file beside `path`, under another name; it vanishes unless it is [`place`]d.
///
/// # Errors
/// A folder that is missing or cannot be written into.
pub fn temporary(path: &Path) -> Result<NamedTempFile> {
    let folder = folder(path);
    if !folder.is_dir() {
        return Err(Error::new(
            ErrorKind::NotADirectory,
            format!("`{}` is not a directory", folder.display()),
        ));
    }
    builder(0o666).tempfile_in(folder)
}

/// An empty folder beside `path`, under another name; it vanishes with all that is in it unless it is renamed.
///
/// # Errors
/// A folder that cannot be made or written into.
pub fn temporary_folder(path: &Path) -> Result<TempDir> {
    let folder = folder(path);
    std::fs::create_dir_all(folder)?;
    builder(0o777).tempdir_in(folder)
}

/// What is made has the permissions of anything new.
fn builder(mode: u32) -> tempfile::Builder<'static, 'static> {
    let mut builder = tempfile::Builder::new();
    builder.prefix(TEMPORARY);
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(mode));
    #[cfg(not(unix))]
    let _ = mode;
    builder
}

/// Flushes the file to the disk and gives it its name; what has the name is replaced only if `replace`.
///
/// # Errors
/// A full disk, a name that exists.
pub fn place(file: NamedTempFile, path: &Path, replace: bool) -> Result<()> {
    file.as_file().sync_all()?;
    let placed = if replace { file.persist(path) } else { file.persist_noclobber(path) };
    placed.map_err(|e| e.error)?;
    sync(folder(path))
}

/// Makes renames in a folder durable, where folders can be opened.
///
/// # Errors
/// A folder that cannot be opened.
pub fn sync(folder: &Path) -> Result<()> {
    if cfg!(unix) { File::open(folder)?.sync_all() } else { Ok(()) }
}
