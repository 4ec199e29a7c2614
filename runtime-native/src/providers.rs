//! The providers a model can run on: their names, which one `auto` means, and what is here and why the rest is not.

use std::fmt;
use std::str::FromStr;

use serde::Serialize;

use crate::file::ModelFile;
use crate::generator::{Engine, Options};
#[cfg(feature = "ort")]
use crate::ort::probe;
use crate::{Error, Result};

/// What runs the network.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Provider {
    /// `cuda` if usable, else `cpu` if an onnxruntime library is found, else `tract`.
    Auto,
    /// The engine compiled into this crate.
    Tract,
    /// onnxruntime on the CPU.
    Cpu,
    /// onnxruntime on an NVIDIA GPU.
    Cuda,
    /// onnxruntime through TensorRT, with CUDA for the operators it does not take.
    Tensorrt,
}

/// The provider that was taken.
#[derive(Clone, Debug, Serialize)]
pub struct Choice {
    /// Never [`Provider::Auto`].
    pub provider: Provider,
    /// The engine and its version, with the library's path if it is one.
    pub engine: String,
    /// Why `auto` did not take the providers it prefers.
    pub passed_over: Vec<String>,
}

/// Whether a provider can be had on this machine.
#[derive(Clone, Debug, Serialize)]
pub struct Status {
    /// The provider.
    pub provider: Provider,
    /// Whether this build knows it.
    pub compiled: bool,
    /// The engine and its version, with the library's path if it is one.
    pub engine: Option<String>,
    /// Whether a model would run on it now.
    pub usable: bool,
    /// Why not.
    pub reason: Option<String>,
    /// What to do about it.
    pub remedy: Option<String>,
}

impl Provider {
    /// The names, in the order of the enum.
    pub const NAMES: [&str; 5] = ["auto", "tract", "cpu", "cuda", "tensorrt"];
    /// The real ones.
    pub const ALL: [Self; 4] = [Self::Tract, Self::Cpu, Self::Cuda, Self::Tensorrt];

    /// Its name on the command line.
    pub fn name(self) -> &'static str {
        Self::NAMES[self as usize]
    }

    /// Whether this build knows it.
    pub fn compiled(self) -> bool {
        match self {
            Self::Auto => true,
            Self::Tract => cfg!(feature = "tract"),
            Self::Cpu | Self::Cuda | Self::Tensorrt => cfg!(feature = "ort"),
        }
    }
}

impl fmt::Display for Provider {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Provider {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let all = [Self::Auto, Self::Tract, Self::Cpu, Self::Cuda, Self::Tensorrt];
        all.into_iter().find(|p| p.name() == text).ok_or_else(|| {
            Error::Request(format!("got provider `{text}`, expected one of {}", Self::NAMES.join(", ")))
        })
    }
}

/// Asks every provider whether a model would run on it now.
pub fn list(options: &Options) -> Vec<Status> {
    Provider::ALL
        .into_iter()
        .map(|provider| {
            let compiled = provider.compiled();
            match usable(provider, options) {
                Ok(engine) => Status {
                    provider,
                    compiled,
                    engine: Some(engine),
                    usable: true,
                    reason: None,
                    remedy: None,
                },
                Err((engine, error)) => {
                    let (reason, remedy) = match error {
                        Error::Provider { reason, remedy, .. } => (reason, Some(remedy)),
                        other => (other.to_string(), None),
                    };
                    Status { provider, compiled, engine, usable: false, reason: Some(reason), remedy }
                }
            }
        })
        .collect()
}

fn usable(provider: Provider, options: &Options) -> Result<String, (Option<String>, Error)> {
    if !provider.compiled() {
        return Err((None, not_compiled(provider)));
    }
    if provider == Provider::Tract {
        return Ok(tract_name());
    }
    probe(provider, options)
}

#[cfg(not(feature = "ort"))]
fn probe(provider: Provider, _: &Options) -> Result<String, (Option<String>, Error)> {
    Err((None, not_compiled(provider)))
}

/// Loads the model into the engine that `options` ask for.
pub(crate) fn open(file: &ModelFile, options: &Options) -> Result<(Engine, Choice)> {
    if options.ort_lib.is_some() && options.provider == Provider::Tract {
        return Err(Error::Request(
            "got an onnxruntime library for the provider `tract`, which uses none".to_owned(),
        ));
    }
    match options.provider {
        Provider::Auto => open_auto(file, options),
        provider => open_named(provider, file, options),
    }
}

#[cfg(not(feature = "ort"))]
fn open_auto(file: &ModelFile, options: &Options) -> Result<(Engine, Choice)> {
    open_named(Provider::Tract, file, options)
}

#[cfg(feature = "ort")]
fn open_auto(file: &ModelFile, options: &Options) -> Result<(Engine, Choice)> {
    let mut passed_over = Vec::new();
    match crate::library::load(options.ort_lib.as_deref()) {
        Ok(_) => {
            if let Err(reason) = crate::ort::compiled_in(Provider::Cuda) {
                passed_over.push(format!("cuda: {reason}"));
            } else {
                match open_named(Provider::Cuda, file, options) {
                    Err(Error::Provider { reason, .. }) => passed_over.push(format!("cuda: {reason}")),
                    other => return other,
                }
            }
            let (engine, choice) = open_named(Provider::Cpu, file, options)?;
            return Ok((engine, Choice { passed_over, ..choice }));
        }
        Err(problem) if options.ort_lib.is_some() || !Provider::Tract.compiled() => {
            return Err(problem.for_provider(Provider::Cpu));
        }
        Err(problem) => passed_over.push(format!("onnxruntime: {}", problem.reason)),
    }
    let (engine, choice) = open_named(Provider::Tract, file, options)?;
    Ok((engine, Choice { passed_over, ..choice }))
}

fn open_named(provider: Provider, file: &ModelFile, options: &Options) -> Result<(Engine, Choice)> {
    match provider {
        #[cfg(feature = "tract")]
        Provider::Tract => {
            let engine = crate::tract::Tract::open(file, options)?;
            Ok((Engine::Tract(engine), Choice { provider, engine: tract_name(), passed_over: Vec::new() }))
        }
        #[cfg(feature = "ort")]
        Provider::Cpu | Provider::Cuda | Provider::Tensorrt => {
            let (engine, name) = crate::ort::Ort::open(provider, file, options)?;
            Ok((Engine::Ort(engine.into()), Choice { provider, engine: name, passed_over: Vec::new() }))
        }
        _ => Err(not_compiled(provider)),
    }
}

fn not_compiled(provider: Provider) -> Error {
    let feature = if provider == Provider::Tract { "tract" } else { "ort" };
    Error::Provider {
        provider,
        reason: format!("this build lacks the cargo feature `{feature}`"),
        remedy: format!("build dmd-run with `--features {feature}`"),
    }
}

fn tract_name() -> String {
    "tract, compiled in".to_owned()
}
