//! One process at a time works in a run folder: a lock of the system, which ends with its process, however that ends. What a
//! process that was killed left half written is removed when the next one takes the lock.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{Read, Write};
use std::path::Path;

use crate::error::{Error, Result};
use dmd_cli::files::TEMPORARY;

/// Name of the locked file, which says whose the lock is.
const NAME: &str = "lock";
/// Folders inside a run that are written into.
const WRITTEN: [&str; 4] = ["", "checkpoints", "samples", "teacher"];

/// A lock that is held.
pub struct Lock(#[expect(dead_code, reason = "held until it is dropped")] File);

impl Lock {
    /// Takes the lock of a run folder; an error that names the owner if another process has it.
    pub fn take(folder: &Path) -> Result<Self> {
        let path = folder.join(NAME);
        let opened = OpenOptions::new().create(true).truncate(false).read(true).write(true).open(&path);
        let mut file = opened.map_err(Error::file("write", &path))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                let mut owner = String::new();
                if file.read_to_string(&mut owner).is_err() || owner.trim().is_empty() {
                    owner = "another process".to_owned(); // it has not come to write its name, or the system hides it
                }
                let problem = format!(
                    "{} works on it, expected one process at a time\n\nhint: wait until it is done, or stop it",
                    owner.trim()
                );
                return Err(Error::content(folder, problem));
            }
            Err(TryLockError::Error(e)) => {
                dmd_cli::say!(
                    "warning: cannot lock `{}` ({e}): let no other process work there",
                    path.display()
                );
            }
        }
        let owner = format!("process {}{} ({})\n", std::process::id(), host(), command());
        file.set_len(0)
            .and_then(|()| file.write_all(owner.as_bytes()))
            .map_err(Error::file("write", &path))?;
        sweep(folder);
        Ok(Self(file))
    }
}

/// Removes files and folders that were being written when their process ended.
fn sweep(folder: &Path) {
    for sub in WRITTEN {
        for entry in fs::read_dir(folder.join(sub)).into_iter().flatten().flatten() {
            if entry.file_name().to_string_lossy().starts_with(TEMPORARY) {
                // A nuisance at most.
                let _ = fs::remove_file(entry.path()).or_else(|_| fs::remove_dir_all(entry.path()));
            }
        }
    }
}

fn command() -> String {
    let words: Vec<_> = std::env::args_os().map(|word| word.to_string_lossy().into_owned()).collect();
    words.join(" ")
}

/// The machine's name where it can be told, since a folder may be shared between machines.
fn host() -> String {
    let name = fs::read_to_string("/proc/sys/kernel/hostname").ok();
    let name = name.or_else(|| std::env::var("HOSTNAME").ok()).or_else(|| std::env::var("COMPUTERNAME").ok());
    name.map_or(String::new(), |name| format!(" on {}", name.trim()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_is_locked_as_long_as_its_owner_lives() -> Result<()> {
        let folder = tempfile::tempdir().unwrap();
        let half = folder.path().join(format!("{TEMPORARY}abc"));
        fs::write(&half, "half").unwrap();
        let folders = folder.path().join(format!("{TEMPORARY}abd"));
        fs::create_dir_all(folders.join("more")).unwrap();
        let lock = Lock::take(folder.path())?;
        assert!(!half.exists() && !folders.exists(), "what was half written is still there");
        let error = Lock::take(folder.path()).err().unwrap().to_string();
        let owner = format!("process {}", std::process::id());
        assert!(error.contains(&owner) && error.contains("hint: wait"), "{error}");
        drop(lock);
        Lock::take(folder.path()).map(drop)
    }
}
