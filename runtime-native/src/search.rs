//! Where onnxruntime's library usually lies. Looks at files and loads nothing.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};

/// Library files where they usually lie, best first: next to the executable and in `lib` there, the active Python environment,
/// other Python installations, the library path, system folders.
pub fn candidates() -> Vec<PathBuf> {
    let executable = std::env::current_exe().ok().and_then(|exe| exe.parent().map(Path::to_owned));
    search_folders(executable, |name| std::env::var_os(name))
        .iter()
        .flat_map(|dir| libraries_in(dir))
        .collect()
}

/// The version in the name of a library file.
pub(crate) fn version_in_name(name: &str) -> Option<String> {
    let digits = name.strip_prefix("libonnxruntime.")?.trim_start_matches("so.").trim_end_matches(".dylib");
    let dotted = digits.contains('.') && digits.split('.').all(|part| part.parse::<u32>().is_ok());
    dotted.then(|| digits.to_owned())
}

fn search_folders(executable: Option<PathBuf>, variable: impl Fn(&str) -> Option<OsString>) -> Vec<PathBuf> {
    // Nothing relative to the current folder: it may be one that was downloaded.
    let mut folders: Vec<PathBuf> =
        executable.into_iter().flat_map(|dir| [dir.clone(), dir.join("lib")]).collect();
    let paths = |name: &str| {
        variable(name).map(|v| std::env::split_paths(&v).collect::<Vec<_>>()).unwrap_or_default()
    };
    let pythons = paths("PATH").into_iter().filter(|dir| dir.join("python3").is_file());
    let mut prefixes: Vec<PathBuf> = variable("VIRTUAL_ENV").map(PathBuf::from).into_iter().collect();
    prefixes.extend(pythons.filter_map(|bin| bin.parent().map(Path::to_owned)));
    prefixes.extend(variable("HOME").map(|home| Path::new(&home).join(".local")));
    prefixes.extend(["/usr/local".into(), "/usr".into()]);
    folders.extend(prefixes.iter().flat_map(|prefix| python_packages(prefix)));
    let loader = if cfg!(target_os = "macos") { "DYLD_LIBRARY_PATH" } else { "LD_LIBRARY_PATH" };
    folders.extend(paths(if cfg!(windows) { "PATH" } else { loader }));
    folders.extend(["/usr/local/lib", "/opt/homebrew/lib", "/usr/lib", "/usr/lib64"].map(PathBuf::from));
    folders.push(format!("/usr/lib/{}-linux-gnu", std::env::consts::ARCH).into());
    let mut seen = std::collections::HashSet::new();
    folders.retain(|dir| dir.is_absolute() && seen.insert(dir.clone()));
    folders
}

/// Folders that hold the library of the PyPI package below a Python prefix, newest Python first.
fn python_packages(prefix: &Path) -> Vec<PathBuf> {
    let mut versions: Vec<PathBuf> = entries(&prefix.join("lib"))
        .into_iter()
        .filter(|path| path.file_name().is_some_and(|n| n.to_string_lossy().starts_with("python3")))
        .collect();
    versions.sort_by_key(|path| std::cmp::Reverse(numbers(path)));
    versions.push(prefix.join("Lib"));
    versions
        .iter()
        .flat_map(|lib| ["site-packages", "dist-packages"].map(|d| lib.join(d).join("onnxruntime/capi")))
        .filter(|dir| dir.is_dir())
        .collect()
}

/// The onnxruntime libraries of a folder, newest first; the one without a version in its name before them.
fn libraries_in(dir: &Path) -> Vec<PathBuf> {
    let is_library = |name: &str| match std::env::consts::OS {
        "windows" => name == "onnxruntime.dll",
        "macos" => {
            name == "libonnxruntime.dylib" || (name.ends_with(".dylib") && version_in_name(name).is_some())
        }
        _ => name == "libonnxruntime.so" || name.starts_with("libonnxruntime.so."),
    };
    let mut found: Vec<PathBuf> = entries(dir)
        .into_iter()
        .filter(|path| path.is_file() && path.file_name().is_some_and(|n| is_library(&n.to_string_lossy())))
        .collect();
    found.sort_by_key(|path| (!numbers(path).is_empty(), std::cmp::Reverse(numbers(path))));
    found
}

/// Whether a library's folder has onnxruntime's CUDA provider.
pub(crate) fn brings_cuda(library: &Path) -> bool {
    let name =
        if cfg!(windows) { "onnxruntime_providers_cuda.dll" } else { "libonnxruntime_providers_cuda.so" };
    library.canonicalize().is_ok_and(|file| file.with_file_name(name).is_file())
}

fn entries(dir: &Path) -> Vec<PathBuf> {
    fs::read_dir(dir).map(|all| all.flatten().map(|e| e.path()).collect()).unwrap_or_default()
}

/// The numbers in a file name, for sorting by version.
fn numbers(path: &Path) -> Vec<u32> {
    let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    name.split(|c: char| !c.is_ascii_digit()).filter_map(|part| part.parse().ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_come_from_file_names() {
        let version = |name: &str| version_in_name(name);
        assert_eq!(version("libonnxruntime.so.1.32.0").as_deref(), Some("1.32.0"));
        assert_eq!(version("libonnxruntime.1.24.1.dylib").as_deref(), Some("1.24.1"));
        assert_eq!([version("libonnxruntime.so"), version("libonnxruntime.so.1")], [None, None]);
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn the_active_environment_comes_before_other_pythons_and_newer_before_older() {
        let root = tempfile::tempdir().unwrap();
        let touch = |path: &str| {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(&path, "").unwrap();
            path
        };
        let other = touch("other/lib/python3.12/site-packages/onnxruntime/capi/libonnxruntime.so.1.31.0");
        let older = touch("venv/lib/python3.9/site-packages/onnxruntime/capi/libonnxruntime.so.1.9.0");
        let newer = touch("venv/lib/python3.11/site-packages/onnxruntime/capi/libonnxruntime.so.1.24.0");
        touch("venv/lib/python3.11/site-packages/onnxruntime/capi/libonnxruntime_providers_shared.so");
        touch("other/bin/python3");
        let below = touch("bin/lib/libonnxruntime.so");
        assert!(!brings_cuda(&below));
        touch("bin/lib/libonnxruntime_providers_cuda.so");
        assert!(brings_cuda(&below));
        let beside = touch("bin/libonnxruntime.so.1.24.0");
        let plain = touch("bin/libonnxruntime.so");
        let folders = search_folders(Some(root.path().join("bin")), |name| match name {
            "VIRTUAL_ENV" => Some(root.path().join("venv").into()),
            "PATH" => Some(root.path().join("other/bin").into()),
            "LD_LIBRARY_PATH" => Some(".:lib:".into()),
            _ => None,
        });
        let found: Vec<PathBuf> = folders.iter().flat_map(|dir| libraries_in(dir)).collect();
        let ours: Vec<&PathBuf> = found.iter().filter(|p| p.starts_with(root.path())).collect();
        assert_eq!(ours, [&plain, &beside, &below, &newer, &older, &other]);
        assert!(folders.iter().all(|dir| dir.is_absolute()), "{folders:?}");
    }
}
