//! Writing so that a file is either the old one or the whole new one, and hashing.

use std::fs;
#[cfg(unix)]
use std::fs::File;
use std::io::Write;
use std::path::Path;

use sha2::{Digest, Sha256};

use crate::error::{Error, Result};

/// How the names of files begin that are being written.
pub const TEMPORARY: &str = ".dmd-";

/// Replaces `path` by `bytes`: temporary file in the same folder, fsync, rename.
pub fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    fs::create_dir_all(folder).map_err(Error::file("create", folder))?;
    let mut builder = tempfile::Builder::new();
    builder.prefix(TEMPORARY);
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

/// Puts the folder `new` in the place of `folder`, which may exist. Where the system can exchange two names, there is one or
/// the other at every moment; elsewhere, for a moment, only the old one as `folder` with the extension `old`.
pub fn replace_folder(new: &Path, folder: &Path) -> Result<()> {
    if !folder.exists() {
        fs::rename(new, folder).map_err(Error::file("write", folder))?;
    } else if exchange(new, folder) {
        let _ = fs::remove_dir_all(new);
    } else {
        let old = folder.with_extension("old");
        let _ = fs::remove_dir_all(&old);
        fs::rename(folder, &old).map_err(Error::file("replace", folder))?;
        fs::rename(new, folder).map_err(Error::file("write", folder))?;
        let _ = fs::remove_dir_all(&old);
    }
    sync(folder.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new(".")))
}

#[cfg(any(target_os = "linux", target_os = "android", target_vendor = "apple"))]
fn exchange(one: &Path, other: &Path) -> bool {
    use rustix::fs::{CWD, RenameFlags, renameat_with};
    renameat_with(CWD, one, CWD, other, RenameFlags::EXCHANGE).is_ok()
}

#[cfg(not(any(target_os = "linux", target_os = "android", target_vendor = "apple")))]
fn exchange(_: &Path, _: &Path) -> bool {
    false
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
