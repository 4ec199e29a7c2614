//! Finds and loads the onnxruntime library and what lies beside it, once per process. Only files are looked at, nothing
//! is executed. The binding's own search panics where there is no library, so the path is always resolved here.

use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use ort::environment::Environment;

#[cfg(feature = "ort-load")]
use crate::search;
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

/// Loads `explicit`, or the file that `ORT_DYLIB_PATH` names, or the first usable one of [`crate::search::candidates`].
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
    let library = find(explicit)?;
    *loaded = Some(library.clone());
    Ok(library)
}

#[cfg(feature = "ort-load")]
fn find(explicit: Option<&Path>) -> Result<Library, Missing> {
    let variable = std::env::var_os(PATH_VARIABLE).filter(|v| !v.is_empty());
    let named = explicit.map(|p| (p.to_owned(), "--ort-lib")).or(variable.map(|v| (v.into(), PATH_VARIABLE)));
    match named {
        Some((path, from)) => open(&path)
            .map_err(|reason| Missing { reason: format!("{reason} (from {from})"), remedy: install() }),
        None => open_first(search::candidates()),
    }
}

/// Whether to load the library before it is needed: `ORT_DYLIB_PATH` names it, or one that is found has CUDA beside it.
pub fn wanted() -> bool {
    #[cfg(feature = "ort-load")]
    {
        let named = std::env::var_os(PATH_VARIABLE).is_some_and(|v| !v.is_empty());
        named || search::candidates().iter().any(|path| search::brings_cuda(path))
    }
    #[cfg(not(feature = "ort-load"))]
    false
}

/// The library that was linked into the program; files and variables are not looked at.
#[cfg(not(feature = "ort-load"))]
fn find(explicit: Option<&Path>) -> Result<Library, Missing> {
    if let Some(path) = explicit {
        return Err(Missing {
            reason: format!("got the library `{}`, but this build has onnxruntime linked in", path.display()),
            remedy: "build dmd-run with its default features to load libraries".to_owned(),
        });
    }
    let path = std::env::current_exe().unwrap_or_default();
    let failed = |e: ort::Error| Missing { reason: e.to_string(), remedy: "`--provider engine`".to_owned() };
    started(ort::init(), path).map_err(failed)
}

fn started(builder: ort::environment::EnvironmentBuilder, path: PathBuf) -> ort::Result<Library> {
    let environment = builder.with_name("dmd").with_telemetry(false).build()?;
    environment.set_log_level(ort::logging::LogLevel::Fatal);
    Ok(Library { version: version(&path), path, environment })
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

#[cfg(feature = "ort-load")]
fn install() -> String {
    format!(
        "`pip install onnxruntime` (1.{} or newer) in an active virtual environment, or name the library file with \
         --ort-lib or {PATH_VARIABLE}",
        ort::MINOR_VERSION
    )
}

#[cfg(feature = "ort-load")]
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

#[cfg(feature = "ort-load")]
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
    started(builder, path.clone()).map_err(|e| format!("`{}`: {e}", path.display()))
}

fn absolute(path: &Path) -> PathBuf {
    path.canonicalize().or_else(|_| std::path::absolute(path)).unwrap_or_else(|_| path.to_owned())
}

fn version(path: &Path) -> String {
    #[cfg(feature = "ort-load")]
    let in_name = path.file_name().and_then(|n| search::version_in_name(&n.to_string_lossy()));
    #[cfg(not(feature = "ort-load"))]
    let in_name = path.file_name().and(None::<String>);
    let in_build = || ort::info().split("git-branch=rel-").nth(1)?.split(',').next().map(str::to_owned);
    in_name.or_else(in_build).unwrap_or_else(|| "unknown".to_owned())
}
