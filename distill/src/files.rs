//! Reading, replacing and hashing files and folders; how one is written so that it is whole is in `dmd_cli::files`.

use std::fs;
use std::io::Write;
use std::path::Path;

use dmd_cli::files::{folder, place, sync, temporary};
use sha2::{Digest, Sha256};

use crate::error::{Error, Result};

/// Replaces `path` by `bytes`; makes its folder.
pub fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    let folder = folder(path);
    fs::create_dir_all(folder).map_err(Error::file("create", folder))?;
    let mut file = temporary(path).map_err(Error::file("write", path))?;
    file.write_all(bytes).and_then(|()| place(file, path, true)).map_err(Error::file("write", path))
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
    sync(folder(to)).map_err(Error::file("write", to))
}

/// Puts the folder `new` in the place of `folder`, which may exist. Where the system can exchange two names, there is one or
/// the other at every moment; elsewhere, for a moment, only the old one as `folder` with the extension `old`.
pub fn replace_folder(new: &Path, folder: &Path) -> Result<()> {
    if !folder.exists() {
        fs::rename(new, folder).map_err(Error::file("write", folder))?;
    } else if exchange(new, folder) {
        let _ = fs::remove_dir_all(new); // the old one, a nuisance at most
    } else {
        let old = folder.with_extension("old");
        let _ = fs::remove_dir_all(&old);
        fs::rename(folder, &old).map_err(Error::file("replace", folder))?;
        fs::rename(new, folder).map_err(Error::file("write", folder))?;
        let _ = fs::remove_dir_all(&old);
    }
    sync(dmd_cli::files::folder(folder)).map_err(Error::file("write", folder))
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

/// Reads a whole file.
pub fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).map_err(Error::file("read", path))
}

/// SHA-256 in hexadecimal.
pub fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|b| format!("{b:02x}")).collect()
}
