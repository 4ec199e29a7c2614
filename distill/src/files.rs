//! Writing so that a file is either the old one or the whole new one, and hashing.

use std::fs;
#[cfg(unix)]
use std::fs::File;
use std::io::Write;
use std::path::Path;

use sha2::{Digest, Sha256};

use crate::error::{Error, Result};

/// Replaces `path` by `bytes`: temporary file in the same folder, fsync, rename.
pub fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    fs::create_dir_all(folder).map_err(Error::file("create", folder))?;
    let mut builder = tempfile::Builder::new();
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
    let mut file = builder.tempfile_in(folder).map_err(Error::file("write", path))?;
    file.write_all(bytes).and_then(|()| file.as_file().sync_all()).map_err(Error::file("write", path))?;
    file.persist(path).map_err(|e| Error::file("write", path)(e.error))?;
    sync(folder)
}

/// Replaces `to` by what is in `from`, without copying it where the file system can share it. `from` may be replaced
/// afterwards, but must not be written into.
pub fn copy(from: &Path, to: &Path) -> Result<()> {
    let beside = to.with_extension("copy");
    let _ = fs::remove_file(&beside);
    if fs::hard_link(from, &beside).is_err() {
        return write(to, &read(from)?);
    }
    fs::rename(&beside, to).map_err(Error::file("write", to))?;
    let _ = fs::remove_file(&beside); // renaming one name of a file onto another does nothing
    sync(to.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new(".")))
}

/// Makes renames in a folder durable, where folders can be opened.
#[cfg(unix)]
fn sync(folder: &Path) -> Result<()> {
    match File::open(folder) {
        Ok(f) => f.sync_all().map_err(Error::file("write", folder)),
        Err(e) => Err(Error::file("open", folder)(e)),
    }
}

#[cfg(not(unix))]
fn sync(_: &Path) -> Result<()> {
    Ok(())
}

/// Reads a whole file.
pub fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).map_err(Error::file("read", path))
}

/// SHA-256 in hexadecimal.
pub fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|b| format!("{b:02x}")).collect()
}
