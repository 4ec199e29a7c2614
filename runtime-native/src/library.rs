//! Finds and loads the onnxruntime library, once per process. Only files are looked at, nothing is executed.
//! The binding's own search panics where there is no library, so the path is always resolved here.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use ort::environment::Environment;

use crate::{Error, Provider};

/// Environment variable that names the library file.
pub const PATH_VARIABLE: &str = "ORT_DYLIB_PATH";

/// A loaded library.
#[derive(Clone, Debug)]
pub struct Library {
    /// The file.
    pub path: PathBuf,
    /// Its version, `unknown` if neither its name nor its build information says.
    pub version: String,
    pub(crate) environment: Environment,
}

/// Why there is no library.
#[derive(Clone, Debug)]
pub struct Missing {
    /// What is missing or wrong.
    pub reason: String,
    /// What to do about it.
    pub remedy: String,
}

static LOADED: Mutex<Option<Library>> = Mutex::new(None);

/// Loads `explicit`, or the file that `ORT_DYLIB_PATH` names, or the first usable one of [`candidates`].
///
/// A library that was named is the only one tried. A process holds one library: later calls return it, and naming
/// another one is an error.
pub fn load(explicit: Option<&Path>) -> Result<Library, Missing> {
    let mut loaded = LOADED.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(library) = &*loaded {
        return match explicit.map(absolute) {
            Some(path) if path != library.path => Err(Missing {
                reason: format!(
                    "got `{}`, but `{}` is loaded already",
                    path.display(),
                    library.path.display()
                ),
                remedy: "a process can load one onnxruntime library; start another process".to_owned(),
            }),
            _ => Ok(library.clone()),
        };
    }
    let variable = std::env::var_os(PATH_VARIABLE).filter(|v| !v.is_empty());
    let named = explicit.map(|p| (p.to_owned(), "--ort-lib")).or(variable.map(|v| (v.into(), PATH_VARIABLE)));
    let found = match named {
        Some((path, from)) => open(&path)
            .map_err(|reason| Missing { reason: format!("{reason} (from {from})"), remedy: install() }),
        None => open_first(candidates()),
    };
    let library = found?;
    *loaded = Some(library.clone());
    Ok(library)
}

/// Library files where they usually lie, best first: next to the executable, `./lib`, the active Python environment,
/// other Python installations, the library path, system folders.
pub fn candidates() -> Vec<PathBuf> {
    let executable = std::env::current_exe().ok().and_then(|exe| exe.parent().map(Path::to_owned));
    search_folders(executable, |name| std::env::var_os(name))
        .iter()
        .flat_map(|dir| libraries_in(dir))
        .collect()
}

impl Library {
    /// `onnxruntime 1.24.0, /path/to/the/file`.
    pub fn name(&self) -> String {
        format!("onnxruntime {}, {}", self.version, self.path.display())
    }
}

impl Missing {
    /// The same as an error about a provider.
    pub fn for_provider(self, provider: Provider) -> Error {
        Error::Provider { provider, reason: self.reason, remedy: self.remedy }
    }
}

fn install() -> String {
    format!(
        "`pip install onnxruntime` (1.{} or newer) in an active virtual environment, or name the library file with \
         --ort-lib or {PATH_VARIABLE}",
        ort::MINOR_VERSION
    )
}

fn open_first(paths: Vec<PathBuf>) -> Result<Library, Missing> {
    let mut reasons = Vec::new();
    for path in paths {
        match open(&path) {
            Ok(library) => return Ok(library),
            Err(reason) => reasons.push(reason),
        }
    }
    if reasons.is_empty() {
        reasons.push("no onnxruntime library was found".to_owned());
    }
    Err(Missing { reason: reasons.join("; "), remedy: install() })
}

fn open(path: &Path) -> Result<Library, String> {
    if !path.is_file() {
        return Err(format!("`{}` is not a file", path.display()));
    }
    let path = absolute(path);
    let builder = ort::init_from(&path).map_err(|e| match e {
        ort::LoadDynamicError::BadVersion { version_str, path } => {
            let minimum = ort::MINOR_VERSION;
            format!("`{}` is onnxruntime {version_str}, expected 1.{minimum} or newer", path.display())
        }
        ort::LoadDynamicError::MissingApi { path } => {
            format!("`{}` is not an onnxruntime library (no `OrtGetApiBase`)", path.display())
        }
        ort::LoadDynamicError::Dlopen { error, path } => {
            format!("`{}` cannot be loaded: {error}", path.display())
        }
        other => format!("`{}` cannot be loaded: {other}", path.display()),
    })?;
    let environment = builder
        .with_name("dmd")
        .with_telemetry(false)
        .build()
        .map_err(|e| format!("`{}`: {e}", path.display()))?;
    environment.set_log_level(ort::logging::LogLevel::Fatal);
    Ok(Library { version: version(&path), path, environment })
}

fn absolute(path: &Path) -> PathBuf {
    path.canonicalize().or_else(|_| std::path::absolute(path)).unwrap_or_else(|_| path.to_owned())
}

fn version(path: &Path) -> String {
    let in_name = path.file_name().and_then(|n| version_in_name(&n.to_string_lossy()));
    let in_build = || ort::info().split("git-branch=rel-").nth(1)?.split(',').next().map(str::to_owned);
    in_name.or_else(in_build).unwrap_or_else(|| "unknown".to_owned())
}

fn version_in_name(name: &str) -> Option<String> {
    let digits = name.strip_prefix("libonnxruntime.")?.trim_start_matches("so.").trim_end_matches(".dylib");
    let dotted = digits.contains('.') && digits.split('.').all(|part| part.parse::<u32>().is_ok());
    dotted.then(|| digits.to_owned())
}

fn search_folders(executable: Option<PathBuf>, variable: impl Fn(&str) -> Option<OsString>) -> Vec<PathBuf> {
    let mut folders: Vec<PathBuf> = executable.into_iter().collect();
    folders.push("lib".into());
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
    folders.retain(|dir| seen.insert(dir.clone()));
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
        let beside = touch("bin/libonnxruntime.so.1.24.0");
        let plain = touch("bin/libonnxruntime.so");
        let folders = search_folders(Some(root.path().join("bin")), |name| match name {
            "VIRTUAL_ENV" => Some(root.path().join("venv").into()),
            "PATH" => Some(root.path().join("other/bin").into()),
            _ => None,
        });
        let found: Vec<PathBuf> = folders.iter().flat_map(|dir| libraries_in(dir)).collect();
        let ours: Vec<&PathBuf> = found.iter().filter(|p| p.starts_with(root.path())).collect();
        assert_eq!(ours, [&plain, &beside, &newer, &older, &other]);
    }
}
